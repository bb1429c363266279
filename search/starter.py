"""A study file for a data set: what its figures say about image size, epochs and ranges, with the reasons as comments.

The rules are rules of thumb, and each stands in the file beside the value that it gave. Nothing here trains.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search.config import usual_first_rung
from search.launch.prepare import STEPS_FROM_SCRATCH, STEPS_FROM_WEIGHTS, after_warmup, base_schedule
from search.schema import SCHEMA_FILE
from search.settings import TrainSettings
from yolocore.data.check import DatasetReport, SplitReport
from yolocore.hyperparameters import Hyperparameters
from yolocore.training.optim import NOMINAL_BATCH_SIZE

USUAL_IMAGE_SIZE = 640
LARGEST_IMAGE_SIZE = 1280
STRIDE = 32
SMALLEST_BOX = 10.0
"""Pixels that all but the smallest twentieth of the boxes should have: a little more than the finest cell."""
EPOCH_LIMITS = (10, 300)
TRIALS_PER_KEY = 12
FEW_CLASSES = 10
IMBALANCE = 5.0
MANY_SMALL = 0.5
MUCH_BACKGROUND = 0.3
SMALL_IMAGE_SIZE = 160
SMALL_EPOCHS = 10
SMALL_TRIALS = 20
"""What makes a study bearable without a GPU."""
CORE_IMAGES_PER_SECOND = 43.0
"""Of `SMALL_IMAGE_SIZE` pixels, that a core trains the smallest model on: docs/performance.md has 0.153 s for a step of
16 images on two cores, and validation takes about a sixth of an epoch."""
MODEL_COST = {"n": 1.0, "s": 3.7, "m": 11.0, "l": 24.0, "x": 46.0}
"""Convolution work for an image, in that of the smallest model."""
BEARABLE_HOURS = 8.0
"""One night."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value, and why."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user has said; None leaves it to the data."""

    name: str | None = None
    model: str = "n"
    weights: Path | None = None
    image_size: int | None = None
    batch_size: int | None = None
    epochs: int | None = None
    trials: int | None = None
    objective: str = "fitness"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDraft:
    """All that a study file says, each with its reason."""

    name: str
    data: Path
    found: tuple[str, ...]
    """What the data set holds, in lines."""
    model: str
    weights: Path | None
    image_size: Choice
    batch_size: Choice
    epochs: Choice
    space: Mapping[str, Choice]
    trials: Choice
    pruner: Choice
    objective: Choice


def draft_study(report: DatasetReport, wishes: Wishes) -> StudyDraft:
    """Decides what the user has left open.

    Args:
        report: Of a usable data set, on train and val at 640 pixels.
        wishes: What the user wants.
    """
    train = next(split for split in report.splits if split.split == "train")
    space = search_space(report, train)
    trials = Choice(TRIALS_PER_KEY * len(space), f"about {TRIALS_PER_KEY} for each searched key; trial 0 is the base")
    batch_size = _wished(wishes.batch_size) or choose_batch_size(train)
    epochs = _wished(wishes.epochs) or choose_epochs(train, from_weights=wishes.weights is not None)
    return StudyDraft(
        name=wishes.name or study_name_of(report.source),
        data=report.source,
        found=tuple(found_lines(report, train)),
        model=wishes.model,
        weights=wishes.weights,
        image_size=_wished(wishes.image_size) or choose_image_size(train),
        batch_size=batch_size,
        epochs=epochs,
        space=space,
        trials=_wished(wishes.trials) or trials,
        pruner=choose_pruner(train.images, batch_size.value, epochs.value),
        objective=Choice(wishes.objective, _objective_hint(train)),
    )


def warn_of_cpu(draft: StudyDraft, images: int, cores: int) -> str | None:
    """One line for a study that is too large for a host without a GPU; None for one that takes a night at most.

    Args:
        draft: The study.
        images: Of its training split.
        cores: Of the host. The estimate is rough: `yolosearch check --measure` measures.
    """
    size, epochs, trials = draft.image_size.value, draft.epochs.value, draft.trials.value
    per_second = cores * CORE_IMAGES_PER_SECOND / MODEL_COST[draft.model] * (SMALL_IMAGE_SIZE / size) ** 2
    hours = trials * epochs * images / per_second / 3600
    if hours <= BEARABLE_HOURS:
        return None
    smaller = [
        *([f"--image-size {SMALL_IMAGE_SIZE}"] if size > SMALL_IMAGE_SIZE else []),
        *([f"--epochs {SMALL_EPOCHS}"] if epochs > SMALL_EPOCHS else []),
        *([f"--weights yolov5{draft.model}.pt"] if draft.weights is None else []),
    ]
    remedy = " ".join(smaller) or f"--trials {SMALL_TRIALS}"
    return (
        f"no GPU here: {trials} trials of {epochs} epochs at {size} px are roughly {hours:,.0f} hours of training on "
        f"{cores} cores, less what pruning saves; allowed, but smaller is wiser: {remedy}"
    )


def _wished(value: int | None) -> Choice | None:
    return None if value is None else Choice(value, "as you said")


def study_name_of(data: Path) -> str:
    """A study's name from its data: the YAML's name, or its folder's where that says more."""
    stem = data.resolve().parent.name if data.stem in ("data", "dataset") else data.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "study"


