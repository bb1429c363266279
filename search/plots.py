"""A study's plots, drawn with plotly from the ledger's rows.

Optuna's own plots (slice, parallel coordinates, contour) get a study in memory that is made from the same rows, so that
nothing here opens a database. A plot that cannot be made says why in its place.
"""

from __future__ import annotations

import base64
import gzip
import html
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from search.errors import SearchError
from search.ledger import Ticket, TicketState
from search.pareto import non_dominated
from search.review import Findings, StudyData, half_band, short
from search.settings import AshaPruner, HyperbandPruner, PatientPruner
from search.space import distributions
from search.statistics import Confirmation, standard_error
from search.transforms import active_keys

BEST, BASE, OTHER, BAND_FILL = "#0d9488", "#d97706", "#64748b", "rgba(217, 119, 6, 0.14)"
BELOW = "#94a3b8"
"""Readable on white and on black; the band is the base's colour."""

CONTOUR_KEYS = 2
SLICE_COLUMNS = 3
HEIGHT = 380
NORMAL_95 = 1.96
"""Standard deviations to either side that hold all but one in twenty."""

MIN_IMPORTANCE_TRIALS = 4
"""Below this both analyses fit noise alone."""


class NoPlotError(SearchError):
    """A plot that cannot be made of this study; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot, or the reason why it is missing."""

    key: str
    """Names its file."""
    title: str
    caption: str
    """How to read it."""
    figure: go.Figure | None = None
    missing: str | None = None
    """Why there is no figure."""
    wide: bool = False
    """Whether it needs room on its sides and is scrolled on a phone."""
    noise: str = ""
    """What is drawn of the noise, with its size; empty where it was not measured or says nothing here."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What plots are drawn from."""

    data: StudyData
    found: Findings
    methods: Mapping[str, Mapping[str, float]]

    @property
    def importance(self) -> Mapping[str, float]:
        """By which keys are ordered."""
        return main_importance(self.methods)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How a plot is made; `noise` says in words what `draw` draws of it, from the same numbers."""

    key: str
    title: str
    caption: str
    draw: Callable[[Subject], go.Figure]
    noise: Callable[[Subject], str] = lambda _: ""
    wide: bool = False


def importances(data: StudyData, values: Mapping[int, float] | None = None) -> dict[str, dict[str, float]]:
    """How much of the objective's spread each searched key explains, by method; empty for too few trials.

    Args:
        data: The study.
        values: By ticket id, in place of the trials' own.
    """
    usable = [ticket for ticket in data.complete if ticket.params]
    if len(usable) < MIN_IMPORTANCE_TRIALS:
        return {}
    study = optuna_study(data, values)
    found = {}
    for name, evaluator in _evaluators():
        try:
            shares = get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError, ZeroDivisionError):
            # For example equal values everywhere: there is no spread to explain.
            continue
        found[name] = {key: float(share) for key, share in shares.items()}
    return found


def _evaluators() -> Iterator[tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield "fANOVA", FanovaImportanceEvaluator(seed=0)
        yield "PED-ANOVA", PedAnovaImportanceEvaluator()


def main_importance(found: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The one by which keys are ordered."""
    return next(iter(found.values()), {})


def study_plots(data: StudyData, found: Findings, importance: Mapping[str, Mapping[str, float]]) -> tuple[Plot, ...]:
    """All plots of a study, in the order in which they are read."""
    subject = Subject(data, found, importance)
    return tuple(made(spec, subject) for spec in SPECS)


def made(spec: Spec, subject: Subject) -> Plot:
    """One plot, or why it is missing."""
    figure, missing = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = _styled(spec.draw(subject))
    except NoPlotError as error:
        missing = str(error)
    noise = "" if figure is None else spec.noise(subject)
    return Plot(
        key=spec.key,
        title=spec.title,
        caption=spec.caption,
        figure=figure,
        missing=missing,
        wide=spec.wide,
        noise=noise,
    )


