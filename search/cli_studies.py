"""The commands that look after studies: list, clone, retry, clean, delete."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.checkpoints import CheckpointStore
from search.cli_common import (
    AsJson,
    Checkpoints,
    RunsDir,
    Storage,
    StudyName,
    err,
    open_study,
    out,
    print_json,
    runs_folder,
    study_name,
)
from search.database import check_study_name, resolve_storage_url
from search.housekeeping import clean as clean_study
from search.housekeeping import clone as clone_study
from search.housekeeping import delete as delete_study
from search.housekeeping import list_databases, study_databases, study_yaml
from search.housekeeping import retry as retry_trials
from search.ledger import StudyRecord
from search.paths import StudyFolder
from search.report import studies_table

if TYPE_CHECKING:
    from search.housekeeping import CleanReport

app = typer.Typer()


@app.command("list")
def list_(storage: Storage = None, runs_dir: RunsDir = None, as_json: AsJson = False) -> None:
    """Every study with its counts, best value and why it stopped.

    Example: yolosearch list
    """
    rows, problems = list_databases(study_databases(storage, runs_folder(runs_dir)))
    for problem in problems:
        err.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        out.print(studies_table(rows) if rows else "no studies yet", highlight=False)


@app.command()
def clone(
    study: StudyName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of the new study.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The study file; default NEW.yaml.")
    ] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Write the study file of a study like another one, under a new name; `run` then starts it.

    Example: yolosearch clone my-study my-study-2 && yolosearch run my-study-2.yaml
    """
    _, config = open_study(study, storage, runs_dir)
    copy = clone_study(config, check_study_name(new))
    path = output or Path(f"{new}.yaml")
    with path.open("x", encoding="utf-8") as file:
        file.write(study_yaml(copy, f"a clone of study {config.name}, {datetime.now(UTC):%Y-%m-%d}"))
    out.print(f"study file: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def retry(
    study: StudyName,
    trial: Annotated[list[int] | None, typer.Argument(metavar="[TRIAL]...", help="Default all that failed.")] = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> None:
    """Give failed trials another chance: one new ticket for each, with the same parameters.

    Example: yolosearch retry my-study 7 12
    """
    ledger, config = open_study(study, storage, runs_dir)
    added = retry_trials(ledger, config, trial or None)
    text = ", ".join(f"{ticket.retry_of} as {ticket.number}" for ticket in added)
    out.print(f"to be tried again: {text}" if added else "no failed trial to retry", highlight=False)


@app.command()
def clean(
    study: StudyName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how much it would free.")] = False,
    checkpoints: Checkpoints = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete files that nobody needs any more; may run while workers do.

    Example: yolosearch clean my-study --dry-run
    """
    ledger, config = open_study(study, storage, runs_dir)
    runs = runs_folder(runs_dir)
    store = _store(checkpoints, runs, ledger.study(config.name))
    freed = clean_study(ledger, StudyFolder(runs, config.name), store, dry_run=dry_run)
    if as_json:
        print_json(freed.to_json())
    else:
        out.print(_freed(freed, dry_run), highlight=False)


@app.command()
def delete(
    study: StudyName,
    force: Annotated[bool, typer.Option("--force", help="Also while workers hold its trials.")] = False,
    checkpoints: Checkpoints = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a study with its trials and files; MLflow's runs stay.

    Example: yolosearch delete my-study
    """
    ledger, config = open_study(study, storage, runs_dir)
    runs = runs_folder(runs_dir)
    url = resolve_storage_url(storage, runs, study_name(study))
    store = _store(checkpoints, runs, ledger.study(config.name))
    report = delete_study(ledger, url, config.name, runs, store, force=force)
    if as_json:
        print_json({"study": report.study, "trials": report.trials, "freed": report.freed, "kept": list(report.kept)})
        return
    out.print(f"deleted study {report.study}: {report.trials} trials, {_megabytes(report.freed)}", highlight=False)
    for line in report.kept:
        out.print(f"kept: {line}", highlight=False, markup=False, soft_wrap=True)


def _store(checkpoints: str | None, runs: Path, record: StudyRecord) -> CheckpointStore:
    return CheckpointStore(checkpoints or runs, record.name, owner=record.owner)


def _freed(report: CleanReport, dry_run: bool) -> str:
    parts = f"checkpoints {_megabytes(report.checkpoints)}, weights {_megabytes(report.weights)}"
    verb = "would free" if dry_run else "freed"
    return f"{verb} {_megabytes(report.total)}: {parts}, temporary files {_megabytes(report.temporary)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
