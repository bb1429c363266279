"""What `run`, `launch` and `watch` show: a table that renews itself on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search.cli_common import out, print_line
from search.config import StudyConfig
from search.launch.launcher import Launcher, WorkerView
from search.launch.live import Pace, WorkerLine, worker_lines
from search.ledger import Ledger
from search.report import StudyStatus, duration, headline, live_view, new_table, study_status

POLL_SECONDS = 0.5
READ_SECONDS = 1.0
READ_SHARE = 0.1
"""Of the time: on a database that is slow or holds many trials the table is renewed less often."""

ACTIVITY_STYLES = {
    "trains": "green",
    "starts": "cyan",
    "idle": "dim",
    "waits": "yellow",
    "silent": "yellow",
    "given up": "red",
    "done": "dim",
}


def new_live() -> Live:
    """A part of the terminal that renews itself, below what was printed; nothing of it is left when it ends."""
    return Live(console=out, refresh_per_second=2, transient=True)


class Turns:
    """When the database is read again: every second, less often where that would take much of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a reading: how long it takes decides when the next one is due."""
        began = time.monotonic()
        yield
        self._next = began + max(READ_SECONDS, (time.monotonic() - began) / READ_SHARE)


class Screen(Protocol):
    """Turns the state of a study and its workers into what people read."""

    def view(self, status: StudyStatus, workers: Sequence[WorkerView]) -> RenderableType:
        """For a terminal; replaces what was there."""

    def lines(self, status: StudyStatus, workers: Sequence[WorkerView]) -> Iterator[str]:
        """For a file or a pipe: what is new since the last call."""


class TrialScreen:
    """The trials that train now, for `run`."""

    def __init__(self) -> None:
        self._shown = ""

    def view(self, status: StudyStatus, workers: Sequence[WorkerView]) -> RenderableType:  # noqa: ARG002
        """The trials of all workers."""
        return live_view(status)

    def lines(self, status: StudyStatus, workers: Sequence[WorkerView]) -> Iterator[str]:  # noqa: ARG002
        """The counts when they change."""
        line = headline(status, with_eta=False)
        if line != self._shown:
            self._shown = line
            yield line


class WorkerScreen(TrialScreen):
    """The workers and how the study goes on, for `launch`."""

    def __init__(self) -> None:
        super().__init__()
        self._pace = Pace()
        self._told: dict[int, tuple[str, int | None]] = {}

    def view(self, status: StudyStatus, workers: Sequence[WorkerView]) -> RenderableType:
        """The table of workers, then the study in three lines."""
        self._pace.add(status.slot_epochs)
        return launch_view(status, worker_lines(workers, status, time.time()), self._pace.per_minute)

    def lines(self, status: StudyStatus, workers: Sequence[WorkerView]) -> Iterator[str]:
        """Workers that start or end, and the counts when they change."""
        for view in workers:
            state = (view.phase, view.pid)
            if self._told.get(view.index) != state:
                self._told[view.index] = state
                about = [view.place, "" if view.pid is None else f"pid {view.pid}"]
                what = ", ".join(part for part in about if part)
                yield f"worker {view.index}{f' ({what})' if what else ''} {view.phase}; log: {view.log}"
        yield from super().lines(status, workers)


def look_after(launcher: Launcher, ledger: Ledger, config: StudyConfig, screen: Screen | None) -> None:
    """Looks after the workers until none is left, showing them.

    Args:
        launcher: Started.
        ledger: Of the study.
        config: Of the study.
        screen: What to show; None for nothing.
    """
    live = new_live() if out.is_terminal and screen is not None else None
    turns = Turns()
    with live or nullcontext():
        while launcher.poll():
            if screen is not None and turns.is_due:
                with turns.measured():
                    status = study_status(ledger, config)
                    if live is not None:
                        live.update(screen.view(status, launcher.views()))
                    else:
                        for line in screen.lines(status, launcher.views()):
                            print_line(line)
            time.sleep(POLL_SECONDS)


def launch_view(status: StudyStatus, lines: Sequence[WorkerLine], per_minute: float | None) -> RenderableType:
    """The workers as a table of at most 80 columns, and the study below it."""
    table = new_table(f"study {status.study}", "#", "pid", "on", "state", "died", "trials", "epoch", "report", "log")
    for column in table.columns:
        column.justify = "left" if column.header in ("on", "state", "trials", "log") else "right"
    table.padding = (0, 0, 0, 0)  # nine columns
    _limit(table, on=9, trials=11, log=16)
    for line in lines:
        table.add_row(*_cells(line))
    parts = [headline(status, with_eta=False)]
    more = []
    if per_minute is not None:
        more.append(f"{per_minute:.1f} epochs/min")
    if status.eta_seconds is not None and not status.finished:
        more.append(f"about {duration(status.eta_seconds)} left")
    if more:
        parts.append(" | ".join(more))
    folders = dict.fromkeys(str(Path(line.log).parent) for line in lines if "/" in line.log)
    parts += [f"logs in {folder}" for folder in folders]
    return Group(table, *(Text(part) for part in parts))


def _limit(table: Table, **widths: int) -> None:
    for column in table.columns:
        if (width := widths.get(str(column.header))) is not None:
            column.max_width = width
            column.overflow = "ellipsis"


def _cells(line: WorkerLine) -> list[RenderableType]:
    epoch = "" if line.epoch is None else f"{line.epoch}/{line.epochs}"
    report = "" if line.reported_seconds is None else short_time(line.reported_seconds)
    return [
        str(line.index),
        "" if line.pid is None else str(line.pid),
        line.place,
        Text(line.activity, style=ACTIVITY_STYLES.get(line.activity, "")),
        str(line.restarts or ""),
        numbers(line.trials),
        epoch,
        report,
        _log_name(line.log),
    ]


def numbers(values: Sequence[int]) -> str:
    """Trial numbers in few letters: `0-3,7`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def short_time(seconds: float) -> str:
    """A time in at most six letters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _log_name(log: str, width: int = 16) -> str:
    """The file's name; of a long one its end, which tells the workers apart, as a pattern that a shell completes."""
    name = Path(log).name
    return name if len(name) <= width else f"*{name[1 - width :]}"
