"""The plots of a study of several objectives: its Pareto front first, then what made it.

As in `search.plots` everything is drawn from the ledger's rows, and a plot that cannot be made says why in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.ledger import Ticket
from search.plots import (
    BAND_FILL,
    BASE,
    BELOW,
    BEST,
    HEIGHT,
    MIN_IMPORTANCE_TRIALS,
    OTHER,
    NoPlotError,
    Plot,
    Spec,
    Subject,
    add_class_bands,
    add_staircase,
    class_noise_text,
    dimension,
    importances,
    label,
    made,
    trial_number,
)
from search.review import Findings, StudyData, half_band, listed
from search.space import distributions

PALETTE = (BEST, OTHER, "#7c3aed", "#2563eb", "#db2777", "#65a30d")
"""One for each objective; from the start again where there are more."""

PAIR = 2
"""So many objectives make one plot, more make a matrix."""

PANEL = 250
"""Height of one of several panels."""

Point = tuple[Ticket, Mapping[str, float]]
"""A complete trial and its value under each objective."""


def objective_importances(data: StudyData) -> dict[str, dict[str, float]]:
    """How much of each objective's spread each searched key explains (fANOVA); {} for too few trials."""
    found = {}
    for name in data.objective_names:
        shares = importances(data, {ticket.id: values[name] for ticket, values in _points(data)})
        if "fANOVA" in shares:
            found[name] = shares["fANOVA"]
    return found


def front_plots(data: StudyData, found: Findings, importance: Mapping[str, Mapping[str, float]]) -> tuple[Plot, ...]:
    """All plots of a study of several objectives, in the order in which they are read.

    Args:
        data: The study.
        found: What it has found.
        importance: By objective, from `objective_importances`.
    """
    subject = Subject(data, found, importance)
    # A matrix of pairs needs more room than a phone has.
    is_matrix = len(data.objective_names) > PAIR
    specs = [replace(spec, wide=spec.wide or (is_matrix and spec.key == "front")) for spec in SPECS]
    return tuple(made(spec, subject) for spec in specs)


def _points(data: StudyData) -> list[Point]:
    """Complete trials, those that are to be seen best last: the others, the front, the base."""
    found = [(ticket, data.objective_values(ticket)) for ticket in data.complete if ticket.objective_values]
    return sorted(found, key=lambda point: (_role(data, point[0]) != "trial", _role(data, point[0]) == "base"))


def _role(data: StudyData, ticket: Ticket) -> str:
    if data.base is not None and ticket.id == data.base.id:
        return "base"
    return "front" if any(ticket.id == one.id for one in data.front) else "trial"


def _groups(data: StudyData) -> list[tuple[str, list[Point], dict[str, Any]]]:
    """What is drawn alike: its name, its trials, its marker."""
    points = _points(data)
    looks = {
        "trial": ("other trials", {"color": OTHER, "size": 7}),
        "front": ("on the front", {"color": BEST, "size": 11}),
        "base": ("base", {"color": BASE, "size": 14, "symbol": "diamond"}),
    }
    return [
        (name, [point for point in points if _role(data, point[0]) == role], look)
        for role, (name, look) in looks.items()
    ]


def _hover(data: StudyData, ticket: Ticket) -> str:
    lines = [f"trial {trial_number(ticket)}"]
    lines += [f"{name} {value:.4f}" for name, value in data.objective_values(ticket).items()]
    lines += [f"{key} {number:.3g}" for key, number in (ticket.params or {}).items()]
    return "<br>".join(map(label, lines))


# ---- the front -------------------------------------------------------------------------------------------------------


def _front(data: StudyData) -> go.Figure:
    if len(_points(data)) < 2:
        raise NoPlotError("fewer than two trials are complete")
    names = data.objective_names
    if len(names) > PAIR:
        return _front_pairs(data)
    figure = go.Figure()
    _add_front(figure, data, names[0], names[1])
    values = [data.objective_values(ticket) for ticket in data.front]
    add_staircase(figure, [(one[names[0]], one[names[1]]) for one in values], "front")
    figure.update_layout(xaxis_title=label(names[0]), yaxis_title=label(names[1]), height=HEIGHT + 60)
    return figure


def _front_pairs(data: StudyData) -> go.Figure:
    """Every pair of objectives once, as the lower half of a matrix."""
    names = data.objective_names
    size = len(names) - 1
    figure = make_subplots(
        rows=size, cols=size, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.04
    )
    for row, upright in enumerate(names[1:], start=1):
        for column, across in enumerate(names[:row], start=1):
            _add_front(figure, data, across, upright, row=row, col=column)
            figure.update_xaxes(showticklabels=row == size, row=row, col=column)
        figure.update_yaxes(title_text=label(upright), row=row, col=1)
        for column in range(row + 1, size + 1):  # every pair once
            figure.update_xaxes(visible=False, row=row, col=column)
            figure.update_yaxes(visible=False, row=row, col=column)
    for column, across in enumerate(names[:-1], start=1):
        figure.update_xaxes(title_text=label(across), row=size, col=column)
    figure.update_layout(height=max(HEIGHT, 90 + PANEL * size))
    return figure


