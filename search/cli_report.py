"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.cli_common import AsJson, Data, RunsDir, Storage, StudyName, open_study, print_json, print_line, runs_folder
from search.config import StudyConfig
from search.errors import SearchError, UserInputError
from search.ledger import Ledger
from search.paths import StudyFolder

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
    from search.page import Review, report_page
    from search.review import read_study_data

    ledger, config = open_study(study, storage, runs_dir)
    runs = runs_folder(runs_dir)
    review = Review.of(read_study_data(ledger, config, _class_names(config, runs, data)))
    path = output or StudyFolder(runs, config.name).root / "report.html"
    _write(path, report_page(review, _hyp_text(ledger, config)))
    if as_json:
        missing = {plot.key: plot.missing for plot in review.plots if plot.missing is not None}
        found = review.found
        print_json(
            {
                "study": config.name,
                "path": str(path),
                "standing": found.standing,
                "verdict": found.verdict,
                "left_out": missing,
            }
        )
        return
    print_line(review.found.verdict)
    print_line(f"report: {path}")


def _class_names(config: StudyConfig, runs: Path, data: Path | None) -> tuple[str, ...]:
    """The data set's class names; none where it is not on this host."""
    from search.worker.session import data_yaml
    from yolocore.data.dataset import load_dataset_config
    from yolocore.errors import InputError

    try:
        return load_dataset_config(data or data_yaml(config, runs), single_class=config.train.single_cls).names
    except (InputError, SearchError, OSError):
        return ()


def _hyp_text(ledger: Ledger, config: StudyConfig) -> str | None:
    from search.export import best_trial, header

    try:
        best = best_trial(ledger, config)
    except UserInputError:
        return None
    return best.hyperparameters.to_yaml(header(best))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserInputError(
            f"{path}: cannot be written: {error.strerror}; allowed: a path in a writable folder"
        ) from None
