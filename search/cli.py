"""The command line: parse, call, print.

What needs torch, Optuna or MLflow is imported inside the commands: `status` and `--help` do not wait for it.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import signal
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.logging import RichHandler

from search import cli_data, cli_studies
from search.cli_common import (
    AsJson,
    RunsDir,
    Storage,
    StudyFile,
    StudyName,
    err,
    open_study,
    out,
    print_json,
    runs_folder,
    study_name,
)
from search.config import StudyConfig, load_study_config
from search.database import mask_url, resolve_storage_url
from search.errors import SearchError, StudyStoppedError, UserInputError
from search.launch.local import LocalLauncher, LocalPlan
from search.launch.mlflow_ui import DEFAULT_HOST, MlflowUi
from search.ledger import Ledger
from search.paths import StudyFolder
from search.report import StudyStatus, comparison_table, headline, live_view, study_status, trials_table
from search.tracking import default_tracking_uri, open_tracker
from search.worker.existing import HANG_SECONDS, OUTAGE_SECONDS, open_existing
from search.worker.lease import DEFAULT_LEASE_SECONDS
from yolocore.errors import InputError, YolocoreError

if TYPE_CHECKING:
    from search.launch.prepare import StudyPlan

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
REFRESH_SECONDS = 1.0

Hang = Annotated[float, typer.Option(min=1, help="Seconds after which a silent trainer is killed.")]

app = typer.Typer(
    name="yolosearch",
    help="Finds the YOLOv5 loss weights for your own data set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_studies.app)
app.add_typer(cli_data.app)


def main() -> None:
    """Entry point: exit code 2 for what the user can fix, 1 for a failed run, and no traceback for either."""
    handler = RichHandler(console=err, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        app()
    except (UserInputError, InputError) as error:
        _exit(error, EXIT_BAD_INPUT)
    except (SearchError, YolocoreError) as error:
        _exit(error, EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        # A folder that cannot be written, a full disk: the system's own words name it best.
        _exit(UserInputError(f"{error.filename}: {error.strerror}"), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _exit(error: Exception, code: int) -> None:
    err.print(mask_url(str(error)), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@app.command()
def check(study: StudyFile, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """Check a study and its data, print the plan, start nothing.

    Example: yolosearch check studies/loss-weights.yaml
    """
    plan = _plan(study, storage, runs_folder(runs_dir))
    if as_json:
        print_json(plan.to_json())
    else:
        _print_plan(plan)


@app.command()
def create(
    study: StudyFile,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="Add N trials to the study's budget.")] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Create a study, or take it up again, for workers that are started elsewhere.

    Example: yolosearch create my-study.yaml && yolosearch worker my-study
    """
    from search.launch.prepare import create_or_resume

    plan = _plan(study, storage, runs_folder(runs_dir))
    created = create_or_resume(plan, _more_trials(trials))
    _print_plan(plan)
    out.print("study created" if created else "study taken up again", style="dim")


