"""The table of workers: what it joins, and that it fits where it is shown."""

import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from search.cli_live import WorkerScreen, launch_view, numbers
from search.launch.launcher import WorkerPhase, WorkerView
from search.launch.live import Pace, WorkerLine, worker_lines
from search.prepared import Prepared
from search.report import StudyStatus, TrialStatus

NOW = 1_000_000.0


def trial(
    number: int, worker: str | None, state: str = "RUNNING", epoch: int = 3, ago: float | None = 4.0
) -> TrialStatus:
    return TrialStatus(
        number=number,
        ticket=number,
        state=state,
        epoch=epoch,
        epochs=15,
        value=0.25,
        params={},
        attempt=1,
        worker=worker,
        reason=None,
        seconds=9.0,
        reported_at=None if ago is None else NOW - ago,
    )


def status(trials: Sequence[TrialStatus], devices: dict[str, str]) -> StudyStatus:
    return StudyStatus(
        study="tiny",
        counts={"RUNNING": len(trials), "WAITING": 2},
        trials=tuple(trials),
        workers=len(devices),
        devices=devices,
        packs={},
        best=None,
        base=None,
        slot_epochs=sum(trial.epoch for trial in trials),
        eta_seconds=130.0,
        stop_reason=None,
        unsent=0,
        precisions=("fp32",),
        prepared=Prepared(),
    )


def view(index: int, phase: WorkerPhase = "runs", place: str = "", restarts: int = 0) -> WorkerView:
    return WorkerView(
        index=index,
        worker_id=f"h-1-{index}.{restarts}",
        phase=phase,
        pid=4_000_000 + index if phase == "runs" else None,
        place=place,
        restarts=restarts,
        log=f"/home/somebody/runs/tiny/logs/a-rather-long-host-name.example-4000000-{index}.log",
    )


def test_worker_lines_join_the_launcher_with_the_ledger() -> None:
    trials = [
        trial(0, "h-1-0.0"),
        trial(1, "h-1-0.0", epoch=5, ago=2.0),
        trial(2, "h-1-1.0", "COMPLETE"),
        trial(3, "x"),
    ]
    views = [view(0), view(1), view(2), view(3, "waits", restarts=2)]

    lines = worker_lines(views, status(trials, {"h-1-0.0": "cpu fp32", "h-1-1.0": "cuda:0 bf16"}), NOW)

    assert [line.activity for line in lines] == ["trains", "idle", "starts", "waits"]
    assert [line.place for line in lines] == ["cpu", "cuda:0", "", ""]
    assert (lines[0].trials, lines[0].epoch, lines[0].epochs, lines[0].reported_seconds) == ((0, 1), 5, 15, 2.0)
    assert (lines[1].trials, lines[1].epoch, lines[1].reported_seconds) == ((), None, None)
    assert (lines[3].pid, lines[3].restarts) == (None, 2)


def test_pace_counts_epochs_per_minute_of_the_last_ten_minutes() -> None:
    pace = Pace()
    assert pace.per_minute is None
    pace.add(100, now=0.0)
    assert pace.per_minute is None
    pace.add(110, now=30.0)
    assert pace.per_minute == pytest.approx(20.0)
    for minute in range(1, 40):
        pace.add(110 + minute, now=30.0 + 60.0 * minute)
    assert pace.per_minute == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "text"), [((), ""), ((4,), "4"), ((0, 1, 2, 7), "0-2,7"), ((9, 3, 4), "3-4,9"), ((1, 3, 5), "1,3,5")]
)
def test_numbers_joins_neighbours(values: tuple[int, ...], text: str) -> None:
    assert numbers(values) == text


def shown(lines: Sequence[WorkerLine], now: StudyStatus, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(launch_view(now, lines, 12.34))
    return capture.get()


def test_launch_view_fits_80_columns_with_everything_long() -> None:
    trials = [
        trial(number, f"h-1-{number % 3}.{7 * (number % 3 == 1)}", epoch=100, ago=4000.0) for number in range(90, 114)
    ]
    views = [view(0, place="gpu 10"), view(1, place="gpu GPU-5d34", restarts=7), view(2), view(3, "given up")]
    now = status(trials, {"h-1-0.0": "cuda:0", "h-1-1.7": "cuda:0", "h-1-2.0": "cuda:0"})

    text = shown(worker_lines(views, now, NOW), now, 80)

    rows = text.splitlines()
    assert max(map(len, rows)) <= 80
    first = next(row for row in rows if "4000000" in row and "trains" in row)
    assert re.search(r"^ *0 +4000000 +gpu 10 +trains +90,93,96,9… +100/15 +67 min +\*e-4000000-0\.log", first)
    assert re.search(r"1 +4000001 +gpu GPU-… +trains +7 ", text)
    assert "given up" in text
    assert "12.3 epochs/min | about 2 min 10 s left" in text
    assert "logs in /home/somebody/runs/tiny/logs" in text


def test_worker_screen_lines_tell_only_what_is_new() -> None:
    screen, now = WorkerScreen(), status([trial(0, "h-1-0.0")], {"h-1-0.0": "cpu"})

    first = list(screen.lines(now, [view(0, place="cpu")]))
    again = list(screen.lines(now, [view(0, place="cpu")]))
    dead = list(screen.lines(now, [view(0, "waits", place="cpu")]))

    assert first[0].startswith("worker 0 (cpu, pid 4000000) runs; log: /home/somebody/")
    assert first[1:] == ["1 running, 2 waiting"]
    assert again == []
    assert [line.partition(";")[0] for line in dead] == ["worker 0 (cpu) waits"]
