"""The service: studies, tickets, workers, records and exports around `yolocore`.

`from search import Study` is the package for notebooks and scripts (`search.api`); it is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.api import Study as Study

__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    if name == "Study":
        from search.api import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