@app.command()
def run(
    study: StudyFile,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    device: Annotated[list[str] | None, typer.Option(help="Devices dealt out to the workers, e.g. cuda:0.")] = None,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="Add N trials to the study's budget.")] = None,
    hang: Hang = HANG_SECONDS,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Create a study, or take it up again, and work on it until its budget is spent.

    Example: yolosearch run studies/quickstart.yaml
    """
    from search.launch.prepare import create_or_resume

    runs = runs_folder(runs_dir)
    more = _more_trials(trials)
    plan = _plan(study, storage, runs)
    created = create_or_resume(plan, more)
    if not as_json:
        _print_plan(plan)
        out.print("study created" if created else "study taken up again", style="dim")
    ledger = open_existing(plan.storage_url, plan.config.name, patience=OUTAGE_SECONDS)
    local = LocalPlan(
        storage_url=plan.storage_url,
        folder=plan.folder,
        workers=workers,
        devices=tuple(device or ()),
        timeout=plan.config.timeout,
        hang_seconds=hang,
    )
    if not study_status(ledger, plan.config).finished or ledger.unmirrored(plan.config.name):
        _work(ledger, plan.config, local, quiet=as_json)
    _print_outcome(ledger, plan, study, as_json)


def _work(ledger: Ledger, config: StudyConfig, local: LocalPlan, *, quiet: bool) -> None:
    """Runs local workers to their end, showing the slots; Ctrl-C hands the trials back and ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    live = Live(console=out, refresh_per_second=2, transient=True) if out.is_terminal and not quiet else None
    shown = ""
    with LocalLauncher(local, ledger) as launcher, live or nullcontext():
        try:
            while launcher.poll():
                status = study_status(ledger, config)
                if live is not None:
                    live.update(live_view(status))
                elif not quiet and (line := headline(status, with_eta=False)) != shown:
                    out.print(shown := line, highlight=False)
                time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            err.print("stopping: running trials are handed back; the same command takes them up again")
            raise
    status = study_status(ledger, config)
    if status.stop_reason is not None:
        raise StudyStoppedError(
            f"study {config.name} stopped: {status.stop_reason}; the same command takes it up again once that is mended"
        )
    if launcher.failures and not status.finished:
        failure = "; ".join(launcher.failures)
        raise UserInputError(failure) if launcher.bad_input else SearchError(failure)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@app.command()