# ---- the study in memory ---------------------------------------------------------------------------------------------


def optuna_study(data: StudyData, values: Mapping[int, float] | None = None) -> optuna.Study:
    """The search's finished trials as an Optuna study in memory; `values` as in `importances`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=data.config.name, direction="maximize")
    space = _observed_space(data)
    for ticket in data.tickets:
        params = {key: value for key, value in (ticket.params or {}).items() if key in space}
        value = data.value(ticket) if values is None else values.get(ticket.id)
        if set(params) != set(active_keys(data.config, params)) or value is None or ticket.state not in ENDED_STATES:
            continue
        reported = {row.epoch + 1: row.value for row in data.rows(ticket) if row.value is not None}
        study.add_trial(
            create_trial(
                state=ENDED_STATES[ticket.state],
                value=value,
                params=params,
                distributions={key: space[key] for key in params},
                intermediate_values=reported,
            )
        )
    return study


ENDED_STATES = {TicketState.COMPLETE: TrialState.COMPLETE, TicketState.PRUNED: TrialState.PRUNED}


def _observed_space(data: StudyData) -> dict[str, BaseDistribution]:
    """The study's distributions, widened to the trials that lie outside (imported ones)."""
    space = distributions(data.config)
    for key, entry in space.items():
        seen = [ticket.params[key] for ticket in data.tickets if ticket.params and key in ticket.params]
        if isinstance(entry, FloatDistribution) and seen and not all(entry._contains(value) for value in seen):
            space[key] = FloatDistribution(min([entry.low, *seen]), max([entry.high, *seen]), log=entry.log)
        if isinstance(entry, CategoricalDistribution) and any(value not in entry.choices for value in seen):
            space[key] = CategoricalDistribution(tuple(dict.fromkeys([*entry.choices, *seen])))
    return space


# ---- the plots -------------------------------------------------------------------------------------------------------


def _history(data: StudyData) -> go.Figure:
    ended = [(ticket, data.value(ticket)) for ticket in data.tickets if ticket.state in ENDED_STATES]
    points = [(ticket, value) for ticket, value in ended if value is not None]
    if not points:
        raise NoPlotError("no trial has ended yet")
    figure = go.Figure()
    complete = [(t, value) for t, value in points if t.state is TicketState.COMPLETE]
    pruned = [(t, value) for t, value in points if t.state is TicketState.PRUNED]
    for name, group, symbol in (("pruned", pruned, "circle-open"), ("complete", complete, "circle")):
        figure.add_scatter(
            x=[trial_number(t) for t, _ in group],
            y=[value for _, value in group],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": OTHER, "size": 7},
            text=[_hover(data, t) for t, _ in group],
            hovertemplate="%{text}<extra></extra>",
        )
    _add_best_so_far(figure, complete, last=max(trial_number(ticket) for ticket, _ in points))
    _mark_base_and_best(figure, data)
    figure.update_layout(xaxis_title="trial", yaxis_title=_axis(data))
    return figure


def _add_best_so_far(figure: go.Figure, complete: Sequence[tuple[Ticket, float]], last: int) -> None:
    best, line = -math.inf, []
    for ticket, value in complete:
        best = max(best, value)
        line.append((trial_number(ticket), best))
    line += [(last, best)] if line else []
    figure.add_scatter(
        x=[number for number, _ in line],
        y=[value for _, value in line],
        mode="lines",
        name="best so far",
        line={"color": BEST, "shape": "hv", "width": 2},
        hoverinfo="skip",
    )