def found_lines(report: DatasetReport, train: SplitReport) -> list[str]:
    """The data set in a few lines."""
    images = ", ".join(f"{split.images} {split.split}" for split in report.splits)
    (_, _), (width, height) = train.image_sizes
    classes = ", ".join(f"{count.name} {count.boxes}" for count in train.classes[:12])
    more = f", and {len(train.classes) - 12} more" if len(train.classes) > 12 else ""
    low, middle, high = train.scaled.size
    return [
        f"images: {images}, up to {width}x{height} pixels; {train.without_labels} of train have no object",
        f"objects in train: {classes}{more}",
        f"at {report.image_size} pixels nine in ten are {low:.0f} to {high:.0f} pixels large, half above {middle:.0f}",
    ]


def choose_image_size(train: SplitReport) -> Choice:
    """YOLOv5's usual size; less for small images, more where many objects would be smaller than a cell."""
    (_, _), (width, height) = train.image_sizes
    native = math.ceil(max(width, height) / STRIDE) * STRIDE
    smallest = train.scaled.size[0]
    if native < USUAL_IMAGE_SIZE:
        return Choice(native, f"the largest image has {max(width, height)} pixels; enlarging it shows nothing new")
    if 0 < smallest < SMALLEST_BOX and native > USUAL_IMAGE_SIZE:
        wanted = math.ceil(USUAL_IMAGE_SIZE * SMALLEST_BOX / smallest / STRIDE) * STRIDE
        size = min(wanted, native, LARGEST_IMAGE_SIZE)
        return Choice(size, f"at {USUAL_IMAGE_SIZE} one object in twenty would be below {smallest:.0f} pixels")
    return Choice(USUAL_IMAGE_SIZE, "the size that you will train with; a smaller one makes the study cheaper")


def choose_batch_size(train: SplitReport) -> Choice:
    """YOLOv5's 16, less for a handful of images."""
    size = max(1, min(16, train.images))
    return Choice(size, "images per batch, as in your training")


def choose_epochs(train: SplitReport, *, from_weights: bool) -> Choice:
    """So many that trials differ by their weights, not by their luck."""
    steps = STEPS_FROM_WEIGHTS if from_weights else STEPS_FROM_SCRATCH
    wanted = math.ceil(steps * NOMINAL_BATCH_SIZE / train.images / 5) * 5
    low, high = EPOCH_LIMITS
    epochs = min(high, max(low, wanted))
    start = "from weights" if from_weights else "from scratch (start weights would do with a fifth)"
    return Choice(epochs, f"about {epochs * train.images // NOMINAL_BATCH_SIZE} optimiser steps, {start}")


def choose_pruner(images: int, batch_size: int, epochs: int) -> Choice:
    """The median pruner, not before YOLOv5 has warmed up, which takes many epochs where there are few images."""
    if epochs < 2:
        return Choice("none", "one epoch cannot end early")
    warm = base_schedule(Hyperparameters(), epochs, images, batch_size).warmup_epochs
    first = after_warmup(warm, epochs)
    if first <= usual_first_rung(epochs):
        return Choice("median", "trials that are worse than half of the others at the same epoch end early")
    until = f", past the warm-up's {warm} epochs" if first == warm else f"; warm-up alone takes {warm} epochs"
    why = f"those worse than half of the others end early{until}"
    return Choice({"name": "median", "min_epochs": first}, why)


def search_space(report: DatasetReport, train: SplitReport) -> dict[str, Choice]:
    """The loss weights to search; ranges are widened towards what the data may need."""
    classes = len(report.names)
    space = {"box": _range(0.02, 0.2, "gain of the box loss")}
    if classes > 1:
        few = classes <= FEW_CLASSES
        why = f"gain of the class loss; YOLOv5 scales it by {classes}/80 classes" + (": look higher" if few else "")
        space["cls"] = _range(0.1, 4.0 if few else 2.0, why)
    small = train.scaled.small / max(1, train.boxes)
    space["obj"] = _range(0.25, 4.0, "gain of the objectness loss")
    if classes > 1:
        skewed = report.imbalance is not None and report.imbalance >= IMBALANCE
        why = f"the commonest class is {report.imbalance:.0f} times as frequent as the rarest" if skewed else ""
        space["cls_pw"] = _range(0.5, 8.0 if skewed else 4.0, why or "weight of positives in the class loss")
    many = small >= MANY_SMALL
    why = f"{small:.0%} of the objects are small, so positives are rare" if many else ""
    space["obj_pw"] = _range(0.5, 8.0 if many else 4.0, why or "weight of positives in the objectness loss")
    if train.without_labels >= MUCH_BACKGROUND * train.images:
        share = train.without_labels / train.images
        space["fl_gamma"] = Choice([0.0, 0.5, 1.0, 1.5], f"focal loss, 0 = off; {share:.0%} of the images are empty")
    return space


