"""The command `watch`: a study as it goes on, from any host that reaches its database."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from search.cli_common import AsJson, RunsDir, Storage, StudyName, open_study, out, print_json, print_line
from search.cli_live import ACTIVITY_STYLES, POLL_SECONDS, Turns, new_live, short_time
from search.config import StudyConfig
from search.errors import DatabaseError
from search.ledger import Ledger, TicketState
from search.report import StudyRows, duration, format_value
from search.snapshot import SlotView, Snapshot, WorkerSnapshot, take_snapshot
from search.worker.existing import OUTAGE_SECONDS

PATIENCE_SECONDS = 2.0
"""A reading that takes longer because the database is away shows what was there before, and says so."""
SHOWN_FAILURES = 3
LOW_TERMINAL = 16
CURVE_WIDTH = 40
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"

DrawSlots = Callable[[WorkerSnapshot, Snapshot, int, str], list[Text]]

app = typer.Typer()


@app.command()
def watch(
    study: StudyName,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Watch a study: workers, the curves of what trains, queue, best, time left. Ctrl-C ends watching, not the study.

    Only reads the database, from any host that reaches it. Ends by itself when the budget is spent.

    Example: yolosearch watch my-study
    """
    ledger, config = open_study(study, storage, runs_dir, patience=PATIENCE_SECONDS)
    if as_json or once or not out.is_terminal:
        snapshot = _read(ledger, config)
        if as_json:
            print_json(snapshot.to_json())
        elif once:
            out.print(frame(snapshot, out.width))
        else:
            _print_changes(ledger, config)
        return
    signal.signal(signal.SIGTERM, _interrupt)
    last = _show(ledger, config)
    out.print(frame(last, out.width))


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _read(ledger: Ledger, config: StudyConfig) -> Snapshot:
    return take_snapshot(StudyRows.read(ledger, config.name), config)


def _readings(ledger: Ledger, config: StudyConfig) -> Iterator[tuple[Snapshot, str | None]]:
    """A snapshot a second, the last one when the study is finished; while the database is away the one before.

    Raises:
        DatabaseError: It was away for longer than workers wait for it.
    """
    turns, snapshot, since = Turns(), _read(ledger, config), time.monotonic()
    yield snapshot, None
    while not snapshot.finished:
        time.sleep(POLL_SECONDS)
        if not turns.is_due:
            continue
        trouble = None
        with turns.measured():
            try:
                snapshot, since = _read(ledger, config), time.monotonic()
            except DatabaseError:
                away = time.monotonic() - since
                if away > OUTAGE_SECONDS:
                    raise
                trouble = f"the database is away since {duration(away)}; this is what it held"
        yield snapshot, trouble


def _show(ledger: Ledger, config: StudyConfig) -> Snapshot:
    """Renews the frame until the study is finished; the last snapshot."""
    with new_live() as live:
        for snapshot, trouble in _readings(ledger, config):
            # The last line stays free: a terminal that is full to the brim would scroll.
            live.update(frame(snapshot, out.width, out.height - 1, trouble=trouble, hint=True))
    return snapshot


def _print_changes(ledger: Ledger, config: StudyConfig) -> None:
    """For a file or a pipe: the counts when they change."""
    shown = ""
    for snapshot, trouble in _readings(ledger, config):
        line = trouble or _summary(snapshot)[0]
        if line != shown:
            shown = line
            print_line(line)


# ---- the frame -------------------------------------------------------------------------------------------------------


def frame(
    snapshot: Snapshot, width: int, height: int | None = None, *, trouble: str | None = None, hint: bool = False
) -> RenderableType:
    """A snapshot as lines of at most `width` cells; at most `height` of them, slots side by side where it must be."""
    blocks = ASCII_BLOCKS if out.options.ascii_only else BLOCKS
    head = [Text(f"study {snapshot.study}", style="bold")]
    head += [Text(line) for line in _summary(snapshot)]
    head += _best_curve(snapshot, width, blocks)
    tail = _failures(snapshot, 1 if height is not None and height < LOW_TERMINAL else SHOWN_FAILURES)
    if trouble is not None:
        tail.append(Text(trouble, style="yellow"))
    if hint:
        tail.append(Text("Ctrl-C ends watching; the study goes on", style="dim"))
    room = None if height is None else max(1, height - len(head) - len(tail))
    lines = [*head, *_workers(snapshot, width, room, blocks), *tail]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def _summary(snapshot: Snapshot) -> list[str]:
    """Counts; best against base; how fast it goes."""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in snapshot.counts.items() if count)
    lines = [counts or "nothing yet"]
    best, base = snapshot.best, snapshot.base
    parts = [] if best is None else [f"best {format_value(best.value)} (trial {best.number})"]
    if base is not None and base.value is not None:
        is_complete = base.state == TicketState.COMPLETE
        parts.append(f"base {format_value(base.value)}" + ("" if is_complete else " so far"))
        if is_complete and best is not None and best.value is not None and best.number != base.number:
            parts.append(f"{best.value - base.value:+.4f}, unconfirmed")
    if parts:
        lines.append(" | ".join(parts))
    parts = [f"{snapshot.waiting} in the queue"] if snapshot.waiting else []
    if snapshot.epochs_per_minute is not None:
        parts.append(f"{snapshot.epochs_per_minute:.1f} epochs/min")
    if snapshot.eta_seconds is not None:
        parts.append(f"about {duration(snapshot.eta_seconds)} left")
    if snapshot.unsent:
        parts.append(f"{snapshot.unsent} to be sent to MLflow")
    if parts:
        lines.append(" | ".join(parts))
    return lines