def _mark_base_and_best(figure: go.Figure, data: StudyData) -> None:
    """The base's line with the noise band around it, and marks on base and best."""
    _add_base_line(figure, data)
    for name, ticket, colour in (("base", data.base, BASE), ("best", data.best, BEST)):
        if ticket is not None and ticket.value is not None and not (name == "best" and ticket is data.base):
            figure.add_scatter(
                x=[trial_number(ticket)],
                y=[ticket.value],
                mode="markers",
                name=name,
                marker={"color": colour, "size": 13, "symbol": "diamond"},
                text=[_hover(data, ticket)],
                hovertemplate="%{text}<extra></extra>",
            )


def _add_base_line(figure: go.Figure, data: StudyData) -> None:
    if data.base is None:
        return
    figure.add_hline(y=data.base.value, line={"color": BASE, "dash": "dot", "width": 1})
    if data.band is not None:
        figure.add_hrect(y0=data.band[0], y1=data.band[1], fillcolor=BAND_FILL, line_width=0, layer="below")


def _band_text(subject: Subject) -> str:
    """What the band around the base's value is."""
    half = _value_half_band(subject.data)
    return "" if half is None else f"Inside the shaded band (± {half:.3f}) a trial may differ from the base by chance."


def _value_half_band(data: StudyData) -> float | None:
    return None if data.band is None else (data.band[1] - data.band[0]) / 2


def _importance(importance: Mapping[str, Mapping[str, float]]) -> go.Figure:
    if not importance:
        raise NoPlotError(f"fewer than {MIN_IMPORTANCE_TRIALS} complete trials, or all have the same value")
    order = sorted(main_importance(importance), key=lambda key: main_importance(importance)[key])
    figure = go.Figure()
    # Horizontal bars grow upwards: the first method is drawn last, and so on top.
    for (name, shares), colour in reversed(list(zip(importance.items(), (BEST, OTHER), strict=False))):
        figure.add_bar(
            y=order,
            x=[shares.get(key, 0.0) for key in order],
            name=name,
            orientation="h",
            marker_color=colour,
            hovertemplate="%{y}: %{x:.1%}",
        )
    figure.update_layout(
        barmode="group",
        xaxis_title="share of the spread",
        xaxis_tickformat=".0%",
        legend_traceorder="reversed",
        height=max(240, 90 + 52 * len(order)),
    )
    return figure


def _classes(data: StudyData, found: Findings) -> go.Figure:
    if not found.classes:
        raise NoPlotError("base and best are not both complete")
    names = [label(change.name) for change in found.classes]
    figure = go.Figure()
    hover = "%{y:.4f}"
    base, best = [change.base for change in found.classes], [change.best for change in found.classes]
    changes = [f"{change.change:+.3f}" for change in found.classes]
    figure.add_bar(x=names, y=base, name="base", marker_color=BASE, hovertemplate=hover)
    figure.add_bar(
        x=names, y=best, name="best", marker_color=BEST, text=changes, textposition="outside", hovertemplate=hover
    )
    add_class_bands(figure, data, {change.name: change.base for change in found.classes})
    halves = [half_band(data.class_noise.get(change.name, 0.0)) for change in found.classes]
    top = max([*best, *(value + half for value, half in zip(base, halves, strict=True))])
    figure.update_layout(
        barmode="group", bargap=0.35, yaxis={"title": "AP 0.50 to 0.95", "range": [0, top * 1.12 or 1]}
    )
    figure.update_xaxes(type="category")
    return figure


def add_class_bands(figure: go.Figure, data: StudyData, base: Mapping[str, float]) -> None:
    """The noise band of each class around its AP under the base, over axes whose categories are in this order."""
    for place, (name, value) in enumerate(base.items()):
        if name in data.class_noise:
            half = half_band(data.class_noise[name])
            across = {"x0": place - 0.45, "x1": place + 0.45}
            # Above the bars, which would hide it, and so with edges.
            edge = {"color": "rgba(217, 119, 6, 0.7)", "width": 1, "dash": "dot"}
            figure.add_shape(type="rect", y0=value - half, y1=value + half, fillcolor=BAND_FILL, line=edge, **across)


