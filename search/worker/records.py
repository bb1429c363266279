"""What the records of a study in MLflow have in common: their context and the names of their metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from search.config import StudyConfig
from search.ledger import StudyRecord
from search.paths import StudyFolder
from search.weights import WeightsStore

METRIC_NAMES = {
    "fitness": "metrics/fitness",
    "map50": "metrics/mAP50",
    "map": "metrics/mAP50-95",
    "precision": "metrics/precision",
    "recall": "metrics/recall",
    "f1": "metrics/f1",
    "val_box": "val/box_loss",
    "val_obj": "val/obj_loss",
    "val_cls": "val/cls_loss",
    "train_box": "train/box_loss",
    "train_obj": "train/obj_loss",
    "train_cls": "train/cls_loss",
    "lr_bias": "train/lr_bias",
    "lr_decay": "train/lr_weights",
    "lr_norm": "train/lr_norm",
    "seconds": "time/epoch_seconds",
    "eval_seconds": "time/evaluation_seconds",
    "slots": "pack/slots",
    "stream_epoch": "pack/stream_epoch",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorContext:
    """What every run of a study has in common."""

    config: StudyConfig
    record: StudyRecord
    folder: StudyFolder
    class_names: tuple[str, ...]
    storage_url: str
    weights: WeightsStore | None = None
    """Where the best trial's weights are."""
    worker_id: str = ""
    """Of the worker whose mirror this is."""
    tags: Mapping[str, str] = field(default_factory=dict)


def metric_name(key: str, class_names: Sequence[str]) -> str:
    """How MLflow calls a metric of the ledger. The prefix is the chart's group."""
    split, marker, index = key.rpartition("class_ap/")
    if marker:
        return f"{split}{marker}{plain_name(class_names[int(index)])}"
    return METRIC_NAMES.get(key, key)


def table_columns(config: StudyConfig) -> tuple[str, ...]:
    """What the table of runs shows beside their names: how it went, what was found, what was tried."""
    return ("objective", "metrics/mAP50", *(f"params.{key}" for key in config.space), "tags.yolosearch.state")


def plain_name(name: str) -> str:
    """A name in the letters that MLflow takes."""
    return re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)
