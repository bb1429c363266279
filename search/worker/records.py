"""What the records of a study in MLflow have in common: their context and the names of their metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from search.config import StudyConfig
from search.ledger import Ledger, StudyRecord, TicketState
from search.outlook import Outlook, study_outlook
from search.paths import StudyFolder
from search.ranges import POWER_KEY
from search.recommendation import Recommendation
from search.transforms import hyperparameters, moved_keys, raw_values
from search.weights import WeightsStore
from search.worker.lease import is_fresh
from yolocore.hyperparameters import PER_CLASS_KEY

HYP_FILE = "hyp.best.yaml"
FORECAST_FILE = "forecast.json"

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


def recommended_hyp(config: StudyConfig, found: Recommendation) -> str:
    """The hyp YAML that the study recommends; its header says what that rests on."""
    hyp = hyperparameters(config, found.ticket.params or {})
    return hyp.to_yaml([f"trial {found.trial} of study {config.name}, {found.why}"])


def read_outlook(ledger: Ledger, config: StudyConfig) -> Outlook:
    """The study's forecast as its ledger stands."""
    record, reports, now = ledger.study(config.name), ledger.all_reports(config.name), ledger.now()
    live = [worker.id for worker in ledger.workers(config.name) if is_fresh(worker, now)]
    return study_outlook(config, record, ledger.tickets(config.name), reports, live, now)


def search_is_over(ledger: Ledger, study: str) -> bool:
    """Whether the budget is spent, or the study was stopped as somebody wanted and nothing runs any more."""
    counts = ledger.open_counts(study)
    if not any(counts.values()):
        return True
    kind = ledger.study(study).stop_kind
    return kind is not None and kind.is_planned and not counts[TicketState.RUNNING]


def metric_name(key: str, class_names: Sequence[str]) -> str:
    """How MLflow calls a metric of the ledger. The prefix is the chart's group."""
    split, marker, index = key.rpartition("class_ap/")
    if marker:
        return f"{split}{marker}{plain_name(class_names[int(index)])}"
    return METRIC_NAMES.get(key, key)


def table_columns(config: StudyConfig) -> tuple[str, ...]:
    """What the table of runs shows beside their names: what was found, what was tried, how it went.

    What was tried are raw values, which `run_params` records, not the ratios and switches that a sampler sees.
    """
    objectives = objective_metrics(config, "objective") or ("objective",)
    searched = (POWER_KEY if key == PER_CLASS_KEY else key for key in moved_keys(config))
    columns = (*objectives, "metrics/mAP50", *(f"params.{key}" for key in searched), "tags.yolosearch.state")
    return tuple(dict.fromkeys(columns))


def objective_metrics(config: StudyConfig, prefix: str) -> tuple[str, ...]:
    """A metric's name for each of several objectives, as `objective/fitness`."""
    return tuple(f"{prefix}/{plain_name(objective.name)}" for objective in config.objectives)


def run_params(config: StudyConfig, params: Mapping[str, float]) -> dict[str, float]:
    """The parameters of a trial's run: raw hyperparameters, and the power that weights per class are made with.

    As numbers: those of a trial that failed since no training takes them are recorded, too.
    """
    own = {POWER_KEY: float(params[POWER_KEY])} if POWER_KEY in params else {}
    return {**raw_values(config, params), **own}


def plain_name(name: str) -> str:
    """A name in the letters that MLflow takes."""
    return re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)