def class_noise_text(subject: Subject) -> str:
    """What the bands of the classes are."""
    data = subject.data
    halves = [half_band(sd) for sd in data.class_noise.values()]
    if not halves:
        return ""
    if confirmed := data.confirmed_classes:
        seeds = {result.seeds for result, _ in confirmed.values()}
        over = " or ".join(map(str, sorted(seeds)))
        return (
            f"Means over {over} paired seeds, as the confirmation compares them. Inside its shaded band a class may "
            f"differ from the base by chance alone: {_span(halves)}."
        )
    return (
        f"Inside its shaded band a class may differ from the base by chance alone: {_span(halves)}, from "
        f"{len(data.base_reruns)} reruns of the base."
    )


def _span(halves: Sequence[float]) -> str:
    low, high = f"{min(halves):.3f}", f"{max(halves):.3f}"
    return f"± {low}" if low == high else f"± {low} to {high}"


def _confirmation(data: StudyData) -> go.Figure:
    if data.confirmation is None:
        raise NoPlotError("nothing was confirmed yet")
    lines = sorted(data.confirmation.comparisons, key=lambda line: line.gain)
    colours = [{"better": BEST, "worse": "#dc2626"}.get(line.verdict, OTHER) for line in lines]
    figure = go.Figure()
    figure.add_scatter(
        x=[line.gain for line in lines],
        y=[label(line.candidate) for line in lines],
        mode="markers",
        error_x={
            "type": "data",
            "array": [line.high - line.gain for line in lines],
            "arrayminus": [line.gain - line.low for line in lines],
            "color": OTHER,
            "thickness": 2,
        },
        marker={"color": colours, "size": 12},
        text=[f"{label(line.verdict)}, p = {line.p_value:.3g}" for line in lines],
        hovertemplate="%{x:+.4f}, %{text}<extra></extra>",
        showlegend=False,
    )
    half = _mean_half_band(data.confirmation)
    figure.add_vrect(x0=-half, x1=half, fillcolor=BAND_FILL, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": BASE, "dash": "dot"})
    figure.update_layout(
        xaxis_title=f"gain in {_axis(data)} over the base", yaxis_type="category", height=150 + 44 * len(lines)
    )
    return figure


def _mean_half_band(confirmation: Confirmation) -> float:
    """Half the band of what is drawn there: means of paired differences, which vary less than a single one."""
    return NORMAL_95 * standard_error(confirmation.noise, confirmation.seeds)


def _confirmation_noise_text(subject: Subject) -> str:
    confirmation = subject.data.confirmation
    if confirmation is None:
        return ""
    return (
        f"Of equal settings the mean over {confirmation.seeds} paired seeds leaves the shaded band "
        f"(± {_mean_half_band(confirmation):.3f}) once in twenty times."
    )


def _curves(data: StudyData) -> go.Figure:
    trained = [ticket for ticket in data.tickets if any(row.value is not None for row in data.rows(ticket))]
    if not trained:
        raise NoPlotError("no epoch was evaluated yet")
    figure = go.Figure()
    for ticket in sorted(trained, key=lambda ticket: _is_special(data, ticket)):
        name, colour = _role(data, ticket)
        special = _is_special(data, ticket)
        rows = [row for row in data.rows(ticket) if row.value is not None]
        figure.add_scatter(
            x=[row.epoch + 1 for row in rows],
            y=[row.value for row in rows],
            mode="lines" if len(rows) > 1 else "markers",
            name=name,
            opacity=1.0 if special else 0.45,
            line={"color": colour, "width": 3 if special else 1},
            showlegend=special,
            hovertemplate=f"{name}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    for rung in rungs(data):
        figure.add_vline(x=rung, line={"color": OTHER, "dash": "dot", "width": 1})
    _add_base_line(figure, data)
    figure.update_layout(xaxis_title="epoch", yaxis_title=_axis(data), xaxis_rangemode="tozero")
    return figure


def rungs(data: StudyData) -> list[int]:
    """Epochs at which the pruner halves; none for pruners that look at every epoch."""
    pruner = data.config.pruner
    inner = pruner.wrapped if isinstance(pruner, PatientPruner) else pruner
    if not isinstance(inner, AshaPruner | HyperbandPruner):
        return []
    found = []
    epoch = inner.min_epochs or 1
    while epoch < data.config.train.epochs:
        found.append(epoch)
        epoch *= inner.reduction_factor
    return found


def _slice(data: StudyData, importance: Mapping[str, float]) -> go.Figure:
    ended = [ticket for ticket in data.tickets if ticket.state in ENDED_STATES and ticket.params]
    points = [(ticket, value) for ticket in ended if (value := data.value(ticket)) is not None]
    if len(points) < 2:
        raise NoPlotError("fewer than two trials have ended")
    keys = _keys(data, importance)
    rows, columns = math.ceil(len(keys) / SLICE_COLUMNS), min(len(keys), SLICE_COLUMNS)
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.3 / rows
    )
    for index, key in enumerate(keys):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        _add_slice(figure, data, key, points, place)
        figure.update_xaxes(title_text=key, **_key_axis(data, key), **place)
    if data.band is not None:
        low, high = data.band
        figure.add_hrect(y0=low, y1=high, fillcolor=BAND_FILL, line_width=0, layer="below", row="all", col="all")
    figure.update_yaxes(title_text=_axis(data), col=1)
    figure.update_layout(
        height=max(HEIGHT, 290 * rows),
        coloraxis={"colorscale": [[0, "#a9bcd3"], [1, "#1d4ed8"]], "showscale": False},
    )
    return figure


def _add_slice(
    figure: go.Figure, data: StudyData, key: str, points: Sequence[tuple[Ticket, float]], place: Mapping[str, int]
) -> None:
    for state, symbol in ((TicketState.PRUNED, "circle-open"), (TicketState.COMPLETE, "circle")):
        chosen = [(ticket, value) for ticket, value in points if ticket.state is state]
        shade = {"color": [trial_number(ticket) for ticket, _ in chosen], "coloraxis": "coloraxis"}
        figure.add_scatter(
            x=[(ticket.params or {}).get(key) for ticket, _ in chosen],
            y=[value for _, value in chosen],
            mode="markers",
            marker={"symbol": symbol, "size": 7, **shade},
            text=[_hover(data, ticket) for ticket, _ in chosen],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            **place,
        )
    for ticket in (data.base, data.best):
        if ticket is not None and key in (ticket.params or {}):
            name, colour = _role(data, ticket)
            figure.add_scatter(
                x=[(ticket.params or {})[key]],
                y=[ticket.value],
                mode="markers",
                marker={"color": colour, "size": 12, "symbol": "diamond"},
                text=[f"{name}<br>{_hover(data, ticket)}"],
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
                **place,
            )


@dataclass(frozen=True, slots=True)
class _Range:
    """The values that trials have of a key."""

    low: float
    high: float
    log: bool
    is_range: bool


def _range(data: StudyData, key: str) -> _Range:
    entry = _observed_space(data)[key]
    if isinstance(entry, FloatDistribution):
        return _Range(entry.low, entry.high, entry.log, is_range=True)
    choices = [float(str(choice)) for choice in entry.choices] if isinstance(entry, CategoricalDistribution) else [0.0]
    return _Range(min(choices), max(choices), log=False, is_range=False)


def _key_axis(data: StudyData, key: str) -> dict[str, Any]:
    """An axis over a key's range, with few round ticks where it is logarithmic."""
    found = _range(data, key)
    if not found.log:
        pad = 0.04 * (found.high - found.low or 1.0)
        return {"type": "linear", "range": [found.low - pad, found.high + pad]}
    ends = math.log10(found.low), math.log10(found.high)
    pad = 0.04 * (ends[1] - ends[0])
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if found.low * 0.99 <= tick <= found.high * 1.01]
    return {
        "type": "log",
        "range": [ends[0] - pad, ends[1] + pad],
        "tickvals": shown,
        "ticktext": [short(tick) for tick in shown],
    }