def worker(
    study: StudyName,
    device: Annotated[str | None, typer.Option(help="Overrides the study's device on this host.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The data set's YAML, where it lies elsewhere on this host.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which no new trial is claimed; default the study's.")
    ] = None,
    lease: Annotated[float, typer.Option(min=1, help="Seconds after which a silent worker loses its trials.")] = (
        DEFAULT_LEASE_SECONDS
    ),
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            envvar="YOLOSEARCH_CHECKPOINTS",
            help="Checkpoints, where all workers of the study see them; default the runs folder.",
        ),
    ] = None,
    hang: Hang = HANG_SECONDS,
    stop_seconds: Annotated[float, typer.Option(min=0, help="Seconds to end in when asked to by a signal.")] = 10.0,
    worker_id: Annotated[str | None, typer.Option(help="Unique name; default host, process and a random part.")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Work on a study that exists: needs its name and the database's URL only.

    Example: YOLOSEARCH_STORAGE_URL=postgresql://me@db/studies yolosearch worker my-study
    """
    from search.worker.session import WorkerOptions, run_worker

    runs = runs_folder(runs_dir)
    name = study_name(study)
    options = WorkerOptions(
        storage_url=resolve_storage_url(storage, runs, name),
        study=name,
        runs_dir=runs,
        worker_id=worker_id or f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}",
        device=device,
        data=data,
        parent=parent,
        timeout=timeout,
        lease_seconds=lease,
        checkpoints=checkpoints,
        hang_seconds=hang,
        stop_seconds=stop_seconds,
    )
    outcome = run_worker(options)
    out.print(f"{outcome.ended} trials ended here")
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def status(study: StudyName, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """How far a study is: counts, what runs now, best and base.

    Example: yolosearch status quickstart
    """
    _, _, now = _read(study, storage, runs_dir)
    if as_json:
        print_json(now.to_json())
    else:
        out.print(live_view(now))


@app.command()
def trials(study: StudyName, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """Every trial of a study with its parameters.

    Example: yolosearch trials quickstart --json
    """
    _, _, now = _read(study, storage, runs_dir)
    if as_json:
        print_json(now.to_json()["trials"])
    else:
        out.print(trials_table(now))


@app.command()
def export(
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default runs/STUDY/hyp.best.yaml.")
    ] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Write the best trial's hyp as YAML for YOLOv5's train.py --hyp.

    Example: yolosearch export quickstart -o hyp.yaml
    """
    ledger, config, _ = _read(study, storage, runs_dir)
    path = _export(ledger, config, output or StudyFolder(runs_folder(runs_dir), config.name).best_hyp)
    if as_json:
        print_json({"study": config.name, "path": str(path)})
    else:
        out.print(f"best hyp: {path}", highlight=False, soft_wrap=True)


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Print a link to this study.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = DEFAULT_HOST,
    port: Annotated[int | None, typer.Option(help="Default 5000, or a free one where that is taken.")] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Start MLflow's server on the studies' records, on 127.0.0.1 unless told otherwise; Ctrl-C ends it.

    Example: yolosearch ui quickstart
    """
    runs = runs_folder(runs_dir)
    config = None if study is None else _read(study, storage, runs_dir)[1]
    uri = (config.tracking.uri if config is not None else None) or default_tracking_uri(runs)
    with MlflowUi.start(uri, runs, host=host, port=port) as server:
        with out.status("MLflow starts"):
            server.wait_until_healthy()
        address = server.address
        if config is not None:
            tracking = config.tracking
            tracker = open_tracker(enabled=True, uri=uri, runs_dir=runs, experiment=tracking.experiment)
            address = tracker.experiment_url(config.name, address) or address
        out.print(f"MLflow: {address}  (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        server.wait()


def _plan(study: Path, storage: str | None, runs: Path) -> StudyPlan:
    from search.launch.prepare import plan_study

    config = load_study_config(study)
    return plan_study(config, resolve_storage_url(storage, runs, config.name), runs)


def _read(study: str, storage: str | None, runs_dir: Path | None) -> tuple[Ledger, StudyConfig, StudyStatus]:
    """A study that exists, as its database has it now."""
    ledger, config = open_study(study, storage, runs_dir)
    return ledger, config, study_status(ledger, config)


def _more_trials(text: str | None) -> int:
    if text is None:
        return 0
    if not re.fullmatch(r"\+[1-9]\d{0,5}", text):
        raise UserInputError(
            f"--trials: got {text!r}; allowed: +N, for example +20 (the total stands in the study file)"
        )
    return int(text)


def _print_plan(plan: StudyPlan) -> None:
    for name, value in plan.rows():
        out.print(f"{name:<16} {value}", highlight=False, markup=False, soft_wrap=True)
    for notice in plan.notices:
        out.print(f"note: {notice}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _export(ledger: Ledger, config: StudyConfig, path: Path) -> Path:
    from search.export import best_trial, export_best

    return export_best(best_trial(ledger, config), path)


def _print_outcome(ledger: Ledger, plan: StudyPlan, study: Path, as_json: bool) -> None:
    """Ends a `run`: tables, the exported hyp and what to do next."""
    status = study_status(ledger, plan.config)
    path = _export(ledger, plan.config, plan.folder.best_hyp) if status.finished and status.best else None
    if as_json:
        print_json(status.to_json())
        return
    out.print(trials_table(status))
    if path is None:
        why = "no trial is complete" if status.finished else "the same command goes on with the trials that wait"
        out.print(f"{headline(status)} | nothing exported: {why}", highlight=False, markup=False, soft_wrap=True)
        return
    _print_comparison(plan.config, status)
    _print_next_steps(plan, study, path)


def _print_comparison(config: StudyConfig, status: StudyStatus) -> None:
    from search.space import hyperparameters

    base = config.base_hyperparameters()
    best = base if status.best is None else hyperparameters(base, status.best.params)
    out.print(comparison_table(status, base.to_mapping(), best.to_mapping()))


def _command() -> str:
    """How the user called us, to be typed again."""
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m search"
    return "yolosearch" if shutil.which("yolosearch") else sys.argv[0]


def _print_next_steps(plan: StudyPlan, study: Path, path: Path) -> None:
    lines = [
        f"best hyp:        {path}",
        f"train with it:   python train.py --hyp {path} ...   (in your YOLOv5 checkout)",
        f"look at it:      {_command()} ui {plan.config.name}",
        f"go on searching: {_command()} run {study} --trials +20",
    ]
    if plan.config.builtin_data is not None:
        lines.append("your own data:   copy studies/loss-weights.yaml, set `data:` to your data set YAML, and run it")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