def _add_front(figure: go.Figure, data: StudyData, across: str, upright: str, **place: int) -> None:
    """The trials by two objectives, with the noise around the base and on the front."""
    for name, points, look in _groups(data):
        bars = {} if name == "other trials" else _error_bars(data, across, upright)
        figure.add_scatter(
            x=[values[across] for _, values in points],
            y=[values[upright] for _, values in points],
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=bool(points) and place in ({}, {"row": 1, "col": 1}),
            marker=look,
            text=[_hover(data, ticket) for ticket, _ in points],
            hovertemplate="%{text}<extra></extra>",
            **bars,
            **place,
        )
    _add_strips(figure, data, across, upright, place)


def _error_bars(data: StudyData, across: str, upright: str) -> dict[str, Any]:
    """One standard deviation of a run to either side, where it is known."""
    noise = data.objective_noise
    return {
        f"error_{axis}": {"type": "constant", "value": noise[name], "thickness": 1, "width": 3}
        for axis, name in (("x", across), ("y", upright))
        if name in noise
    }


def _add_strips(figure: go.Figure, data: StudyData, across: str, upright: str, place: Mapping[str, int]) -> None:
    """Around the base's two values the bands in which a trial may differ from it by chance."""
    if data.base is None:
        return
    values, noise = data.objective_values(data.base), data.objective_noise
    look = {"fillcolor": BAND_FILL, "line_width": 0, "layer": "below", **place}
    if across in noise:
        low, high = values[across] - half_band(noise[across]), values[across] + half_band(noise[across])
        figure.add_vrect(x0=low, x1=high, **look)
    if upright in noise:
        low, high = values[upright] - half_band(noise[upright]), values[upright] + half_band(noise[upright])
        figure.add_hrect(y0=low, y1=high, **look)


def _front_noise_text(subject: Subject) -> str:
    noise = subject.data.objective_noise
    if not noise:
        return ""
    reruns = len(subject.data.base_reruns)
    bars = listed([f"{sd:.3f} in {name}" for name, sd in noise.items()])
    return (
        f"The bars are one standard deviation of a run, {bars}, from {reruns} reruns of the base. Inside a shaded "
        "strip a trial may differ from the base in that objective by chance."
    )


# ---- the other plots -------------------------------------------------------------------------------------------------


def _history(data: StudyData) -> go.Figure:
    """Every objective over the trials' numbers, one panel below the other."""
    if not _points(data):
        raise NoPlotError("no trial is complete yet")
    names = data.objective_names
    figure = make_subplots(rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=0.15 / len(names))
    for row, objective in enumerate(names, start=1):
        for name, points, look in _groups(data):
            figure.add_scatter(
                x=[trial_number(ticket) for ticket, _ in points],
                y=[values[objective] for _, values in points],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=bool(points) and row == 1,
                marker=look,
                text=[_hover(data, ticket) for ticket, _ in points],
                hovertemplate="%{text}<extra></extra>",
                row=row,
                col=1,
            )
        _add_base_band(figure, data, objective, row)
        figure.update_yaxes(title_text=label(objective), row=row, col=1)
    figure.update_xaxes(title_text="trial", row=len(names), col=1)
    figure.update_layout(height=max(HEIGHT, 60 + 190 * len(names)))
    return figure


def _add_base_band(figure: go.Figure, data: StudyData, objective: str, row: int) -> None:
    if data.base is None:
        return
    value, sd = data.objective_values(data.base)[objective], data.objective_noise.get(objective)
    figure.add_hline(y=value, line={"color": BASE, "dash": "dot", "width": 1}, row=row, col=1)
    if sd is not None:
        low, high = value - half_band(sd), value + half_band(sd)
        figure.add_hrect(y0=low, y1=high, fillcolor=BAND_FILL, line_width=0, layer="below", row=row, col=1)


def _bands_text(subject: Subject) -> str:
    noise = subject.data.objective_noise
    if not noise:
        return ""
    sizes = listed([f"± {half_band(sd):.3f} in {name}" for name, sd in noise.items()])
    return f"Inside the shaded bands ({sizes}) a trial may differ from the base by chance."


