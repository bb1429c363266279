"""One self-contained HTML page about a study: works from a file, asks no network for anything."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from search.front_plots import front_plots, objective_importances
from search.ledger import Ticket
from search.plots import Plot, figure_json, importances, main_importance, packed_plotly, study_plots
from search.review import Findings, FrontTrial, StudyData, findings, short

TOP_TRIALS = 8
BADGES = {
    "confirmed": "confirmed",
    "unconfirmed": "unconfirmed",
    "keep": "keep what you have",
    "open": "not decided",
    "front": "a front, unconfirmed",
}


@dataclass(frozen=True, slots=True)
class Review:
    """A study's findings, drawn."""

    data: StudyData
    found: Findings
    plots: tuple[Plot, ...]
    importance: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, data: StudyData) -> Review:
        """Works everything out; a second or two."""
        if data.config.objectives:
            shares, found = objective_importances(data), findings(data)
            return cls(data, found, front_plots(data, found, shares), shares)
        importance = importances(data)
        found = findings(data, main_importance(importance))
        return cls(data, found, study_plots(data, found, importance), importance)


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    role: str
    value: str
    gain: str
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrontRow:
    number: int
    role: str
    values: tuple[tuple[str, str], ...]
    """Of each objective, with the gain over the base."""
    params: tuple[str, ...]


def report_page(review: Review, hyp: str | None) -> str:
    """The page.

    Args:
        review: The study.
        hyp: Text of the best hyp YAML; None leaves out how to use it.
    """
    data, found = review.data, review.found
    return (
        _environment()
        .get_template("report.html")
        .render(
            study=data.config.name,
            short_title=BADGES[found.standing],
            badge=BADGES[found.standing],
            defaults=data.config.base_is_default,
            found=found,
            figures=list(_figures(data, found)),
            importance=review.importance,
            plots=review.plots,
            json={plot.key: Markup(figure_json(plot.figure)) for plot in review.plots if plot.figure is not None},
            metric=data.metric,
            keys=list(data.config.space),
            top=[] if data.config.objectives else list(_top(data)),
            objectives=data.objective_names,
            front=list(_front(data, found)),
            exports=list(_exports(data, found)),
            cost=list(_cost(data, found)),
            stop_reason=data.record.stop_reason,
            hyp=hyp,
            command=_command(data),
            footer=_footer(data),
            plotly=Markup(packed_plotly()),
        )
    )


