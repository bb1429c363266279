"""The drawn figures of docs/concepts.md, as SVG, from the project's own loss: nothing is drawn by hand.

`docs/make.py` writes them. Coordinates have one decimal, so that the files are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from yolocore.boxes import ciou
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import LossWeights, binary_cross_entropy, focal_factor

COLOURS = ("#64748b", "#0d9488", "#d97706", "#be123c", "#6d28d9")
"""Readable on white and on black."""
INK = "#64748b"
WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 40

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line through points."""

    name: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x_name: str
    y_name: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    curves: Sequence[Curve]
    names_at: tuple[Literal["start", "end"], Literal["top", "bottom"]] = ("end", "top")
    """Where the curves leave room for their names."""


def figures() -> dict[str, str]:
    """File name to SVG."""
    return {
        "positive-weight.svg": svg([_positive_weight_loss(), _positive_weight_answer()]),
        "focal.svg": svg([_focal(1.0), _focal(0.0)]),
        "gains.svg": svg([_gain_of_classes(), _gain_of_size()]),
        "box.svg": svg([_box_loss(), _objectness_target()]),
    }


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def _steps(low: float, high: float, count: int = 61) -> list[float]:
    return [low + (high - low) * index / (count - 1) for index in range(count)]


def _logit(probability: float) -> torch.Tensor:
    return torch.logit(torch.tensor(probability, dtype=torch.float64))


def _loss(probability: float, target: float, pos_weight: float = 1.0, gamma: float = 0.0) -> float:
    """What one answer costs."""
    logit, wanted = _logit(probability), torch.tensor(target, dtype=torch.float64)
    loss = binary_cross_entropy(logit, wanted, pos_weight)
    if gamma:
        loss = loss * focal_factor(logit, wanted, torch.tensor(gamma, dtype=torch.float64))
    return float(loss)


def _positive_weight_loss() -> Panel:
    answers = _steps(0.02, 0.98)
    curves = [Curve(f"pw {pw:g}", [(p, _loss(p, 1.0, pw)) for p in answers]) for pw in (0.5, 1.0, 2.0, 4.0)]
    curves += [Curve("where there is none", [(p, _loss(p, 0.0)) for p in answers], dashed=True)]
    return Panel(
        title="What an answer costs where there is an object",
        x_name="answer (probability)",
        y_name="loss",
        x_range=(0, 1),
        y_range=(0, 6),
        x_ticks=(0, 0.5, 1),
        y_ticks=(0, 2, 4, 6),
        curves=curves,
    )


def _best_answer(share: float, pos_weight: float) -> float:
    """The answer that costs least where such a share of equal-looking cells holds an object: by search, not formula."""
    answers = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = torch.logit(answers)
    yes = binary_cross_entropy(logits, torch.ones_like(logits), pos_weight)
    no = binary_cross_entropy(logits, torch.zeros_like(logits))
    return float(answers[(share * yes + (1 - share) * no).argmin()])


def _positive_weight_answer() -> Panel:
    shares = _steps(0.0, 1.0, 41)
    weights = (0.5, 1.0, 2.0, 4.0)
    return Panel(
        title="What the model answers in the end",
        x_name="share of such cells that hold an object",
        y_name="answer",
        x_range=(0, 1),
        y_range=(0, 1),
        x_ticks=(0, 0.5, 1),
        y_ticks=(0, 0.5, 1),
        curves=[Curve(f"pw {pw:g}", [(share, _best_answer(share, pw)) for share in shares]) for pw in weights],
        names_at=("end", "bottom"),
    )


def _focal(target: float) -> Panel:
    answers = _steps(0.02, 0.98)
    gammas = (0.0, 0.5, 1.0, 2.0)
    what = "where there is an object" if target else "where there is none"
    return Panel(
        title=f"Loss {what}",
        x_name="answer (probability)",
        y_name="loss",
        x_range=(0, 1),
        y_range=(0, 4),
        x_ticks=(0, 0.5, 1),
        y_ticks=(0, 1, 2, 3, 4),
        curves=[Curve(f"gamma {g:g}", [(p, _loss(p, target, gamma=g)) for p in answers]) for g in gammas],
        names_at=("end" if target else "start", "top"),
    )


def _effective(key: str, classes: int, size: int) -> float:
    weights = LossWeights.from_hyperparameters(Hyperparameters(), num_classes=classes, image_size=size)
    return float(getattr(weights, key)[0])


