"""The summary of a study as Markdown, for the description of its run in MLflow."""

from __future__ import annotations

from collections.abc import Iterator

from search.plots import Plot
from search.review import Findings, StudyData

MOVES = 8
CLASSES = 12
FRONT = 20
"""Trials of a front in its table."""


def note(data: StudyData, found: Findings, plots: tuple[Plot, ...] = ()) -> str:
    """A few paragraphs and two small tables.

    Args:
        data: The study.
        found: What it has found.
        plots: Those that were drawn are named as artifacts.
    """
    lines = [f"## {_escaped(found.verdict)}", "", found.advice, "", *_counts(found), ""]
    lines += list(_front(data, found))
    if any(move.share for move in found.moves):
        lines += ["| hyperparameter | base | best |", "|---|---:|---:|"]
        lines += [f"| `{move.key}` | {move.base:.3g} | **{move.best:.3g}** |" for move in found.moves[:MOVES]]
        lines.append("")
    if found.classes:
        lines += ["| class | AP base | AP best | change |", "|---|---:|---:|---:|"]
        for change in found.classes[:CLASSES]:
            values = f"{change.base:.3f} | {change.best:.3f} | {change.change:+.3f}"
            lines.append(f"| {_escaped(change.name)} | {values} |")
        lines.append("")
    lines += list(_artifacts(data, plots))
    return "\n".join(lines)


def _front(data: StudyData, found: Findings) -> Iterator[str]:
    """The front of several objectives, each value with its gain over the base."""
    if not found.front:
        return
    names = [_escaped(name) for name in data.objective_names]
    yield f"| trial | {' | '.join(names)} |"
    yield f"|---{'|---:' * len(names)}|"
    for trial in found.front[:FRONT]:
        cells = [
            f"{value:.4f}{f' ({trial.gains[name]:+.4f})' if name in trial.gains and not trial.is_base else ''}"
            for name, value in trial.values.items()
        ]
        yield f"| {trial.number}{' (base)' if trial.is_base else ''} | {' | '.join(cells)} |"
    if len(found.front) > FRONT:
        yield ""
        yield f"and {len(found.front) - FRONT} more."
    yield ""
    yield f"`yolosearch export {data.config.name} --pareto N` writes the hyp file of trial N."
    yield ""


def _counts(found: Findings) -> Iterator[str]:
    counts = ", ".join(f"{count} {state.lower()}" for state, count in found.counts.items() if count)
    yield f"{sum(found.counts.values())} trials: {counts}. {found.cost.slot_epochs} epochs trained."
    for reason, numbers in found.failures[:3]:
        yield f"- failed ({', '.join(map(str, numbers[:8]))}): {_escaped(reason)}"


def _artifacts(data: StudyData, plots: tuple[Plot, ...]) -> Iterator[str]:
    if any(plot.figure is not None for plot in plots):
        yield "Below *Artifacts*: `report.html` is the whole story on one page, `plots/` has its plots one by one."
    if data.best is not None:
        yield "`hyp.best.yaml` goes into YOLOv5: `python train.py --hyp hyp.best.yaml ...`"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is; also in a table."""
    for mark in "\\`*_{}[]<>#|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