def plot_page(plot: Plot, study: str) -> str:
    """A page with one plot, for where artifacts are looked at one by one.

    Raises:
        ValueError: The plot has no figure.
    """
    if plot.figure is None:
        raise ValueError(f"plot {plot.key} could not be made: {plot.missing}")
    return (
        _environment()
        .get_template("plot.html")
        .render(study=study, plot=plot, json=Markup(figure_json(plot.figure)), plotly=Markup(packed_plotly()))
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("search"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _figures(data: StudyData, found: Findings) -> Iterator[tuple[str, str, str]]:
    """The numbers below the verdict: name, value, note."""
    yield from _front_figures(data, found) if data.config.objectives else _gain_figures(data, found)
    counts = ", ".join(f"{count} {state.lower()}" for state, count in found.counts.items() if count)
    yield "trials", str(len(data.tickets)), counts
    yield "training", _hours(found.cost.device_seconds), "on one device"


def _gain_figures(data: StudyData, found: Findings) -> Iterator[tuple[str, str, str]]:
    if data.base is not None and data.base.value is not None:
        yield ("defaults" if data.config.base_is_default else "base"), f"{data.base.value:.4f}", data.metric
    if data.best is not None and data.best.value is not None:
        is_decided = data.recommendation is not None and data.recommendation.is_decided
        yield "recommended" if is_decided else "best", f"{data.best.value:.4f}", f"trial {data.best.trial_number}"
    if found.gain is not None:
        yield "gain", f"{found.gain:+.3f}", _gain_note(data, found)


def _front_figures(data: StudyData, found: Findings) -> Iterator[tuple[str, str, str]]:
    if not found.front:
        return
    yield "on the front", str(len(found.front)), f"of {len(data.complete)} complete trials"
    if data.base is not None:
        beating = sum(trial.beats_base for trial in found.front)
        yield "better in all", str(beating), f"than {data.base_name}, in one run"
    base = {} if data.base is None else data.objective_values(data.base)
    for name in data.objective_names:
        best = max(found.front, key=lambda trial: trial.values[name])
        against = f", {data.base_name} {base[name]:.4f}" if name in base else ""
        yield f"best {name}", f"{best.values[name]:.4f}", f"trial {best.number}{against}"


def _gain_note(data: StudyData, found: Findings) -> str:
    if found.margin is None or data.confirmation is None:
        return "one run each"
    return f"± {found.margin:.3f} over {data.confirmation.seeds} paired seeds"


def _top(data: StudyData) -> Iterator[_Row]:
    shown = list(data.complete[:TOP_TRIALS])
    if data.base is not None and data.base not in shown:
        shown.append(data.base)
    for ticket in shown:
        value, base = ticket.value or 0.0, None if data.base is None else data.base.value
        role = "base" if data.base is not None and ticket.id == data.base.id else ""
        if not role and data.best is not None and ticket.id == data.best.id:
            role = "best"
        yield _Row(
            ticket.number if ticket.trial_number is None else ticket.trial_number,
            role,
            f"{value:.4f}",
            "" if base is None or role == "base" else f"{value - base:+.4f}",
            tuple(_parameter(ticket, key) for key in data.config.space),
        )


def _front(data: StudyData, found: Findings) -> Iterator[_FrontRow]:
    """The front by the first objective, and before it the base where that is not on it."""
    shown = list(zip(found.front, data.front, strict=True))
    base = data.base
    if base is not None and found.front and not any(trial.is_base for trial in found.front):
        values = data.objective_values(base)
        yield _FrontRow(
            number=base.number if base.trial_number is None else base.trial_number,
            role="base",
            values=tuple((f"{value:.4f}", "") for value in values.values()),
            params=tuple(_parameter(base, key) for key in data.config.space),
        )
    for trial, ticket in shown:
        yield _FrontRow(
            number=trial.number,
            role="base" if trial.is_base else "better" if trial.beats_base else "",
            values=tuple(_front_cell(trial, name) for name in data.objective_names),
            params=tuple(_parameter(ticket, key) for key in data.config.space),
        )


def _front_cell(trial: FrontTrial, name: str) -> tuple[str, str]:
    """A value, and its gain over the base."""
    gain = "" if trial.is_base or name not in trial.gains else f"{trial.gains[name]:+.4f}"
    return f"{trial.values[name]:.4f}", gain


def _exports(data: StudyData, found: Findings) -> Iterator[tuple[str, str]]:
    """How to get hyp files of the front, and to train with one: what for, command."""
    if not found.front:
        return
    example = max(found.front, key=lambda trial: (trial.beats_base, not trial.is_base)).number
    study = data.config.name
    yield "Every trial of the front, into the study's folder:", f"yolosearch export {study} --pareto all"
    yield (
        f"One of them, for example trial {example}:",
        f"yolosearch export {study} --pareto {example} -o hyp.pareto-{example}.yaml",
    )
    yield "Then, in your YOLOv5 checkout:", _command(data, f"hyp.pareto-{example}.yaml")


def _parameter(ticket: Ticket, key: str) -> str:
    params = ticket.params or {}
    return short(float(params[key])) if key in params else "off" if params else ""


def _cost(data: StudyData, found: Findings) -> Iterator[tuple[str, str]]:
    cost, train = found.cost, data.config.train
    yield "trials", ", ".join(f"{count} {state.lower()}" for state, count in found.counts.items() if count)
    yield "epochs trained", f"{cost.slot_epochs} (trials times epochs)"
    yield "spared by pruning", f"{cost.unpruned_epochs - cost.search_epochs} epochs, {100 * cost.saved:.0f} %"
    yield "device time", f"{_hours(cost.device_seconds)}, what packs share divided among their trials"
    yield "from first to last", _hours(cost.wall_seconds)
    yield "each trial", f"YOLOv5{train.model}, {train.image_size} px, batch {train.batch_size}, {train.epochs} epochs"
    rerun = len(data.every_ticket) - len(data.tickets)
    if rerun:
        yield "reruns", f"{rerun} for noise and confirmation"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _command(data: StudyData, hyp: str = "hyp.best.yaml") -> str:
    """The training command of YOLOv5's own repository for the study's settings."""
    train = data.config.train
    builtin = data.config.builtin_data
    name = Path(data.config.data).name if builtin is None else f"{builtin}.yaml"
    start = (
        f"--weights '' --cfg yolov5{train.model}.yaml" if train.weights is None else f"--weights {train.weights.name}"
    )
    size = f"--img {train.image_size} --batch-size {train.batch_size} --epochs {train.epochs}"
    optimizer = "" if train.optimizer == "SGD" else f" --optimizer {train.optimizer}"
    return f"python train.py --hyp {hyp} --data {name} {start} {size}{optimizer}"


def _footer(data: StudyData) -> str:
    moment = datetime.fromtimestamp(data.now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    created = datetime.fromtimestamp(data.record.created, UTC).strftime("%Y-%m-%d")
    sampler, pruner = data.config.sampler.name, data.config.pruner.name
    return (
        f"yolosearch {importlib.metadata.version('yolosearch')}, {moment}. Study of {created}; objective "
        f"{data.config.objective_text()}; sampler {sampler}, pruner {pruner}; data fingerprint "
        f"{data.record.fingerprint}."
    )