def _parallel(data: StudyData, importance: Mapping[str, float]) -> go.Figure:
    if len(data.complete) < 2:
        raise NoPlotError("fewer than two trials are complete")
    values = [ticket.value or 0.0 for ticket in data.complete]
    dimensions = [{"label": _axis(data), "values": values}]
    dimensions += [dimension(data, key) for key in _keys(data, importance)]
    line = {"color": values, "colorscale": _value_colours(data, min(values), max(values))}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelfont={"size": 13}))
    figure.update_layout(margin={"l": 48, "r": 44, "t": 48, "b": 24})
    return figure


def _value_colours(data: StudyData, low: float, high: float) -> list[list[float | str]]:
    """Colours of values from `low` to `high`; with a noise band in steps: below it, in it, above it."""
    if data.band is None or high <= low:
        return [[0.0, BELOW], [1.0, BEST]]
    first, last = (min(1.0, max(0.0, (end - low) / (high - low))) for end in data.band)
    return [[0.0, BELOW], [first, BELOW], [first, BASE], [last, BASE], [last, BEST], [1.0, BEST]]


def _parallel_noise_text(subject: Subject) -> str:
    half = _value_half_band(subject.data)
    if half is None:
        return ""
    return f"Amber lines lie in the noise band, ± {half:.3f} around the base; green ones above it, grey ones below."


