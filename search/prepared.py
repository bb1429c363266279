"""What is worked out once, when a study is created, and holds for all its trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search.data_facts import FACTS_KEY, PREPARED_KEY, DataFacts
from yolocore.autoanchor import AnchorFit, AnchorTuple, AutoAnchorResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Stored in the database beside the study's configuration."""

    autoanchor: AutoAnchorResult | None = None
    """None where it is switched off."""
    transferred: str | None = None
    """How many of the model's tensors came from the weights file, as 343/349; None without such a file."""
    facts: DataFacts | None = None
    """What the space needs to know of the data; None where it needs nothing."""

    @property
    def anchors(self) -> AnchorTuple | None:
        """What trials train with where AutoAnchor replaced the anchors, pixels."""
        found = self.autoanchor
        return found.anchors if found is not None and found.outcome == "replaced" else None

    def rows(self) -> list[tuple[str, str]]:
        """What `status` shows, as name and text."""
        rows = []
        if self.transferred is not None:
            rows.append(("weights", f"{self.transferred} tensors transferred"))
        if self.autoanchor is not None:
            rows.append(("anchors", self.autoanchor.describe()))
        return rows

    def added_to(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A study's frozen configuration with this in it."""
        facts = {} if self.facts is None else {FACTS_KEY: self.facts.to_json()}
        own = {key: value for key, value in asdict(self).items() if key != FACTS_KEY}
        return {**config, PREPARED_KEY: {**own, **facts}}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Prepared:
        """What a stored configuration has; nothing in one that an earlier version wrote."""
        stored = config.get(PREPARED_KEY) or {}
        found = stored.get("autoanchor")
        return cls(
            autoanchor=None if found is None else _result(found),
            transferred=stored.get("transferred"),
            facts=DataFacts.of(config),
        )


def _result(stored: Mapping[str, Any]) -> AutoAnchorResult:
    return AutoAnchorResult(
        outcome=stored["outcome"],
        before=AnchorFit(**stored["before"]),
        after=AnchorFit(**stored["after"]),
        anchors=tuple(tuple((float(w), float(h)) for w, h in level) for level in stored["anchors"]),
        labels=int(stored["labels"]),
    )
