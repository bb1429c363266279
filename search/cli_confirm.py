"""The commands that train known hyperparameters again: noise, confirm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search.cli_common import (
    AsJson,
    RunsDir,
    Storage,
    StudyName,
    is_study_file,
    out,
    print_json,
    print_line,
    runs_folder,
)
from search.cli_launch import Job, create_job, existing_job, launch_plan, work
from search.config import CONFIRM_TOP, MOST_RERUN_SEEDS, RERUN_SEEDS, StudyConfig
from search.confirm import (
    CLASS_AP,
    SHOWN_GAINS,
    TEST,
    VALIDATION,
    ConfirmReport,
    Judgement,
    NoiseReport,
    add_noise,
    ask_confirmation,
    confirm_report,
    noise_report,
    percent,
)
from search.errors import SearchError
from search.launch.launcher import WorkerView
from search.launch.local import LocalLauncher
from search.ledger import CONFIRM, NOISE, Ledger, Ticket, TicketState
from search.paths import data_on_this_host
from search.report import StudyStatus, new_table
from search.statistics import Comparison, Spread, detectable_gain
from yolocore.text import one_line

SMALLEST_P = 0.001
"""Below it the digits say nothing that matters."""
SPLIT_NAMES = {VALIDATION: "validation split", TEST: "test split"}

app = typer.Typer()

Workers = Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")]
Devices = Annotated[list[str] | None, typer.Option("--device", help="Devices dealt out to the workers, e.g. cuda:0.")]
NoTrain = Annotated[bool, typer.Option("--no-train", help="Only add the tickets, for workers that run elsewhere.")]
Seeds = Annotated[
    int | None,
    typer.Option(min=2, max=MOST_RERUN_SEEDS, help=f"Seeds, other ones than the search's; default {RERUN_SEEDS}."),
]


@app.command()
def noise(
    study: StudyName,
    seeds: Seeds = None,
    workers: Workers = 1,
    device: Devices = None,
    no_train: NoTrain = False,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Train the base on several seeds: how far apart are equal trainings, and which gain could be told from that?

    STUDY is a study that exists, or a file, whose study is created first. With no training left it only prints; more
    seeds add to those that are there.

    Example: yolosearch noise my-study --seeds 5
    """
    runs = runs_folder(runs_dir)
    is_file = is_study_file(study)
    job = (
        create_job(Path(study), None, storage, runs, as_json, noise_seeds=seeds or RERUN_SEEDS)
        if is_file
        else existing_job(study, storage, runs)
    )
    known = job.ledger.tickets(job.config.name, (NOISE,))
    if seeds is not None or not known:
        add_noise(job.ledger, job.config, seeds or RERUN_SEEDS)
    _train(job, NOISE, workers, device, no_train=no_train, quiet=as_json)
    report = noise_report(job.ledger, job.config)
    if as_json:
        print_json(report.to_json())
    else:
        _print_noise(report)


