"""Pictures of one trial: curves, confusions, each class against the base, validation images with their boxes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from yolocore.details import EvaluationDetails, ShownImage

TILE = 240
"""Side of one image in the mosaic, pixels."""
GAP, CAPTION = 6, 20
COLUMNS = 4
"""Images in a row of the mosaic, each as truth and as found."""

BEST, BASE = "#0d9488", "#d97706"
COLOURS = ("#0d9488", "#d97706", "#2563eb", "#db2777", "#65a30d", "#7c3aed", "#dc2626", "#0891b2", "#a16207", "#475569")
LEGEND_CLASSES = 12
"""With more classes than this a legend covers the curves."""

CONFUSION_CLASSES = 30
"""With more classes the numbers in the cells cannot be read."""


def draw_pictures(
    details: EvaluationDetails, names: Sequence[str], title: str, base: Mapping[str, float], folder: Path
) -> None:
    """Writes all pictures of a trial, numbered in the order in which they are looked at.

    Args:
        details: Of its evaluation.
        names: Of the classes.
        title: Names the trial.
        base: The base's AP by class name; empty for the base itself.
        folder: Exists.
    """
    mpl.rcParams["axes.unicode_minus"] = False
    labelled = [_name(names, int(index)) for index in details.curves.classes]
    images = _mosaic(details.images, names)
    if images is not None:
        images.save(folder / "1-validation.jpg", quality=85)
    _save(_precision_recall(details, labelled, title), folder / "2-precision-recall.png")
    _save(_f1_confidence(details, labelled, title), folder / "3-f1-confidence.png")
    _save(_confusion(details, names, title), folder / "4-confusion.png")
    _save(_class_ap(details, labelled, title, base), folder / "5-class-ap.png")
    (folder / "class_ap.csv").write_text(_class_table(details, labelled, base), encoding="utf-8")


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _text(name: str) -> str:
    """A name as it is: matplotlib reads what stands between dollar signs as formulas."""
    return name.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_text(title), loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _precision_recall(details: EvaluationDetails, labelled: Sequence[str], title: str) -> Figure:
    figure, axes = _axes(f"{title}: precision over recall, IoU 0.5", "recall", "precision")
    curves = details.curves
    for row, name in enumerate(labelled):
        label = f"{_text(name)} {details.ap50[row]:.3f}"
        axes.plot(curves.recall, curves.precision[row], color=COLOURS[row % len(COLOURS)], lw=1.2, label=label)
    if len(labelled):
        mean = f"all classes {details.ap50.mean():.3f} mAP50"
        axes.plot(curves.recall, curves.precision.mean(axis=0), color="#0f172a", lw=2.6, label=mean)
        _legend(axes, len(labelled))
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return figure


def _f1_confidence(details: EvaluationDetails, labelled: Sequence[str], title: str) -> Figure:
    figure, axes = _axes(f"{title}: F1 over confidence, IoU 0.5", "confidence", "F1")
    curves = details.curves
    for row, name in enumerate(labelled):
        axes.plot(curves.confidence, curves.f1[row], color=COLOURS[row % len(COLOURS)], lw=1.2, label=_text(name))
    if len(labelled):
        mean = curves.f1.mean(axis=0)
        best = int(mean.argmax())
        label = f"all classes, best {mean[best]:.2f} at {curves.confidence[best]:.3f}"
        axes.plot(curves.confidence, mean, color="#0f172a", lw=2.6, label=label)
        _legend(axes, len(labelled))
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return figure


def _legend(axes: Any, classes: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    shown = slice(-1, None) if classes > LEGEND_CLASSES else slice(None)
    axes.legend(handles[shown], labels[shown], fontsize=8, frameon=False)


def _confusion(details: EvaluationDetails, names: Sequence[str], title: str) -> Figure:
    counts = details.confusion
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
    labels = [*(_text(_name(names, index)) for index in range(len(counts) - 1)), "nothing"]
    side = min(12.0, 3.6 + 0.45 * len(labels))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
    axes.set_title(_text(f"{title}: found (rows) by truth (columns)"), loc="left", fontsize=11)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="there is", ylabel="found (confidence above 0.25)")
    for row, column in np.argwhere(counts > 0) if len(labels) <= CONFUSION_CLASSES else ():
        colour = "white" if shares[row, column] > 0.6 else "#0f172a"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _class_ap(details: EvaluationDetails, labelled: Sequence[str], title: str, base: Mapping[str, float]) -> Figure:
    figure, axes = _axes(f"{title}: AP (IoU 0.50 to 0.95) of each class", "", "AP")
    places = np.arange(len(labelled))
    if base:
        axes.bar(places - 0.2, [base.get(name, 0.0) for name in labelled], 0.38, color=BASE, label="base")
    bars = axes.bar(places + (0.2 if base else 0), details.ap, 0.38, color=BEST, label=_text(title))
    changes = [
        f"{ap - base[name]:+.3f}" if name in base else f"{ap:.3f}"
        for name, ap in zip(labelled, details.ap, strict=True)
    ]
    axes.bar_label(bars, changes, fontsize=8, padding=2)
    axes.set_xticks(places, [_text(name) for name in labelled], rotation=30 if len(labelled) > 6 else 0)
    axes.legend(fontsize=8, frameon=False)
    axes.margins(y=0.12)
    return figure


def _class_table(details: EvaluationDetails, labelled: Sequence[str], base: Mapping[str, float]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "labels", "AP50", "AP", "AP of the base", "change"])
    rows = zip(labelled, details.label_counts, details.ap50, details.ap, strict=True)
    for name, count, ap50, ap in rows:
        against = [f"{base[name]:.4f}", f"{ap - base[name]:+.4f}"] if name in base else ["", ""]
        writer.writerow([name, int(count), f"{ap50:.4f}", f"{ap:.4f}", *against])
    return text.getvalue()


def _mosaic(images: Sequence[ShownImage], names: Sequence[str]) -> Image.Image | None:
    """Every image twice: with its labels, and with what was found."""
    if not images:
        return None
    rows = -(-len(images) // COLUMNS)
    columns = min(COLUMNS, len(images))
    pair = 2 * TILE + GAP
    sheet = Image.new("RGB", (columns * (pair + 2 * GAP), rows * (TILE + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = number % columns * (pair + 2 * GAP), number // columns * (TILE + CAPTION + GAP)
        truth = [(row[1:5], _name(names, int(row[0])), int(row[0])) for row in image.labels]
        found = [(row[:4], f"{_name(names, int(row[5]))} {row[4]:.2f}", int(row[5])) for row in image.detections[::-1]]
        sheet.paste(_tile(image, truth), (left, top + CAPTION))
        sheet.paste(_tile(image, found), (left + TILE + GAP, top + CAPTION))
        draw.text((left + 2, top + 2), f"truth: {len(truth)}", fill="#334155", font=_font())
        draw.text((left + TILE + GAP + 2, top + 2), f"found: {len(found)}", fill="#334155", font=_font())
    return sheet


def _font() -> Any:
    return ImageFont.load_default(size=12)


def _tile(image: ShownImage, boxes: Sequence[tuple[Any, str, int]]) -> Image.Image:
    scale = TILE / max(image.pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.pixels.shape[:2])
    tile = Image.new("RGB", (TILE, TILE), "#e2e8f0")
    tile.paste(Image.fromarray(image.pixels).resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(tile)
    ratio = np.array([width / image.native[1], height / image.native[0]] * 2)
    for corners, label, index in boxes:
        box = (np.asarray(corners) * ratio).tolist()
        colour = COLOURS[index % len(COLOURS)]
        draw.rectangle(box, outline=colour, width=2)
        place = (box[0] + 1, max(0.0, box[1] - 13))
        draw.rectangle(draw.textbbox(place, label, font=_font()), fill=colour)
        draw.text(place, label, fill="white", font=_font())
    return tile