def _range(low: float, high: float, why: str) -> Choice:
    return Choice({"low": low, "high": high, "log": True}, why)


def _objective_hint(train: SplitReport) -> str:
    having = [count for count in train.classes if count.boxes]
    if len(having) < 2:
        return "0.1 mAP50 + 0.9 mAP50-95, as YOLOv5 picks its best.pt"
    rarest = min(having, key=lambda count: count.boxes)
    return f"or, if {rarest.name} matters most: {_yaml({'fitness': 0.7, f'class_ap:{rarest.name}': 0.3})}"


# ---- the file --------------------------------------------------------------------------------------------------------


def study_text(draft: StudyDraft, folder: Path, *, with_schema: bool = True) -> str:
    """The study file.

    Args:
        draft: What to write.
        folder: Of the file; paths below it are written relative to it.
        with_schema: Whether the schema lies beside it.
    """
    trains = [("image_size", draft.image_size), ("batch_size", draft.batch_size), ("epochs", draft.epochs)]
    lines = [f"# yaml-language-server: $schema={SCHEMA_FILE}"] if with_schema else []
    lines += [
        "# A study of YOLOv5's loss weights, written by `yolosearch init` for this data set:",
        *(f"#   {line}" for line in draft.found),
        "# Values that init chose have their reason beside them; change what you know better. `yolosearch check` says",
        "# what the study will do, `yolosearch run` does it. Once it exists only `trials`, `timeout`, `stop` and",
        "# `noise.seeds` may change.",
        "",
        *_aligned([_pair("name", draft.name, "its folder below runs/, and its MLflow experiment")]),
        f"data: {_yaml(_path(draft.data, folder))}",
        "",
        "train:",
        *_aligned(
            [
                _pair(
                    "  model",
                    draft.model,
                    "n, s, m, l or x: the size that you will train, or a smaller one",
                ),
                _weights_pair(draft, folder),
                *(_pair(f"  {key}", choice.value, choice.why) for key, choice in trains),
                *_patience(draft),
            ]
        ),
        "",
        "# Trial 0, which all others are measured against: YOLOv5's defaults, changed by what stands here (or in a hyp",
        "# YAML: `base_hyp: hyp.mine.yaml`).",
        "base_hyp: {}",
        "",
        "# The searched loss weights; the base's value has to be inside.",
        "space:",
        *_aligned(
            [*(_pair(f"  {key}", choice.value, choice.why) for key, choice in draft.space.items()), *_left_out(draft)]
        ),
        "",
        *_aligned(
            [
                _pair("trials", draft.trials.value, draft.trials.why),
                ("sampler: tpe", "who proposes"),
                _pair("pruner", draft.pruner.value, draft.pruner.why),
                _pair("objective", draft.objective.value, draft.objective.why),
            ]
        ),
    ]
    return "\n".join(lines) + "\n"


def _pair(key: str, value: object, why: str) -> tuple[str, str]:
    return f"{key}: {_yaml(value)}", why


def _aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines whose comments begin in one column."""
    width = max(len(text) for text, _ in pairs)
    return [f"{text:<{width}}  # {why}" for text, why in pairs]


def _yaml(value: object) -> str:
    """A value in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _patience(draft: StudyDraft) -> list[tuple[str, str]]:
    """Long trials would end after a hundred epochs without a gain, and then count with a chance epoch."""
    usual: int = TrainSettings().patience
    return [("  patience: 0", "only the pruner ends a trial early")] if draft.epochs.value > usual else []


def _weights_pair(draft: StudyDraft, folder: Path) -> tuple[str, str]:
    if draft.weights is not None:
        return _pair("  weights", _path(draft.weights, folder), "start weights")
    return (
        f"  # weights: yolov5{draft.model}.pt",
        "start weights, if you have them: far fewer epochs are enough",
    )


def _left_out(draft: StudyDraft) -> list[tuple[str, str]]:
    """What could be searched too."""
    if "fl_gamma" in draft.space:
        return []
    return [("  # fl_gamma: [0.0, 0.5, 1.0, 1.5]", "focal loss, 0 = off")]


def _path(path: Path, folder: Path) -> str:
    """Relative where the file is near, so that the folder can move."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return str(path.resolve()) if relative.startswith("../..") else relative
