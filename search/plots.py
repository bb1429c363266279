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
from search.review import Findings, StudyData, short
from search.settings import AshaPruner, HyperbandPruner, PatientPruner
from search.space import distributions
from search.transforms import active_keys

BEST, BASE, OTHER, BAND_FILL = "#0d9488", "#d97706", "#64748b", "rgba(217, 119, 6, 0.14)"
"""Readable on white and on black; the band is the base's colour."""

CONTOUR_KEYS = 2
SLICE_COLUMNS = 3
HEIGHT = 380
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


@dataclass(frozen=True, slots=True)
class _Subject:
    """What plots are drawn from."""

    data: StudyData
    found: Findings
    methods: Mapping[str, Mapping[str, float]]

    @property
    def importance(self) -> Mapping[str, float]:
        """By which keys are ordered."""
        return main_importance(self.methods)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    key: str
    title: str
    caption: str
    draw: Callable[[_Subject], go.Figure]
    wide: bool = False


def importances(data: StudyData) -> dict[str, dict[str, float]]:
    """How much of the objective's spread each searched key explains, by method; empty for too few trials."""
    usable = [ticket for ticket in data.complete if ticket.params]
    if len(usable) < MIN_IMPORTANCE_TRIALS:
        return {}
    study = optuna_study(data)
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
    subject = _Subject(data, found, importance)
    return tuple(_made(spec, subject) for spec in _SPECS)


def _made(spec: _Spec, subject: _Subject) -> Plot:
    figure, missing = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = _styled(spec.draw(subject))
    except NoPlotError as error:
        missing = str(error)
    return Plot(key=spec.key, title=spec.title, caption=spec.caption, figure=figure, missing=missing, wide=spec.wide)


# ---- the study in memory ---------------------------------------------------------------------------------------------