@app.command()
def confirm(
    study: StudyName,
    top: Annotated[
        int | None, typer.Option(min=1, max=20, help=f"So many of the best trials; default {CONFIRM_TOP}.")
    ] = None,
    seeds: Seeds = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training; default the study's.")] = None,
    gain: Annotated[
        float | None, typer.Option(min=1e-6, help="Say how many seeds would find a gain of this size.")
    ] = None,
    workers: Workers = 1,
    device: Devices = None,
    no_train: NoTrain = False,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Train the base and the best trials again on the same seeds, and say which are really better.

    Called again it goes on; more seeds, or a larger --top, add to what is there. Without options it shows, or finishes,
    the confirmation that was asked for last.

    Example: yolosearch confirm my-study --top 3 --seeds 5
    """
    job = existing_job(study, storage, runs_folder(runs_dir))
    length = ask_confirmation(job.ledger, job.config, top, seeds, epochs)
    _train(job, CONFIRM, workers, device, no_train=no_train, quiet=as_json)
    report = confirm_report(job.ledger, job.config, length)
    if as_json:
        print_json(report.to_json())
    else:
        _print_confirmation(report, _class_names(job.config, job.folder.runs_dir), gain)


def _train(job: Job, kind: str, workers: int, devices: Sequence[str] | None, *, no_train: bool, quiet: bool) -> None:
    """Works on the tickets of one kind until none is left."""
    if no_train or not job.has_work((kind,)):
        return
    plan = replace(launch_plan(job), workers=workers, devices=tuple(devices or ()), timeout=None, only=kind)
    screen = RerunScreen(job.ledger, job.config, kind)
    work(job, LocalLauncher(plan, job.ledger), screen, quiet=quiet, kinds=(kind,))


class RerunScreen:
    """The reruns that train now."""

    def __init__(self, ledger: Ledger, config: StudyConfig, kind: str) -> None:
        self._ledger = ledger
        self._config = config
        self._kind = kind
        self._shown = ""

    def view(self, status: StudyStatus, workers: Sequence[WorkerView]) -> RenderableType:  # noqa: ARG002
        """A table of them, and how many there are."""
        tickets = self._ledger.tickets(self._config.name, (self._kind,))
        table = new_table(f"{self._kind} of {self._config.name}", "run", "trial", "seed", "epoch")
        for ticket in tickets:
            if ticket.state is TicketState.RUNNING:
                done = f"{ticket.epochs_done}/{ticket.epochs}"
                table.add_row(str(ticket.number), _who(ticket), str(ticket.seed), done)
        return Group(table, Text(_counted(self._kind, tickets)))

    def lines(self, status: StudyStatus, workers: Sequence[WorkerView]) -> Iterator[str]:  # noqa: ARG002
        """The counts when they change."""
        line = _counted(self._kind, self._ledger.tickets(self._config.name, (self._kind,)))
        if line != self._shown:
            self._shown = line
            yield line


def _who(ticket: Ticket) -> str:
    return "base" if not ticket.candidate else str(ticket.candidate)


def _counted(kind: str, tickets: Sequence[Ticket]) -> str:
    states = [ticket.state for ticket in tickets]
    counts = [(state, states.count(state)) for state in dict.fromkeys(states)]
    return f"{kind}: {', '.join(f'{count} {state.lower()}' for state, count in counts)}"


# ---- noise -----------------------------------------------------------------------------------------------------------


def _print_noise(report: NoiseReport) -> None:
    if report.spread is None:
        print_line(f"nothing to say yet: {report.done} of {report.asked} reruns of the base are complete, 2 are needed")
    else:
        count = f"{report.done} of {report.asked} seeds"
        print_line(f"noise of {report.study}: {report.objective}, {count}, {report.epochs} epochs")
        out.print(_noise_table(report.spread))
        print_line(
            f"A rerun of the base gives {report.spread.mean:.4f} on average, with a standard deviation of "
            f"{report.spread.sd:.4f} (between {report.sd_low:.4f} and {report.sd_high:.4f}, with 95 %)."
        )
        print_line("smallest gain that `confirm` finds with a chance of 80 %:")
        out.print(_gains_table(report))
    for reason in report.failures:
        print_line(f"a rerun failed: {reason}", style="red")


def _noise_table(spread: Spread) -> Table:
    table = _table("run", "value")
    for number, value in enumerate(spread.values, start=1):
        table.add_row(str(number), f"{value:.4f}")
    return table


def _table(*columns: str) -> Table:
    """Without a title, which would be wrapped to the table's width."""
    table = new_table("", *columns)
    table.title = None
    return table


def _gains_table(report: NoiseReport) -> Table:
    counts = list(next(iter(report.detectable.values())))
    columns = [f"{count} candidate{'s' if count > 1 else ''}" for count in counts]
    table = _table("seeds", *columns)
    for seeds, gains in report.detectable.items():
        table.add_row(str(seeds), *(f"{gain:.4f}" for gain in gains.values()))
    return table


# ---- confirmation ----------------------------------------------------------------------------------------------------


def _print_confirmation(report: ConfirmReport, names: Sequence[str], gain: float | None) -> None:
    for split in (VALIDATION, TEST):
        judgements = [one for one in report.judgements if one.split == split]
        if judgements:
            where = f"{SPLIT_NAMES[split]}, {len(report.seeds)} seeds, {report.epochs} epochs"
            print_line(f"confirmation of {report.study}, {where}")
            out.print(_split_table(report, judgements, names))
    if report.decisive is not None:
        print_line(
            f"from, to: the true gains of all candidates lie above their `from` with {percent(report.confidence)}, "
            "and below their `to` likewise"
        )
    _print_failures(report)
    print_line(report.verdict(), style="bold")
    if report.decisive is not None:
        _print_power(report, gain)
    _print_doubt(report)


def _print_failures(report: ConfirmReport) -> None:
    for one in report.base_failures:
        print_line(f"seed {one.seed} compares nothing, the base failed on it: {one.reason}", style="red")
    for candidate in report.candidates:
        if candidate.failure is not None:
            print_line(f"{candidate.name} is not compared, a rerun of it failed: {candidate.failure}", style="red")
    if report.failures and not report.is_stuck:
        print_line(f"`{report.again}` trains again what failed", style="red")


def _split_table(report: ConfirmReport, judgements: Sequence[Judgement], names: Sequence[str]) -> Table:
    table = _table("base", "against", "gain", "from", "to", "p", "verdict")
    table.columns[0].justify = table.columns[-1].justify = "left"
    for one in judgements:
        label = _label(one.measure, report, names)
        for index, entry in enumerate(one.result.comparisons):
            table.add_row(f"{label} {one.result.base.mean:.4f}" if index == 0 else "", *_cells(entry))
        table.add_section()
    return table


def _cells(entry: Comparison) -> list[RenderableType]:
    styles = {"better": "green", "worse": "red"}
    numbers = [f"{value:+.4f}" for value in (entry.gain, entry.low, entry.high)]
    # Short, so that the table fits 80 columns.
    shown = "none shown" if entry.verdict == "no difference shown" else entry.verdict
    verdict = Text(shown, style=styles.get(entry.verdict, "dim"))
    p_value = f"{entry.p_value:.3f}" if entry.p_value >= SMALLEST_P else f"<{SMALLEST_P}"
    return [entry.candidate, *numbers, p_value, verdict]


def _label(measure: str, report: ConfirmReport, names: Sequence[str]) -> str:
    if measure.startswith(CLASS_AP):
        index = int(measure.removeprefix(CLASS_AP))
        return f"AP {one_line(names[index]) if index < len(names) else index}"
    return report.objective.removesuffix(" at the last epoch") if measure == "objective" else measure


def _print_power(report: ConfirmReport, gain: float | None) -> None:
    """What this confirmation could have found, and what a finer one would take."""
    result = report.decisive
    assert result is not None
    smallest = detectable_gain(result.noise, result.seeds, len(result.comparisons))
    print_line(
        f"noise of one run, the seeds' own part taken out: {result.noise:.4f}; "
        f"a true gain of {smallest:.4f} is found with a chance of 80 %"
    )
    needed = report.seeds_for(SHOWN_GAINS if gain is None else (gain,))
    texts = [f"{value:g}: {'over 1000' if seeds is None else seeds}" for value, seeds in needed.items()]
    print_line(f"seeds that find a gain of ... with that chance: {', '.join(texts)}")


def _print_doubt(report: ConfirmReport) -> None:
    if (looks := report.looks_in_words()) is not None:
        print_line(f"note: {looks}", style="yellow")
    winner = report.winner
    test = None if winner is None else report.comparison(winner.number, TEST)
    if winner is not None and test is not None and test.verdict != "better":
        print_line(f"note: on the test split {winner.name}: {test.verdict} ({test.gain:+.4f})", style="yellow")


def _class_names(config: StudyConfig, runs_dir: Path) -> Sequence[str]:
    """As the data set says; empty where it is not on this host."""
    from yolocore.data.dataset import load_dataset_config
    from yolocore.errors import InputError

    try:
        data = (
            data_on_this_host(config.data_path(runs_dir)) if config.builtin_data is None else config.data_path(runs_dir)
        )
        return load_dataset_config(data, single_class=config.train.single_cls).names
    except (InputError, SearchError, OSError):
        return ()
