"""The command `report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from search.api import Study, write_report
from search.cli_common import AsJson, Data, RunsDir, Storage, StudyName, print_json, print_line, study_name

app = typer.Typer()


@app.command()
def report(
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default runs/STUDY/report.html.")
    ] = None,
    data: Data = None,
    storage: Storage = None,
    runs_dir: RunsDir = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a study: verdict, plots, cost, the hyp file. Needs no network to be read.

    Example: yolosearch report quickstart -o report.html
    """
    opened = Study.open(study_name(study), storage=storage, runs_dir=runs_dir)
    review = opened.review(data)
    path = write_report(opened, review, output or opened.folder.root / "report.html")
    if as_json:
        missing = {plot.key: plot.missing for plot in review.plots if plot.missing is not None}
        found = review.found
        print_json(
            {
                "study": opened.name,
                "path": str(path),
                "standing": found.standing,
                "verdict": found.verdict,
                "front": [asdict(trial) for trial in found.front],
                "left_out": missing,
            }
        )
        return
    print_line(review.found.verdict)
    print_line(f"report: {path}")
