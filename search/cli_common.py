"""What the command modules share: consoles, options, how a study is found, and how an error is told."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from search.config import StudyConfig, load_study_config
from search.database import check_study_name, resolve_storage_url
from search.errors import UserInputError
from search.ledger import Ledger
from search.paths import default_runs_dir
from search.report import StudyStatus, study_status
from search.tracking import mask_secrets
from search.worker.existing import open_existing, refuse_shared_database

if TYPE_CHECKING:
    from search.launch.prepare import StudyPlan

# What is printed holds names and paths of the user's: "[/x]" is no markup in them, and ":cat:" no picture.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


def complete_study(incomplete: str) -> list[str]:
    """For the shell: studies with a database in the runs folder, and study files here."""
    names = sorted(path.parent.name for path in default_runs_dir().glob("*/study.db"))
    files = sorted(str(path) for path in Path().glob("*.y*ml"))
    return [name for name in (*names, *files) if name.startswith(incomplete)]


StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)]
StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="Name of the study, or its YAML.", show_default=False, autocompletion=complete_study
    ),
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Database; default $YOLOSEARCH_STORAGE_URL or runs/STUDY/study.db."),
]
RunsDir = Annotated[
    Path | None,
    typer.Option(
        "--runs-dir", metavar="DIR", help="Where everything is written; default $YOLOSEARCH_RUNS_DIR or runs."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
MoreTrials = Annotated[str | None, typer.Option("--trials", metavar="+N", help="Add N trials to the study's budget.")]
Checkpoints = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL",
        envvar="YOLOSEARCH_CHECKPOINTS",
        help="Checkpoints, where all workers of the study see them; default the runs folder.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="The data set's YAML, where it lies elsewhere on this host; see also $YOLOSEARCH_DATA_ROOT."),
]


def runs_folder(runs_dir: Path | None) -> Path:
    """The folder for everything that is written, absolute."""
    return (runs_dir or default_runs_dir()).resolve()


def is_study_file(study: str) -> bool:
    """Whether a study is given by its YAML file, not by its name."""
    return study.endswith((".yaml", ".yml"))


def study_name(study: str) -> str:
    """A study's name, also given by its YAML file."""
    return load_study_config(Path(study)).name if is_study_file(study) else check_study_name(study)


def open_study(
    study: str, storage: str | None, runs_dir: Path | None, patience: float = 60.0
) -> tuple[Ledger, StudyConfig]:
    """A study that exists; its ledger retries for `patience` seconds while the database is away."""
    name = study_name(study)
    ledger = open_existing(resolve_storage_url(storage, runs_folder(runs_dir), name), name, patience)
    ledger.check_schema()
    return ledger, StudyConfig.from_json(ledger.study(name).config)


def read_study(study: str, storage: str | None, runs_dir: Path | None) -> tuple[Ledger, StudyConfig, StudyStatus]:
    """A study that exists, as its database has it now."""
    ledger, config = open_study(study, storage, runs_dir)
    return ledger, config, study_status(ledger, config)


def plan_of(study: Path, storage: str | None, runs: Path, data: Path | None = None, noise_seeds: int = 0) -> StudyPlan:
    """A study file, checked against its data (`data`: where its YAML lies on this host) and this host."""
    config = load_study_config(study)
    url = resolve_storage_url(storage, runs, config.name)
    # Before torch is imported, which takes seconds.
    refuse_shared_database(config, url, runs)
    from search.launch.prepare import plan_study

    return plan_study(config, url, runs, data, noise_seeds)


def more_trials(text: str | None) -> int:
    """The number in `--trials +N`."""
    if text is None:
        return 0
    if not re.fullmatch(r"\+[1-9]\d{0,5}", text):
        raise UserInputError(
            f"--trials: got {text!r}; allowed: +N, for example +20 (the total stands in the study file)"
        )
    return int(text)


def print_plan(plan: StudyPlan) -> None:
    """The plan as lines of name and value, then what the user should know."""
    for name, value in plan.rows():
        print_line(f"{name:<16} {value}")
    for notice in plan.notices:
        print_line(f"note: {notice}", style="yellow")


def print_line(text: str, style: str | None = None, *, to: Console = out) -> None:
    """Text as it is: neither coloured, nor read as markup, nor wrapped."""
    to.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_error(error: Exception | str) -> None:
    """One line on standard error, passwords masked."""
    print_line(mask_secrets(str(error)), style="red", to=err)


def print_json(data: object) -> None:
    """JSON on standard output, unwrapped and uncoloured."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