def _gain_of_classes() -> Panel:
    counts = range(2, 81, 2)
    return Panel(
        title="cls: 0.5 in effect",
        x_name="classes",
        y_name="gain",
        x_range=(0, 80),
        y_range=(0, 0.5),
        x_ticks=(0, 20, 40, 60, 80),
        y_ticks=(0, 0.25, 0.5),
        curves=[Curve("cls", [(count, _effective("cls", count, 640)) for count in counts])],
    )


def _gain_of_size() -> Panel:
    sizes = range(128, 1281, 64)
    return Panel(
        title="obj: 1.0 in effect",
        x_name="image size, pixels",
        y_name="gain",
        x_range=(0, 1280),
        y_range=(0, 4),
        x_ticks=(0, 320, 640, 960, 1280),
        y_ticks=(0, 1, 2, 3, 4),
        curves=[Curve("obj", [(size, _effective("obj", 80, size)) for size in sizes])],
    )


def _ciou(shift: float) -> float:
    """Of a square and the same one, moved by a share of its side."""
    box = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    return float(ciou(box + torch.tensor([shift, 0.0, 0.0, 0.0], dtype=torch.float64), box))


def _box_loss() -> Panel:
    shifts = _steps(0.0, 1.0)
    return Panel(
        title="Box loss times its gain",
        x_name="how far the box is off (share of its side)",
        y_name="loss",
        x_range=(0, 1),
        y_range=(0, 0.2),
        x_ticks=(0, 0.5, 1),
        y_ticks=(0, 0.1, 0.2),
        curves=[Curve(f"box {g:g}", [(s, g * (1 - _ciou(s))) for s in shifts]) for g in (0.02, 0.05, 0.1, 0.2)],
    )


def _objectness_target() -> Panel:
    shifts = _steps(0.0, 1.0)
    return Panel(
        title="What objectness should answer",
        x_name="how far the box is off (share of its side)",
        y_name="target",
        x_range=(0, 1),
        y_range=(0, 1),
        x_ticks=(0, 0.5, 1),
        y_ticks=(0, 0.5, 1),
        curves=[Curve("max(CIoU, 0)", [(s, max(0.0, _ciou(s))) for s in shifts])],
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side."""
    width = WIDTH * len(panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">'
    ]
    for number, panel in enumerate(panels):
        lines += [f'<g transform="translate({number * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    x, y = _scales(panel)
    bottom, top, left, right = y(panel.y_range[0]), y(panel.y_range[1]), x(panel.x_range[0]), x(panel.x_range[1])
    yield f'<text x="{LEFT}" y="16" font-size="12" font-weight="bold">{panel.title}</text>'
    for tick in panel.y_ticks:
        yield f'<path d="M{left:.1f} {y(tick):.1f}H{right:.1f}" stroke="{INK}" stroke-opacity="0.2"/>'
        yield f'<text x="{left - 6:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in panel.x_ticks:
        yield f'<text x="{x(tick):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{tick:g}</text>'
    yield f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" stroke="{INK}" fill="none"/>'
    yield f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{panel.x_name}</text>'
    middle = f"translate(12 {(top + bottom) / 2:.1f}) rotate(-90)"
    yield f'<text transform="{middle}" text-anchor="middle">{panel.y_name}</text>'
    for number, curve in enumerate(panel.curves):
        yield from _curve(panel, curve, COLOURS[number % len(COLOURS)], number)


def _curve(panel: Panel, curve: Curve, colour: str, number: int) -> Iterator[str]:
    x, y = _scales(panel)
    low, high = panel.y_range
    shown = [(px, py) for px, py in curve.points if low <= py <= high]
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in shown)
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
    if len(panel.curves) > 1:
        side, edge = panel.names_at
        place_x = LEFT + 8 if side == "start" else WIDTH - RIGHT - 4
        place_y = TOP + 12 if edge == "top" else HEIGHT - BOTTOM + 6 - 14 * len(panel.curves)
        place = f'x="{place_x}" y="{place_y + 14 * number}" text-anchor="{side}"'
        yield f'<text {place} fill="{colour}">{curve.name}</text>'


def _scales(panel: Panel) -> tuple[Callable[[float], float], Callable[[float], float]]:
    (x_low, x_high), (y_low, y_high) = panel.x_range, panel.y_range
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return (
        lambda value: LEFT + across * (value - x_low) / (x_high - x_low),
        lambda value: TOP + down * (1 - (value - y_low) / (y_high - y_low)),
    )
