"""The command line: parse, call, print.

What needs torch, Optuna or MLflow is imported inside the commands: `status` and `--help` do not wait for it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from search import (
    cli_confirm,
    cli_dashboard,
    cli_data,
    cli_doctor,
    cli_import,
    cli_init,
    cli_launch,
    cli_report,
    cli_stop,
    cli_studies,
    cli_watch,
)
from search.api import Study
from search.cli_common import (
    AsJson,
    Checkpoints,
    MoreTrials,
    RunsDir,
    Storage,
    StudyFile,
    StudyName,
    err,
    more_trials,
    open_study,
    out,
    plan_of,
    print_error,
    print_json,
    print_line,
    print_plan,
    read_study,
    runs_folder,
    study_name,
)
from search.confirm import latest_confirmation
from search.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, SearchError
from search.launch.mlflow_ui import DEFAULT_HOST, MlflowUi
from search.paths import ExportFormat
from search.report import StudyRows, epochs_enough, status_view, sum_up, trials_table
from search.tracking import default_tracking_uri, mask_secrets, open_tracker
from yolocore.errors import InputError, YolocoreError

if TYPE_CHECKING:
    from search.formats import Exported, ExportRequest

PANELS = {
    "Begin": ("init", "data", "check", "doctor", "schema", "import"),
    "Run": ("run", "launch", "create", "worker", "stop", "resume"),
    "Look": ("watch", "status", "trials", "report", "ui", "dashboard"),
    "Decide": ("noise", "confirm", "export"),
    "Look after": ("list", "clone", "retry", "clean", "delete"),
}
"""Every command, under the heading and in the order in which `--help` shows it."""


class _Panels(TyperGroup):
    """Commands under headings. Typer's own panels are drawn by rich only, as boxes, which plain help does without."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return [name for names in PANELS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        for title, names in PANELS.items():
            rows = [(f"{name:<{width}}", self.commands[name].get_short_help_str(limit)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    name="yolosearch",
    cls=_Panels,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"yolosearch {importlib.metadata.version('yolosearch')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Finds the YOLOv5 loss weights for your own data set."""


class _MaskingHandler(RichHandler):
    """Log records on standard error, their tracebacks too, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody has caught, without the passwords that its text may hold."""
    sys.stderr.write(mask_secrets("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Entry point: an exit code for each way to end, and no traceback for what the user can mend."""
    handler = _MaskingHandler(console=err, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    sys.excepthook = _print_masked
    # What workers have to tell goes into their logs: the packs that they measured, why the study stopped.
    for name in ("search.worker", "search.stopping"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        app()
    except SearchError as error:
        _exit(error, error.exit_code)
    except YolocoreError as error:
        _exit(error, EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        # A folder that cannot be written, a full disk: the system's own words name it best.
        _exit(f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _exit(error: Exception | str, code: int) -> None:
    print_error(error)
    sys.exit(code)


app.add_typer(cli_init.app)
app.add_typer(cli_import.app)


@app.command()
def check(
    study: StudyFile,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few steps to say how long it will take: a minute or two.")
    ] = False,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a study and its data, print the plan with what it will cost, start nothing.

    Example: yolosearch check studies/loss-weights.yaml --measure
    """
    plan = plan_of(study, storage, runs_folder(runs_dir))
    if measure:
        from search.launch.prepare import with_measured_speed

        plan = with_measured_speed(plan)
    if as_json:
        print_json(plan.to_json())
    else:
        print_plan(plan)


@app.command()
def create(study: StudyFile, trials: MoreTrials = None, storage: Storage = None, runs_dir: RunsDir = None) -> None:
    """Create a study, or take it up again, for workers that are started elsewhere.

    Example: yolosearch create my-study.yaml && yolosearch worker my-study
    """
    plan = plan_of(study, storage, runs_folder(runs_dir))
    from search.launch.prepare import create_or_resume

    created = create_or_resume(plan, more_trials(trials))
    print_plan(plan)
    print_line("study created" if created else "study taken up again", style="dim")


app.add_typer(cli_launch.app)
app.add_typer(cli_confirm.app)
app.add_typer(cli_watch.app)


@app.command()
def status(study: StudyName, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """How far a study is: counts, what runs, best and base, what is confirmed, when it is done, if less would do.

    Example: yolosearch status quickstart
    """
    ledger, config = open_study(study, storage, runs_dir)
    rows = StudyRows.read(ledger, config.name)
    now, curves = sum_up(rows, config), epochs_enough(rows, config)
    report = latest_confirmation(ledger, config)
    verdict = None if report is None else report.verdict()
    if as_json:
        print_json({**now.to_json(), "short_against_full": curves.to_json(), "confirmation": verdict})
    else:
        out.print(status_view(now, curves, datetime.now().astimezone(), verdict))


@app.command()
def trials(study: StudyName, storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """Every trial of a study with its parameters.

    Example: yolosearch trials quickstart --json
    """
    _, _, now = read_study(study, storage, runs_dir)
    if as_json:
        print_json(now.to_json()["trials"])
    else:
        out.print(trials_table(now))


@app.command()
def export(
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default hyp.best.yaml in runs/STUDY.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write that trial's trained weights: .safetensors, or .pt (state dict)."
        ),
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Write this trial's, whatever was confirmed.")] = None,
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="yolov5: hyp YAML; ultralytics: what means the same in YOLOv8 and newer; json: all that is known.",
        ),
    ] = ExportFormat.YOLOV5,
    pareto: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Of several objectives: trial N of the Pareto front, or all of it."),
    ] = None,
    checkpoints: Checkpoints = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Write a hyp YAML for YOLOv5's train.py --hyp: the confirmed winner's, or the best trial's, unconfirmed.

    Where a confirmation found no winner, the base's.

    Example: yolosearch export quickstart -o hyp.yaml --weights best.safetensors
    """
    from search.formats import ExportRequest, export_trials

    opened = Study.open(study_name(study), storage=storage, runs_dir=runs_dir)
    asked = ExportRequest(path=output, trial=trial, form=form, pareto=pareto, weights=weights)
    written = export_trials(opened.ledger, opened.config, opened.folder, asked, checkpoints or opened.runs_dir)
    if as_json:
        print_json(_exported_json(opened.name, asked, written))
        return
    for one in written:
        if one.best.verdict is not None:
            print_line(one.best.verdict)
        what = "best hyp" if pareto is None else f"hyp of trial {one.best.trial_number}"
        print_line(f"{what}: {one.path}")
    if weights is not None:
        print_line(f"its weights: {weights}")


def _exported_json(study: str, asked: ExportRequest, written: Sequence[Exported]) -> dict[str, object]:
    if asked.pareto is not None:
        told: dict[str, object] = {"paths": {str(one.best.trial_number): str(one.path) for one in written}}
    else:
        (one,) = written
        told = {"path": str(one.path), "trial": one.best.trial_number, "verdict": one.best.verdict}
    return {"study": study, **told, **({} if asked.weights is None else {"weights": str(asked.weights)})}


app.add_typer(cli_dashboard.app)


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
    config = None if study is None else read_study(study, storage, runs_dir)[1]
    uri = (config.tracking.uri if config is not None else None) or default_tracking_uri(runs)
    with MlflowUi.start(uri, runs, host=host, port=port) as server:
        with out.status("MLflow starts"):
            server.wait_until_healthy()
        address = server.address
        if config is not None:
            tracking = config.tracking
            tracker = open_tracker(enabled=True, uri=uri, runs_dir=runs, experiment=tracking.experiment)
            address = tracker.experiment_url(config.name, address) or address
        print_line(f"MLflow: {address}  (Ctrl-C ends it)")
        server.wait()


app.add_typer(cli_report.app)
app.add_typer(cli_studies.app)
app.add_typer(cli_stop.app)
app.add_typer(cli_data.app)
app.add_typer(cli_doctor.app)