def dimension(data: StudyData, key: str) -> dict[str, Any]:
    """One axis of parallel coordinates of the complete trials, logarithmic where the key is searched so."""
    values = [float((ticket.params or {}).get(key, math.nan)) for ticket in data.complete]
    found = _range(data, key)
    if not found.log:
        return {"label": key, "values": values, "range": [found.low, found.high]}
    low, high = math.log10(found.low), math.log10(found.high)
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    return {
        "label": key,
        "values": [math.log10(value) for value in values],
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [short(10**tick) for tick in ticks],
    }


def _contour(data: StudyData, importance: Mapping[str, float]) -> go.Figure:
    keys = [key for key in _keys(data, importance) if _range(data, key).is_range][:CONTOUR_KEYS]
    if len(keys) < CONTOUR_KEYS:
        raise NoPlotError("fewer than two hyperparameters are searched over a range")
    if len(data.complete) < MIN_IMPORTANCE_TRIALS:
        raise NoPlotError(f"fewer than {MIN_IMPORTANCE_TRIALS} trials are complete")
    figure = optuna.visualization.plot_contour(_complete_only(data), params=keys)
    bar = {"title": {"text": _axis(data)}, "thickness": 12}
    look = {"colorscale": "Tealgrn", "reversescale": False, "line_width": 0, "colorbar": bar}
    figure.update_traces(look, selector={"type": "contour"})
    _add_band_lines(figure, data)
    shown = [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    figure.update_layout(title=None)
    for axis, key in zip((figure.update_xaxes, figure.update_yaxes), shown, strict=True):
        ticks = _key_axis(data, str(key))
        axis({name: ticks[name] for name in ("tickvals", "ticktext") if name in ticks})
    return figure


def _add_band_lines(figure: go.Figure, data: StudyData) -> None:
    """Where the interpolated value enters and leaves the noise band."""
    drawn = next(iter(figure.select_traces(selector={"type": "contour"})), None)
    if data.band is None or drawn is None:
        return
    low, high = data.band
    figure.add_contour(
        x=drawn.x,
        y=drawn.y,
        z=drawn.z,
        connectgaps=True,
        contours={"start": low, "end": high, "size": high - low, "coloring": "none"},
        line={"color": BASE, "dash": "dash", "width": 2},
        showscale=False,
        showlegend=False,
        hoverinfo="skip",
    )


def _contour_noise_text(subject: Subject) -> str:
    half = _value_half_band(subject.data)
    if half is None:
        return ""
    return (
        f"Dashed lines, where there are any, bound the region of the noise band, ± {half:.3f} around the base: colours "
        "inside it are not told apart by single runs."
    )


def _complete_only(data: StudyData) -> optuna.Study:
    """Without pruned trials: their values are of other epochs."""
    study = optuna_study(data)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    found = optuna.create_study(study_name=data.config.name, direction="maximize")
    found.add_trials(complete)
    return found


def _precision_recall(data: StudyData) -> go.Figure:
    points = [(ticket, metrics) for ticket in data.complete if "precision" in (metrics := data.metrics(ticket))]
    if len(points) < 2:
        raise NoPlotError("fewer than two trials are complete")
    figure = go.Figure()
    pairs = [(metrics["recall"], metrics["precision"]) for _, metrics in points]
    add_staircase(figure, [pairs[index] for index in non_dominated(pairs)], "beaten in both by none")
    for ticket, metrics in sorted(points, key=lambda point: _is_special(data, point[0])):
        name, colour = _role(data, ticket)
        special = _is_special(data, ticket)
        figure.add_scatter(
            x=[metrics["recall"]],
            y=[metrics["precision"]],
            mode="markers",
            name=name,
            showlegend=special,
            **(_error_bars(data) if special else {}),
            marker={"color": colour, "size": 13 if special else 8, "symbol": "diamond" if special else "circle"},
            text=[_hover(data, ticket)],
            hovertemplate="%{text}<br>recall %{x:.3f}, precision %{y:.3f}<extra></extra>",
        )
    figure.update_layout(xaxis_title="recall", yaxis_title="precision")
    return figure


def add_staircase(figure: go.Figure, points: Sequence[tuple[float, float]], name: str, **place: int) -> None:
    """The edge of what the points of a front reach, given from the right to the left."""
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        name=name,
        # From a point to the left at its own height: nothing is reached above and right of a corner.
        line={"color": OTHER, "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
        **place,
    )


def _error_bars(data: StudyData) -> dict[str, Any]:
    """One standard deviation of a run to either side, where it is known."""
    return {
        f"error_{axis}": {"type": "constant", "value": data.metric_noise[metric], "thickness": 1.5, "width": 3}
        for axis, metric in (("x", "recall"), ("y", "precision"))
        if metric in data.metric_noise
    }


def _precision_recall_noise_text(subject: Subject) -> str:
    noise = subject.data.metric_noise
    if not {"precision", "recall"} <= set(noise):
        return ""
    return (
        f"The bars are one standard deviation of a run, {noise['recall']:.3f} in recall and "
        f"{noise['precision']:.3f} in precision, from {len(subject.data.base_reruns)} reruns of the base."
    )


def _role(data: StudyData, ticket: Ticket) -> tuple[str, str]:
    """What a trial is called, and its colour."""
    if data.base is not None and ticket.id == data.base.id:
        return "base", BASE
    if data.best is not None and ticket.id == data.best.id:
        return "best", BEST
    return f"trial {trial_number(ticket)}", OTHER


def _is_special(data: StudyData, ticket: Ticket) -> bool:
    return _role(data, ticket)[1] != OTHER


def _keys(data: StudyData, importance: Mapping[str, float]) -> tuple[str, ...]:
    """The searched keys, the most important first."""
    return tuple(sorted(distributions(data.config), key=lambda key: -importance.get(key, 0.0)))


def trial_number(ticket: Ticket) -> int:
    """A trial's number, or as long as it has none its ticket's."""
    return ticket.number if ticket.trial_number is None else ticket.trial_number


def _hover(data: StudyData, ticket: Ticket) -> str:
    value = data.value(ticket)
    lines = [
        f"trial {trial_number(ticket)}, {ticket.state.lower()}",
        "" if value is None else f"{data.metric} {value:.4f}",
    ]
    lines += [f"{key} {number:.3g}" for key, number in (ticket.params or {}).items()]
    return "<br>".join(label(line) for line in lines if line)


def _axis(data: StudyData) -> str:
    return label(data.metric.removeprefix("the "))


def label(text: str) -> str:
    """A text as it is: plotly reads a subset of HTML in labels."""
    return html.escape(text, quote=False)


def _styled(figure: go.Figure) -> go.Figure:
    """Without a ground of its own: light or dark is the page's."""
    line = "rgba(100, 116, 139, 0.25)"
    axis = {"gridcolor": line, "linecolor": line, "zeroline": False, "automargin": True}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": OTHER},
        margin=figure.layout.margin if figure.layout.margin.l else {"l": 10, "r": 10, "t": 28, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
    )
    if figure.layout.height is None:
        figure.update_layout(height=HEIGHT)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


# ---- the list -------------------------------------------------------------------------------------------------------

SPECS = (
    Spec(
        key="history",
        title="Trials in order",
        caption="Every trial's value when it ended. The line is the best so far; hollow marks were pruned early, "
        "so their values are not comparable.",
        draw=lambda subject: _history(subject.data),
        noise=_band_text,
    ),
    Spec(
        key="importance",
        title="What mattered",
        caption="How much of the spread of the values each hyperparameter explains. fANOVA looks at the whole "
        "space, PED-ANOVA at the best trials. Where they disagree, neither is certain.",
        draw=lambda subject: _importance(subject.methods),
    ),
    Spec(
        key="classes",
        title="Each class against the base",
        caption="Average precision (IoU 0.50 to 0.95) of each class, best trial against base.",
        draw=lambda subject: _classes(subject.data, subject.found),
        noise=class_noise_text,
    ),
    Spec(
        key="confirmation",
        title="Base and candidates over paired seeds",
        caption="The mean gain over the same seeds with its interval; right of zero by the whole interval means "
        "better.",
        draw=lambda subject: _confirmation(subject.data),
        noise=_confirmation_noise_text,
    ),
    Spec(
        key="curves",
        title="Epoch by epoch",
        caption="The value of every trial after each evaluated epoch. Grey ends early where the pruner stopped a "
        "trial.",
        draw=lambda subject: _curves(subject.data),
        noise=_band_text,
    ),
    Spec(
        key="slice",
        title="One hyperparameter at a time",
        caption="The value of complete and pruned trials over each hyperparameter, later trials darker.",
        draw=lambda subject: _slice(subject.data, subject.importance),
        noise=_band_text,
        wide=True,
    ),
    Spec(
        key="parallel",
        title="All hyperparameters together",
        caption="Each line is a complete trial. Drag along an axis to select a range.",
        draw=lambda subject: _parallel(subject.data, subject.importance),
        noise=_parallel_noise_text,
        wide=True,
    ),
    Spec(
        key="contour",
        title="The two that mattered most",
        caption="The value, interpolated between trials. Far from any dot it is a guess.",
        draw=lambda subject: _contour(subject.data, subject.importance),
        noise=_contour_noise_text,
    ),
    Spec(
        key="precision_recall",
        title="Precision against recall",
        caption="Complete trials. The study maximises its objective, not these two; on the dotted line are the trials "
        "that no other beats in both.",
        draw=lambda subject: _precision_recall(subject.data),
        noise=_precision_recall_noise_text,
    ),
)


# ---- in a page -------------------------------------------------------------------------------------------------------


@cache
def packed_plotly() -> str:
    """The JavaScript of plotly from the package, compressed (a third of its size), as base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def figure_json(figure: go.Figure) -> str:
    """A figure for a `<script>` element: nothing in it can close the element."""
    text: str = figure.to_json()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
