"""What people see of workers while they work: the launcher's knowledge joined with the ledger's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from search.launch.launcher import WorkerPhase, WorkerView
from search.report import StudyStatus, TrialStatus

WorkerActivity = Literal["starts", "trains", "idle"] | WorkerPhase
PACE_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """One worker at one moment."""

    index: int
    pid: int | None
    place: str
    activity: WorkerActivity
    """`starts`: it has not come to the database yet. `idle`: it waits for trials that others hold."""
    restarts: int
    trials: tuple[int, ...]
    """Numbers of the trials that it holds."""
    epoch: int | None
    """The furthest of its trials."""
    epochs: int | None
    reported_seconds: float | None
    """Since its last report."""
    log: str


def worker_lines(views: Sequence[WorkerView], status: StudyStatus, now: float) -> tuple[WorkerLine, ...]:
    """Joins what a launcher knows of its workers with what the ledger knows of their trials.

    Args:
        views: The launcher's workers.
        status: Of the study they work on.
        now: UTC epoch seconds.
    """
    held: dict[str | None, list[TrialStatus]] = {}
    for trial in status.trials:
        if trial.state == "RUNNING":
            held.setdefault(trial.worker, []).append(trial)
    return tuple(_line(view, held.get(view.worker_id, []), status, now) for view in views)


def _line(view: WorkerView, trials: Sequence[TrialStatus], status: StudyStatus, now: float) -> WorkerLine:
    device = status.devices.get(view.worker_id)
    reports = [trial.reported_at for trial in trials if trial.reported_at is not None]
    return WorkerLine(
        index=view.index,
        pid=view.pid,
        place=view.place or (device or "").partition(" ")[0],  # without the precision that follows it
        activity=_activity(view, bool(trials) or view.worker_id in status.rerunning, device is not None),
        restarts=view.restarts,
        trials=tuple(trial.ticket if trial.number is None else trial.number for trial in trials),
        epoch=max((trial.epoch for trial in trials), default=None),
        epochs=trials[0].epochs if trials else None,
        reported_seconds=max(0.0, now - max(reports)) if reports else None,
        log=view.log,
    )


def _activity(view: WorkerView, has_trials: bool, is_registered: bool) -> WorkerActivity:
    if view.phase != "runs":
        return view.phase
    if not is_registered:
        return "starts"
    return "trains" if has_trials else "idle"


class Pace:
    """Epochs of trials per minute, over the last ten minutes at most."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def add(self, slot_epochs: int, now: float | None = None) -> None:
        """Takes note of the number of epochs that the study has behind it."""
        moment = time.monotonic() if now is None else now
        self._points.append((moment, slot_epochs))
        while len(self._points) > 2 and self._points[1][0] < moment - PACE_SECONDS:
            self._points.pop(0)

    @property
    def per_minute(self) -> float | None:
        """None as long as nothing has moved."""
        if not self._points:
            return None
        (start, before), (end, after) = self._points[0], self._points[-1]
        return 60.0 * (after - before) / (end - start) if after > before and end > start else None