def _classes(data: StudyData) -> go.Figure:
    """Each class's AP under the trials of the front and under the base."""
    base = {} if data.base is None else data.class_ap(data.base)
    front = [(ticket, data.class_ap(ticket)) for ticket in data.front]
    names = [name for name in base or (front[0][1] if front else {}) if all(name in ap for _, ap in front)]
    if not names or not front:
        raise NoPlotError("no trial of the front has an AP of each class")
    figure = go.Figure()
    add_class_bands(figure, data, {name: base[name] for name in names if name in base})
    ticks = [label(name) for name in names]
    others = [(ticket, ap) for ticket, ap in front if _role(data, ticket) != "base"]
    figure.add_scatter(
        x=[name for _ in others for name in ticks],
        y=[ap[name] for _, ap in others for name in names],
        mode="markers",
        name="on the front",
        marker={"color": BEST, "size": 9, "opacity": 0.75},
        text=[f"trial {trial_number(ticket)}" for ticket, _ in others for _ in names],
        hovertemplate="%{text}: %{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=ticks if base else [],
        y=[base[name] for name in names] if base else [],
        mode="markers",
        name="base",
        marker={"color": BASE, "size": 13, "symbol": "diamond"},
        hovertemplate="base: %{y:.4f}<extra></extra>",
    )
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=ticks)
    figure.update_layout(yaxis_title="AP 0.50 to 0.95")
    return figure


def _importance(importance: Mapping[str, Mapping[str, float]]) -> go.Figure:
    if not importance:
        raise NoPlotError(f"fewer than {MIN_IMPORTANCE_TRIALS} complete trials, or all have the same values")
    first = next(iter(importance.values()))
    order = sorted(first, key=lambda key: first[key])
    figure = go.Figure()
    # Horizontal bars grow upwards: the first objective is drawn last, and so on top.
    for index, (name, shares) in reversed(list(enumerate(importance.items()))):
        figure.add_bar(
            y=order,
            x=[shares.get(key, 0.0) for key in order],
            name=label(name),
            orientation="h",
            marker_color=PALETTE[index % len(PALETTE)],
            hovertemplate="%{y}: %{x:.1%}",
        )
    height = max(240, 90 + (24 + 14 * len(importance)) * len(order))
    figure.update_layout(
        barmode="group",
        xaxis_title="share of the spread",
        xaxis_tickformat=".0%",
        legend_traceorder="reversed",
        height=height,
    )
    return figure


def _parallel(data: StudyData, importance: Mapping[str, float]) -> go.Figure:
    """An axis for each objective, then one for each searched key, a line for each complete trial."""
    if len(_points(data)) < 2:
        raise NoPlotError("fewer than two trials are complete")
    # Lines are drawn in the order of their values: the base comes last.
    levels = {"trial": 0.0, "front": 1.0, "base": 2.0}
    values = [data.objective_values(ticket) for ticket in data.complete]
    dimensions = [{"label": label(name), "values": [one[name] for one in values]} for name in data.objective_names]
    keys = sorted(distributions(data.config), key=lambda key: -importance.get(key, 0.0))
    dimensions += [dimension(data, key) for key in keys]
    line = {
        "color": [levels[_role(data, ticket)] for ticket in data.complete],
        "colorscale": [[0, BELOW], [0.25, BELOW], [0.25, BEST], [0.75, BEST], [0.75, BASE], [1, BASE]],
        "cmin": 0,
        "cmax": 2,
    }
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelfont={"size": 13}))
    figure.update_layout(margin={"l": 48, "r": 44, "t": 48, "b": 24})
    return figure


def _parallel_noise_text(subject: Subject) -> str:
    noise = subject.data.objective_noise
    if not noise:
        return ""
    sizes = listed([f"± {half_band(sd):.3f} in {name}" for name, sd in noise.items()])
    return f"Two runs of equal settings differ by chance: {sizes}."


SPECS = (
    Spec(
        key="front",
        title="The Pareto front",
        caption="Complete trials by the study's objectives. The front is made up by those that no other trial equals "
        "or beats in everything. Right of and above the base a trial is better in both.",
        draw=lambda subject: _front(subject.data),
        noise=_front_noise_text,
    ),
    Spec(
        key="classes",
        title="Each class against the base",
        caption="Average precision (IoU 0.50 to 0.95) of each class, the trials of the front against the base.",
        draw=lambda subject: _classes(subject.data),
        noise=class_noise_text,
    ),
    Spec(
        key="history",
        title="Trials in order",
        caption="Every complete trial's values. The dotted lines are the base's.",
        draw=lambda subject: _history(subject.data),
        noise=_bands_text,
    ),
    Spec(
        key="importance",
        title="What mattered",
        caption="How much of the spread of each objective each hyperparameter explains (fANOVA over the whole space).",
        draw=lambda subject: _importance(subject.methods),
    ),
    Spec(
        key="parallel",
        title="Objectives and hyperparameters together",
        caption="Each line is a complete trial: green ones are the front, the amber one is the base. Drag along an "
        "axis to select a range.",
        draw=lambda subject: _parallel(subject.data, subject.importance),
        noise=_parallel_noise_text,
        wide=True,
    ),
)