def optuna_study(data: StudyData) -> optuna.Study:
    """The search's finished trials as an Optuna study in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=data.config.name, direction="maximize")
    space = _observed_space(data)
    for ticket in data.tickets:
        params = {key: value for key, value in (ticket.params or {}).items() if key in space}
        value = data.value(ticket)
        if set(params) != set(active_keys(data.config, params)) or value is None or ticket.state not in _STATES:
            continue
        reported = {row.epoch + 1: row.value for row in data.rows(ticket) if row.value is not None}
        study.add_trial(
            create_trial(
                state=_STATES[ticket.state],
                value=value,
                params=params,
                distributions={key: space[key] for key in params},
                intermediate_values=reported,
            )
        )
    return study


_STATES = {TicketState.COMPLETE: TrialState.COMPLETE, TicketState.PRUNED: TrialState.PRUNED}


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
    ended = [(ticket, data.value(ticket)) for ticket in data.tickets if ticket.state in _STATES]
    points = [(ticket, value) for ticket, value in ended if value is not None]
    if not points:
        raise NoPlotError("no trial has ended yet")
    figure = go.Figure()
    complete = [(t, value) for t, value in points if t.state is TicketState.COMPLETE]
    pruned = [(t, value) for t, value in points if t.state is TicketState.PRUNED]
    for name, group, symbol in (("pruned", pruned, "circle-open"), ("complete", complete, "circle")):
        figure.add_scatter(
            x=[_number(t) for t, _ in group],
            y=[value for _, value in group],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "color": OTHER, "size": 7},
            text=[_hover(data, t) for t, _ in group],
            hovertemplate="%{text}<extra></extra>",
        )
    _add_best_so_far(figure, complete, last=max(_number(ticket) for ticket, _ in points))
    _mark_base_and_best(figure, data)
    figure.update_layout(xaxis_title="trial", yaxis_title=_axis(data))
    return figure


def _add_best_so_far(figure: go.Figure, complete: Sequence[tuple[Ticket, float]], last: int) -> None:
    best, line = -math.inf, []
    for ticket, value in complete:
        best = max(best, value)
        line.append((_number(ticket), best))
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
                x=[_number(ticket)],
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


def _classes(found: Findings) -> go.Figure:
    if not found.classes:
        raise NoPlotError("base and best are not both complete")
    names = [_label(change.name) for change in found.classes]
    figure = go.Figure()
    hover = "%{y:.4f}"
    base, best = [change.base for change in found.classes], [change.best for change in found.classes]
    changes = [f"{change.change:+.3f}" for change in found.classes]
    figure.add_bar(x=names, y=base, name="base", marker_color=BASE, hovertemplate=hover)
    figure.add_bar(
        x=names, y=best, name="best", marker_color=BEST, text=changes, textposition="outside", hovertemplate=hover
    )
    top = max([*base, *best])
    figure.update_layout(
        barmode="group", bargap=0.35, yaxis={"title": "AP 0.50 to 0.95", "range": [0, top * 1.12 or 1]}
    )
    figure.update_xaxes(type="category")
    return figure


def _confirmation(data: StudyData) -> go.Figure:
    if data.confirmation is None:
        raise NoPlotError("nothing was confirmed yet")
    lines = sorted(data.confirmation.comparisons, key=lambda line: line.gain)
    colours = [{"better": BEST, "worse": "#dc2626"}.get(line.verdict, OTHER) for line in lines]
    figure = go.Figure()
    figure.add_scatter(
        x=[line.gain for line in lines],
        y=[_label(line.candidate) for line in lines],
        mode="markers",
        error_x={
            "type": "data",
            "array": [line.high - line.gain for line in lines],
            "arrayminus": [line.gain - line.low for line in lines],
            "color": OTHER,
            "thickness": 2,
        },
        marker={"color": colours, "size": 12},
        text=[f"{_label(line.verdict)}, p = {line.p_value:.3g}" for line in lines],
        hovertemplate="%{x:+.4f}, %{text}<extra></extra>",
        showlegend=False,
    )
    half = 1.96 * math.sqrt(2) * data.confirmation.noise
    figure.add_vrect(x0=-half, x1=half, fillcolor=BAND_FILL, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": BASE, "dash": "dot"})
    figure.update_layout(
        xaxis_title=f"gain in {_axis(data)} over the base", yaxis_type="category", height=150 + 44 * len(lines)
    )
    return figure


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
    for rung in _rungs(data):
        figure.add_vline(x=rung, line={"color": OTHER, "dash": "dot", "width": 1})
    _add_base_line(figure, data)
    figure.update_layout(xaxis_title="epoch", yaxis_title=_axis(data), xaxis_rangemode="tozero")
    return figure


def _rungs(data: StudyData) -> list[int]:
    """Epochs at which the pruner halves; none for pruners that look at every epoch."""
    pruner = data.config.pruner
    inner = pruner.wrapped if isinstance(pruner, PatientPruner) else pruner
    if not isinstance(inner, AshaPruner | HyperbandPruner):
        return []
    rungs = []
    epoch = inner.min_epochs or 1
    while epoch < data.config.train.epochs:
        rungs.append(epoch)
        epoch *= inner.reduction_factor
    return rungs


def _slice(data: StudyData, importance: Mapping[str, float]) -> go.Figure:
    ended = [ticket for ticket in data.tickets if ticket.state in _STATES and ticket.params]
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
        shade = {"color": [_number(ticket) for ticket, _ in chosen], "coloraxis": "coloraxis"}
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
    dimensions += [_dimension(data, key) for key in _keys(data, importance)]
    line = {"color": values, "colorscale": [[0, "#94a3b8"], [1, BEST]]}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelfont={"size": 13}))
    figure.update_layout(margin={"l": 48, "r": 44, "t": 48, "b": 24})
    return figure


def _dimension(data: StudyData, key: str) -> dict[str, Any]:
    """One axis of the parallel coordinates, logarithmic where the key is searched so."""
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
    shown = [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    figure.update_layout(title=None)
    for axis, key in zip((figure.update_xaxes, figure.update_yaxes), shown, strict=True):
        ticks = _key_axis(data, str(key))
        axis({name: ticks[name] for name in ("tickvals", "ticktext") if name in ticks})
    return figure


def _complete_only(data: StudyData) -> optuna.Study:
    """Without pruned trials: their values are of other epochs."""
    study = optuna_study(data)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    found = optuna.create_study(study_name=data.config.name, direction="maximize")
    found.add_trials(complete)
    return found


def _front(data: StudyData) -> go.Figure:
    points = [(ticket, metrics) for ticket in data.complete if "precision" in (metrics := data.metrics(ticket))]
    if len(points) < 2:
        raise NoPlotError("fewer than two trials are complete")
    figure = go.Figure()
    front, best_precision = [], -math.inf
    for _, metrics in sorted(points, key=lambda point: (-point[1]["recall"], -point[1]["precision"])):
        if metrics["precision"] > best_precision:
            best_precision = metrics["precision"]
            front.append(metrics)
    figure.add_scatter(
        x=[metrics["recall"] for metrics in front],
        y=[metrics["precision"] for metrics in front],
        mode="lines",
        name="front",
        line={"color": OTHER, "dash": "dot", "shape": "vh"},
        hoverinfo="skip",
    )
    for ticket, metrics in sorted(points, key=lambda point: _is_special(data, point[0])):
        name, colour = _role(data, ticket)
        special = _is_special(data, ticket)
        figure.add_scatter(
            x=[metrics["recall"]],
            y=[metrics["precision"]],
            mode="markers",
            name=name,
            showlegend=special,
            marker={"color": colour, "size": 13 if special else 8, "symbol": "diamond" if special else "circle"},
            text=[_hover(data, ticket)],
            hovertemplate="%{text}<br>recall %{x:.3f}, precision %{y:.3f}<extra></extra>",
        )
    figure.update_layout(xaxis_title="recall", yaxis_title="precision")
    return figure


def _role(data: StudyData, ticket: Ticket) -> tuple[str, str]:
    """What a trial is called, and its colour."""
    if data.base is not None and ticket.id == data.base.id:
        return "base", BASE
    if data.best is not None and ticket.id == data.best.id:
        return "best", BEST
    return f"trial {_number(ticket)}", OTHER


def _is_special(data: StudyData, ticket: Ticket) -> bool:
    return _role(data, ticket)[1] != OTHER


def _keys(data: StudyData, importance: Mapping[str, float]) -> tuple[str, ...]:
    """The searched keys, the most important first."""
    return tuple(sorted(distributions(data.config), key=lambda key: -importance.get(key, 0.0)))


def _number(ticket: Ticket) -> int:
    return ticket.number if ticket.trial_number is None else ticket.trial_number


def _hover(data: StudyData, ticket: Ticket) -> str:
    value = data.value(ticket)
    lines = [f"trial {_number(ticket)}, {ticket.state.lower()}", "" if value is None else f"{data.metric} {value:.4f}"]
    lines += [f"{key} {number:.3g}" for key, number in (ticket.params or {}).items()]
    return "<br>".join(_label(line) for line in lines if line)


def _axis(data: StudyData) -> str:
    return _label(data.metric.removeprefix("the "))


def _label(text: str) -> str:
    """Text as it is: plotly reads a subset of HTML in labels."""
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

_SPECS = (
    _Spec(
        key="history",
        title="Trials in order",
        caption="Every trial's value when it ended. The line is the best so far; hollow marks were pruned early, "
        "so their values are not comparable.",
        draw=lambda subject: _history(subject.data),
    ),
    _Spec(
        key="importance",
        title="What mattered",
        caption="How much of the spread of the values each hyperparameter explains. fANOVA looks at the whole "
        "space, PED-ANOVA at the best trials. Where they disagree, neither is certain.",
        draw=lambda subject: _importance(subject.methods),
    ),
    _Spec(
        key="classes",
        title="Each class against the base",
        caption="Average precision (IoU 0.50 to 0.95) of each class, best trial against base.",
        draw=lambda subject: _classes(subject.found),
    ),
    _Spec(
        key="confirmation",
        title="Base and candidates over paired seeds",
        caption="The mean gain over the same seeds with its interval; right of zero by the whole interval means "
        "better.",
        draw=lambda subject: _confirmation(subject.data),
    ),
    _Spec(
        key="curves",
        title="Epoch by epoch",
        caption="The value of every trial after each evaluated epoch. Grey ends early where the pruner stopped a "
        "trial.",
        draw=lambda subject: _curves(subject.data),
    ),
    _Spec(
        key="slice",
        title="One hyperparameter at a time",
        caption="The value of complete and pruned trials over each hyperparameter, later trials darker.",
        draw=lambda subject: _slice(subject.data, subject.importance),
        wide=True,
    ),
    _Spec(
        key="parallel",
        title="All hyperparameters together",
        caption="Each line is a complete trial. Drag along an axis to select a range.",
        draw=lambda subject: _parallel(subject.data, subject.importance),
        wide=True,
    ),
    _Spec(
        key="contour",
        title="The two that mattered most",
        caption="The value, interpolated between trials. Far from any dot it is a guess.",
        draw=lambda subject: _contour(subject.data, subject.importance),
    ),
    _Spec(
        key="front",
        title="The trade between precision and recall",
        caption="Complete trials. On the line are those that no other beats in both.",
        draw=lambda subject: _front(subject.data),
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
