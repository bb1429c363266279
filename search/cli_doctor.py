"""The command `doctor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from search.cli_common import (
    AsJson,
    Checkpoints,
    Data,
    RunsDir,
    Storage,
    is_study_file,
    out,
    print_json,
    runs_folder,
    study_name,
)
from search.config import load_study_config
from search.database import STORAGE_URL_VARIABLE, resolve_storage_url
from search.doctor import Finding, Surroundings, examine
from search.errors import EXIT_FAILED

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}

app = typer.Typer()


@app.command()
def doctor(
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="A study, or its YAML, also before it exists.")
    ] = None,
    data: Data = None,
    checkpoints: Checkpoints = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Look at all that a study needs of this host and say what to do; exit code 1 if anything fails.

    Example: yolosearch doctor my-study
    """
    runs = runs_folder(runs_dir)
    planned = load_study_config(Path(study)) if study is not None and is_study_file(study) else None
    name = None if study is None else study_name(study)
    is_named = name is not None or storage or os.environ.get(STORAGE_URL_VARIABLE)
    url = resolve_storage_url(storage, runs, name or "none") if is_named else None
    around = Surroundings(
        runs_dir=runs, storage_url=url, study=name, planned=planned, checkpoints=checkpoints, data=data
    )
    findings = []
    for finding in examine(around):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _print(finding: Finding) -> None:
    line = Text(f"{finding.level:<5}", style=_STYLES[finding.level])
    line.append(f"{finding.name:<16} {finding.detail}", style="default")
    out.print(line, soft_wrap=True)
    if finding.remedy:
        out.print(Text(f"{'':<22}{finding.remedy}", style="dim"), soft_wrap=True)