def _best_curve(snapshot: Snapshot, width: int, blocks: str) -> list[Text]:
    """The best value after each complete trial."""
    values = snapshot.best_so_far
    if len(values) < 2:
        return []
    name = "best so far "
    drawn = sparkline(values, min(CURVE_WIDTH, width - len(name)), (values[0], values[-1]), blocks)
    return [Text.assemble(name, (drawn, "green"))]


def _workers(snapshot: Snapshot, width: int, room: int | None, blocks: str) -> list[Text]:
    if not snapshot.workers:
        if snapshot.finished:
            return []
        return [Text("no worker works on it: `yolosearch launch` or `worker` starts some", style="yellow")]
    lines: list[Text] = []
    styles: tuple[DrawSlots, ...] = (_slot_lines, _slots_in_lines, lambda *_: [])
    for draw in styles:
        lines = []
        for worker in snapshot.workers:
            lines += [_worker_line(worker), *draw(worker, snapshot, width, blocks)]
        if room is None or len(lines) <= room:
            return lines
    left_out = len(lines) - (room or 0) + 1
    return [*lines[: len(lines) - left_out], Text(f"... and {left_out} more workers; --json has all", style="dim")]


def _worker_line(worker: WorkerSnapshot) -> Text:
    slots = str(len(worker.slots)) if worker.pack is None else f"{len(worker.slots)}/{worker.pack}"
    line = Text.assemble((f"{worker.host}:{worker.pid}", "bold"), f"  {worker.device}  slots {slots}  ")
    line.append(worker.condition, style=ACTIVITY_STYLES[worker.condition])
    if worker.condition == "silent":
        line.append(f" for {short_time(worker.heard_seconds)}: if it is dead, its lease frees its trials")
    return line


def _slot_lines(worker: WorkerSnapshot, snapshot: Snapshot, width: int, blocks: str) -> list[Text]:
    """A line for each slot: trial, epoch, value, curve."""
    name_width = max((cell_len(slot.name) for slot in worker.slots), default=0)
    lines = []
    for slot in worker.slots:
        again = f" attempt {slot.attempt}" if slot.attempt > 1 else ""
        start = f"  trial {slot.name:>{name_width}} {slot.epoch:>4}/{slot.epochs:<4} {format_value(slot.value):>6}  "
        curve = _curve(slot, snapshot, min(CURVE_WIDTH, width - len(start) - len(again)), blocks)
        lines.append(Text.assemble(start, (curve, "cyan"), (again, "yellow")))
    return lines


def _slots_in_lines(worker: WorkerSnapshot, snapshot: Snapshot, width: int, blocks: str) -> list[Text]:
    """The slots side by side, as short as can be."""
    cells = [
        f"{slot.name} {_curve(slot, snapshot, 6, blocks):<6} {format_value(slot.value):<6}" for slot in worker.slots
    ]
    size = max(map(cell_len, cells), default=0) + 2
    per_line = max(1, (width - 2) // size)
    rows = [cells[start : start + per_line] for start in range(0, len(cells), per_line)]
    return [Text("  " + "".join(f"{cell:<{size}}" for cell in row).rstrip()) for row in rows]


def _curve(slot: SlotView, snapshot: Snapshot, width: int, blocks: str) -> str:
    """All curves have the study's scale; where a trial's ends says how far it is."""
    if snapshot.value_range is None or not slot.curve:
        return ""
    share = slot.epoch / slot.epochs
    return sparkline(slot.curve, max(1, round(min(width, slot.epochs) * share)), snapshot.value_range, blocks)


def _failures(snapshot: Snapshot, shown: int) -> list[Text]:
    lines = [Text(f"stopped: {snapshot.stop_reason}", style="red")] if snapshot.stop_reason is not None else []
    if snapshot.workers_died:
        lines.append(Text(f"{snapshot.workers_died} workers died; their trials went on elsewhere", style="yellow"))
    if len(snapshot.failures) > shown:
        lines.append(Text(f"{len(snapshot.failures)} trials failed, lately:", style="red"))
    for failure in snapshot.failures[-shown:]:
        reason = " ".join(failure.reason.split())
        lines.append(Text(f"trial {failure.name} failed: {reason}", style="red"))
    return lines


def sparkline(values: Sequence[float | None], width: int, limits: tuple[float, float], blocks: str = BLOCKS) -> str:
    """Values as a curve one line high.

    Args:
        values: in order; None leaves a gap.
        width: at most so many letters; of more values each letter shows the mean of a part.
        limits: the lowest and the highest block stand for these.
        blocks: the letters, lowest first.
    """
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count > 0 else []
    low, high = limits
    letters = []
    for start, end in pairwise(edges):
        known = [value for value in values[start:end] if value is not None]
        if not known:
            letters.append(" ")
            continue
        height = 0.0 if high <= low else (sum(known) / len(known) - low) / (high - low)
        letters.append(blocks[min(len(blocks) - 1, max(0, int(height * len(blocks))))])
    return "".join(letters)
