"""What the command modules share: consoles, options, and how a study is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search.config import StudyConfig, load_study_config
from search.database import check_study_name, resolve_storage_url
from search.ledger import Ledger
from search.paths import default_runs_dir
from search.worker.existing import open_existing

out = Console()
err = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study, or its YAML.", show_default=False)]
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


def runs_folder(runs_dir: Path | None) -> Path:
    """The folder for everything that is written, absolute."""
    return (runs_dir or default_runs_dir()).resolve()


def study_name(study: str) -> str:
    """A study's name, also given by its YAML file."""
    if study.endswith((".yaml", ".yml")):
        return load_study_config(Path(study)).name
    return check_study_name(study)


def open_study(study: str, storage: str | None, runs_dir: Path | None) -> tuple[Ledger, StudyConfig]:
    """A study that exists."""
    name = study_name(study)
    ledger = open_existing(resolve_storage_url(storage, runs_folder(runs_dir), name), name)
    ledger.check_schema()
    return ledger, StudyConfig.from_json(ledger.study(name).config)


def print_json(data: object) -> None:
    """JSON on standard output, unwrapped and uncoloured."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
