"""What a search space needs to know of the data: worked out when a study is created, stored with its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yolocore.initial import InitialLevel

PREPARED_KEY = "prepared"
"""Where the frozen form of a study keeps what was worked out when it was created (`search.prepared`)."""

FACTS_KEY = "facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """Of the training split."""

    class_counts: tuple[int, ...]
    """Labels of each class."""
    levels: tuple[InitialLevel, ...] = ()
    """What the objectness is asked for at the start; empty where no space needs it."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DataFacts | None:
        """What a stored configuration has; None in one whose space needs nothing."""
        stored = (config.get(PREPARED_KEY) or {}).get(FACTS_KEY)
        return (
            None
            if stored is None
            else cls(
                class_counts=tuple(int(count) for count in stored["class_counts"]),
                levels=tuple(
                    InitialLevel(level["logit"], level["cells"], tuple((n, target) for n, target in level["matched"]))
                    for level in stored["levels"]
                ),
            )
        )
