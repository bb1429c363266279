"""The commands around study files: init, schema."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli_common import err, out, print_line
from search.database import check_study_name
from search.errors import UserInputError
from search.schema import SCHEMA_FILE, schema_text
from yolocore.errors import WEIGHTS_SOURCE

if TYPE_CHECKING:
    from search.starter import Wishes
    from yolocore.data.check import DatasetReport

REPORTED_SIZE = 640
SHOWN_ERRORS = 10

app = typer.Typer()


class Model(StrEnum):
    """Sizes of YOLOv5."""

    N = "n"
    S = "s"
    M = "m"
    L = "l"
    X = "x"


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA.yaml", help="A YOLO data set YAML, or its folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The study file; default NAME.yaml.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The study's name; default the study file's, or the data set's.")
    ] = None,
    model: Annotated[Model | None, typer.Option(help="Size of YOLOv5; default n.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Start weights, .pt or .safetensors; default none.")] = None,
    image_size: Annotated[int | None, typer.Option(min=32, help="Pixels, a multiple of 32.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of a trial that is not pruned.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; the data decides what no option says.")] = False,
    schema: Annotated[bool, typer.Option(help="Also write the schema, with which editors complete keys.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Write over files that exist.")] = False,
) -> None:
    """Write a study file for a data set, with image size, epochs and ranges from what the data shows.

    On a terminal it asks what no option says; a bare Enter takes what the data suggests.

    Example: yolosearch init my-data.yaml --weights yolov5n.pt -o my-study.yaml
    """
    from search.starter import Wishes, study_name_of

    report = _examined(data)
    suggested = study_name_of(report.source if output is None else output)
    wishes = Wishes(
        name=check_study_name(name or suggested),
        model=(model or Model.N).value,
        weights=_existing(weights),
        image_size=image_size,
        batch_size=batch_size,
        epochs=epochs,
        trials=trials,
    )
    if not yes and sys.stdin.isatty() and out.is_terminal:
        wishes = _asked(report, wishes, {"model": model is None, "weights": weights is None})
    path = output or Path(f"{wishes.name}.yaml")
    _write(path, report, wishes, with_schema=schema, force=force)
    _print_next(path, report, wishes)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of study files, with which editors complete and check them.

    Example: yolosearch schema > study.schema.json
    """
    sys.stdout.write(schema_text())


def _print_next(path: Path, report: DatasetReport, wishes: Wishes) -> None:
    """What was written, and what comes next."""
    print_line(f"study file: {path}  (the study is called {wishes.name})")
    _warn_without_gpu(report, wishes)
    print_line(f"next:       yolosearch check {path} --measure   (what it will do, and how long it takes here)")
    print_line(f"            yolosearch run {path}")


def _warn_without_gpu(report: DatasetReport, wishes: Wishes) -> None:
    """Says what a study of a usual size means on a CPU, before anybody waits for it."""
    from search.starter import draft_study, warn_of_cpu
    from yolocore.device import resolve_device
    from yolocore.host import available_cores

    if resolve_device("auto").type != "cpu":
        return
    images = next(split.images for split in report.splits if split.split == "train")
    warning = warn_of_cpu(draft_study(report, wishes), images, available_cores())
    if warning is not None:
        print_line(f"warning: {warning}", style="yellow", to=err)


def _examined(data: Path) -> DatasetReport:
    """The figures of a data set that training accepts.

    Raises:
        UserInputError: It does not; the errors were printed.
    """
    from yolocore.data.check import check_dataset
    from yolocore.data.dataset import load_dataset_config

    path = _data_yaml(data)
    with err.status(f"reading {path}"):
        report, _ = check_dataset(load_dataset_config(path), REPORTED_SIZE, ("train", "val"), decode=False)
    if not report.usable:
        for line in report.errors[:SHOWN_ERRORS]:
            print_line(f"error: {line}", style="red", to=err)
        found = f"{len(report.errors)} errors that training would refuse"
        raise UserInputError(f"{path}: {found}; `yolosearch data check {path}` shows all; allowed: a usable data set")
    return report


def _data_yaml(data: Path) -> Path:
    if not data.is_dir():
        return data
    files = sorted([*data.glob("*.yaml"), *data.glob("*.yml")])
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserInputError(f"{data}: holds {names}; allowed: a data set YAML, or a folder with exactly one")
    return files[0]


def _existing(weights: Path | None) -> Path | None:
    if weights is not None and not weights.is_file():
        raise UserInputError(
            f"--weights: {weights}: no such file; {WEIGHTS_SOURCE}; allowed: a .pt or .safetensors file"
        )
    return weights


def _asked(report: DatasetReport, wishes: Wishes, is_open: dict[str, bool]) -> Wishes:
    """Asks for what was left open, with the data's suggestions."""
    from dataclasses import replace

    from search.starter import draft_study

    for line in draft_study(report, wishes).found:
        print_line(line, style="dim")
    _warn_without_gpu(report, wishes)
    if is_open["model"]:
        wishes = replace(wishes, model=typer.prompt("model size", default=Model.N, type=Model).value)
    if is_open["weights"]:
        answer = typer.prompt("start weights, a file (Enter: none, from scratch)", default="", show_default=False)
        wishes = replace(wishes, weights=_existing(Path(answer).expanduser() if answer else None))
    for key in ("image_size", "epochs", "trials"):
        if getattr(wishes, key) is None:
            suggested = getattr(draft_study(report, wishes), key)
            answer = typer.prompt(f"{key.replace('_', ' ')} ({suggested.why})", default=suggested.value, type=int)
            if answer != suggested.value:
                wishes = replace(wishes, **{key: answer})
    return wishes


def _write(path: Path, report: DatasetReport, wishes: Wishes, *, with_schema: bool, force: bool) -> None:
    """Writes the study file, unless it would be wrong, and the schema beside it.

    Raises:
        StudyConfigError: What the user asked for does not make a study.
        UserInputError: A file is there already.
    """
    import yaml

    from search.config import parse_study
    from search.starter import draft_study, study_text

    draft = draft_study(report, wishes)
    text = study_text(draft, path.parent, with_schema=with_schema)
    parse_study(yaml.safe_load(text), source=str(path), folder=path.resolve().parent)
    if path.exists() and not force:
        raise UserInputError(f"{path}: exists already; allowed: another --output, or --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if with_schema:
        (path.parent / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
