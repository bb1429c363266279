"""The commands on data sets: data check, data convert."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from search.cli_common import AsJson, err, out, print_json
from search.errors import UserInputError
from yolocore.text import one_line

if TYPE_CHECKING:
    from yolocore.data.check import BoxSizes, DatasetReport, SplitReport
    from yolocore.data.convert import ConversionReport
    from yolocore.data.dataset import LabelledImage, SplitName
    from yolocore.data.sources import SourceDataset

EXIT_UNUSABLE = 2
SHOWN_WARNINGS = 20
NOTES = """\
* 5th percentile | median | 95th percentile; a box's size is the square root
  of its area in pixels: small below 32, large from 96, at {image_size}
"""

app = typer.Typer(no_args_is_help=True)
commands = typer.Typer(no_args_is_help=True)
app.add_typer(commands, name="data")

Data = Annotated[Path, typer.Argument(metavar="DATA.yaml", help="The data set's YAML.", show_default=False)]


class SplitChoice(StrEnum):
    """What `--split` takes."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


Splits = Annotated[list[SplitChoice] | None, typer.Option("--split", help="Only this split; may be repeated.")]


@commands.callback()
def data() -> None:
    """Look at data sets, and convert them from other formats."""


@commands.command()
def check(
    data: Data,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw labelled images of the first checked split here.")
    ] = None,
    sheet_images: Annotated[int, typer.Option(min=1, max=200, help="How many images the sheet shows.")] = 12,
    split: Splits = None,
    image_size: Annotated[int, typer.Option(min=32, help="Longer side of the images in training, pixels.")] = 640,
    decode: Annotated[bool, typer.Option(help="Decode every image, to find damaged ones.")] = True,
    all_warnings: Annotated[bool, typer.Option("--all", help="Show every warning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a data set holds and everything that is wrong with it; exit code 2 if training would refuse it.

    Example: yolosearch data check my-data.yaml --sheet sheet.png
    """
    from yolocore.data.check import check_dataset
    from yolocore.data.dataset import load_dataset_config

    if sheet is not None and sheet.suffix.lower() != ".png":
        raise UserInputError(f"--sheet: got {str(sheet)!r}; allowed: a file name that ends in .png")
    config = load_dataset_config(data)
    wanted: list[SplitName] = [choice.value for choice in dict.fromkeys(split or ())]
    report, images = check_dataset(config, image_size, wanted, decode=decode)
    if as_json:
        print_json({**report.to_json(), "sheet": None if sheet is None else str(sheet)})
    else:
        _print_report(report, None if all_warnings else SHOWN_WARNINGS)
    if sheet is not None:
        name, shown = next(iter(images.items()))
        _write_sheet(sheet, sheet_images, shown, report, name, quiet=as_json)
    if not report.usable:
        raise typer.Exit(EXIT_UNUSABLE)


class Format(StrEnum):
    """What `--from` takes."""

    COCO = "coco"
    VOC = "voc"


CocoFile = Annotated[Path | None, typer.Option(metavar="FILE.json", help="COCO: the file of this split.")]


@commands.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder, or a COCO JSON file.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.", show_default=False)],
    origin: Annotated[Format, typer.Option("--from", help="Format of SRC.", show_default=False)],
    train: CocoFile = None,
    val: CocoFile = None,
    test: CocoFile = None,
    images: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Where the images are; may be repeated; default found.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these classes, numbered in this order.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.001, max=0.999, help="Where SRC has no val split: random part of train.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that random part.")] = 0,
    polygons: Annotated[bool, typer.Option(help="COCO: keep segmentations, for copy-paste.")] = True,
    keep_difficult: Annotated[
        bool, typer.Option("--keep-difficult", help="VOC: keep objects marked difficult.")
    ] = False,
    one_based: Annotated[
        bool, typer.Option("--one-based", help="VOC: corners are pixel numbers from 1, as in the original challenge.")
    ] = False,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out images that do not exist.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Link images instead of copying them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a COCO or Pascal VOC data set to YOLO folders with a data.yaml; writes all of it or nothing.

    Example: yolosearch data convert --from coco annotations-and-images my-data
    """
    from yolocore.data.convert import select_classes, split_at_random, write_yolo

    folders = tuple(images or ())
    if not source.exists():
        raise UserInputError(f"{source}: no such file or folder")
    if origin is Format.COCO:
        files = _coco_files(source, {"train": train, "val": val, "test": test})
        found = _read_coco(source, files, folders, polygons=polygons, skip_missing=skip_missing)
    elif any((train, val, test)):
        raise UserInputError("--train, --val, --test: only for coco; voc takes ImageSets/Main/*.txt")
    else:
        found = _read_voc(source, folders, keep_difficult, one_based, skip_missing=skip_missing)
    if classes is not None:
        found = select_classes(found, [name.strip() for name in classes.split(",")])
    drawn = not found.splits.get("val")
    report = write_yolo(split_at_random(found, val_fraction, seed), output, str(source), link=link, overwrite=overwrite)
    if as_json:
        print_json({**report.to_json(), "val_fraction": val_fraction if drawn else None})
    else:
        _print_conversion(report, f"a random part of train, seed {seed}" if drawn else None)


def _coco_files(source: Path, named: dict[SplitName, Path | None]) -> dict[SplitName, Path]:
    from yolocore.data.coco import find_coco_files

    chosen = {split: file for split, file in named.items() if file is not None}
    return chosen if "train" in chosen else {**find_coco_files(source), **chosen}


def _read_coco(
    source: Path, files: dict[SplitName, Path], images: tuple[Path, ...], *, polygons: bool, skip_missing: bool
) -> SourceDataset:
    from yolocore.data.coco import read_coco

    root = source.parent if source.is_file() else source
    return read_coco(files, root, images, polygons=polygons, skip_missing=skip_missing)


def _read_voc(
    source: Path, images: tuple[Path, ...], keep_difficult: bool, one_based: bool, *, skip_missing: bool
) -> SourceDataset:
    from yolocore.data.voc import read_voc

    return read_voc(source, images, keep_difficult=keep_difficult, one_based=one_based, skip_missing=skip_missing)


def _print_conversion(report: ConversionReport, drawn: str | None) -> None:
    table = Table("class", *report.images, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, name in enumerate(report.names):
        table.add_row(one_line(name), *(str(counts[index]) for counts in report.boxes.values()))
    table.add_row("images", *map(str, report.images.values()), style="dim")
    table.add_row("  without objects", *map(str, report.background.values()), style="dim")
    out.print(table)
    for reason, count in report.skipped.items():
        out.print(f"left out: {count} {reason}", style="yellow", highlight=False)
    if report.polygons:
        out.print(f"{report.polygons} objects are polygons", highlight=False)
    if drawn is not None:
        out.print(f"val is {drawn}", highlight=False)
    out.print(f"data set YAML: {report.yaml}", highlight=False, markup=False, soft_wrap=True)


def _write_sheet(
    path: Path, count: int, images: Sequence[LabelledImage], report: DatasetReport, split: str, *, quiet: bool
) -> None:
    from yolocore.data.sheet import choose_images, contact_sheet

    if not images:
        raise UserInputError(f"{report.source}: {split}: no usable image for a contact sheet; see the errors above")
    chosen = choose_images(images, count)
    title = f"{report.source.name}, {split}: {len(chosen)} of {len(images)} images"
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(chosen, report.names, title).save(path)
    if not quiet:
        out.print(f"contact sheet: {path}", highlight=False, markup=False, soft_wrap=True)


def _print_report(report: DatasetReport, shown: int | None) -> None:
    out.print(f"data set {report.source}: {len(report.names)} classes", highlight=False, markup=False, soft_wrap=True)
    if report.splits:
        out.print(_split_table(report))
        out.print(NOTES.format(image_size=report.image_size), style="dim", highlight=False)
        out.print(_class_table(report))
    if report.imbalance is not None:
        text = f"imbalance: {report.imbalance:.1f} training boxes of the commonest class for each of the rarest"
        out.print(text, highlight=False)
    for line in report.errors:
        err.print(f"error: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    for line in report.warnings[:shown]:
        err.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if shown is not None and len(report.warnings) > shown:
        err.print(f"... and {len(report.warnings) - shown} more warnings; --all shows them", highlight=False)
    verdict = "usable" if report.usable else "not usable: training would refuse it"
    out.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings: {verdict}", highlight=False)


def _split_table(report: DatasetReport) -> Table:
    table = Table("", *(split.split for split in report.splits), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *cells in zip(*(_split_rows(split, report.image_size) for split in report.splits), strict=True):
        table.add_row(name[0], *(cell[1] for cell in (name, *cells)))
    return table


def _split_rows(split: SplitReport, image_size: int) -> list[tuple[str, str]]:
    (least_w, least_h), (most_w, most_h) = split.image_sizes
    sizes = f"{most_w}x{most_h}" if split.image_sizes[0] == split.image_sizes[1] else ""
    return [
        ("images", str(split.images)),
        ("  without labels", str(split.without_labels)),
        ("  without label file", str(split.without_label_file)),
        ("  size, pixels", sizes or f"{least_w}x{least_h} to {most_w}x{most_h}"),
        ("  width / height*", _spread(split.image_aspect, 2)),
        ("boxes", str(split.boxes) + (f" ({split.polygons} polygons)" if split.polygons else "")),
        ("  per image*", _spread(split.boxes_per_image, 0)),
        ("  width / height*", _spread(split.box_aspect, 2)),
        ("  native size*", _spread(split.native.size, 0)),
        (f"  size at {image_size}*", _spread(split.scaled.size, 0)),
        ("  small|medium|large", _parts(split.scaled)),
    ]


def _spread(values: tuple[float, float, float], digits: int) -> str:
    return " | ".join(f"{value:.{digits}f}" for value in values)


def _parts(sizes: BoxSizes) -> str:
    return f"{sizes.small} | {sizes.medium} | {sizes.large}"


def _class_table(report: DatasetReport) -> Table:
    table = Table("", box=None, pad_edge=False)
    table.add_column("class", no_wrap=True, min_width=10)
    for split in report.splits:
        table.add_column(f"{split.split}\nboxes", justify="right")
        table.add_column("\nshare", justify="right")
        table.add_column("\nimages", justify="right")
    for index, name in enumerate(report.names):
        cells: list[str] = []
        for split in report.splits:
            count = split.classes[index]
            cells += [str(count.boxes), f"{count.boxes / max(split.boxes, 1):.1%}", str(count.images)]
        table.add_row(str(index), one_line(name), *cells)
    return table
