"""The plots of a study of several objectives."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import data_of, made_up_study, rerun_base
from tiny import TinyStudy

from search.front_plots import front_plots, objective_importances
from search.ledger import TicketState
from search.plots import Plot
from search.review import StudyData, findings, half_band

COMPLETE, FAIL = TicketState.COMPLETE, TicketState.FAIL
KEYS = ("front", "classes", "history", "importance", "parallel")
FITNESS = (0.40, 0.50, 0.41, 0.30, 0.39, 0.32)
RECALL = (0.40, 0.35, 0.45, 0.60, 0.38, 0.20)
Make = Callable[..., TinyStudy]


def drawn(data: StudyData) -> dict[str, Plot]:
    return {plot.key: plot for plot in front_plots(data, findings(data), objective_importances(data))}


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def made(count: int = len(FITNESS), objectives: tuple[str, ...] = ("fitness", "recall"), **more: Any) -> TinyStudy:
        figures = {number: {"recall": recall} for number, recall in enumerate(RECALL)}
        fates = [(COMPLETE, value) for value in FITNESS[:count]]
        options = {"objectives": list(objectives), "pruner": None, "figures": figures, **more}
        return made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, **options)

    return made


@pytest.mark.parametrize(
    ("count", "made"),
    [
        (0, set()),
        (1, {"classes", "history"}),
        (2, {"front", "classes", "history", "parallel"}),
        (6, set(KEYS)),
    ],
)
def test_front_plots_few_trials_leave_out_what_cannot_be_made_with_its_reason(
    make: Make, count: int, made: set[str]
) -> None:
    plots = drawn(data_of(make(count)))

    assert tuple(plots) == KEYS
    assert {key for key, plot in plots.items() if plot.figure is not None} == made
    assert all(bool(plot.missing) != (plot.figure is not None) for plot in plots.values())
    assert {plot.noise for plot in plots.values()} == {""}


def test_front_two_objectives_joins_the_front_and_marks_the_base(make: Make) -> None:
    figure = drawn(data_of(make()))["front"].figure

    traces = {trace.name: trace for trace in figure.data}
    places = {name: sorted(zip(trace.x, trace.y, strict=True)) for name, trace in traces.items()}
    front = [(0.30, 0.60), (0.41, 0.45), (0.50, 0.35)]
    assert places["on the front"] == front
    assert places["front"] == front
    assert places["base"] == [(0.40, 0.40)]
    assert places["other trials"] == [(0.32, 0.20), (0.39, 0.38)]
    # From the right to the left, each at its own height: no corner lies where no trial reaches.
    assert (list(traces["front"].x), traces["front"].line.shape) == ([0.50, 0.41, 0.30], "hv")
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("fitness", "recall")
    assert "fitness 0.5000<br>recall 0.3500" in traces["on the front"].text[0] + traces["on the front"].text[2]


def test_front_base_on_it_is_marked_as_the_base(make: Make) -> None:
    figures = {number: {"recall": recall} for number, recall in enumerate((0.9, *RECALL[1:]))}

    traces = {trace.name: trace for trace in drawn(data_of(make(figures=figures)))["front"].figure.data}

    assert list(traces["base"].x) == [0.40]
    assert 0.40 not in traces["on the front"].x
    assert 0.40 in traces["front"].x


def test_front_with_noise_has_bars_of_a_deviation_and_strips_around_the_base(make: Make) -> None:
    study = make()
    rerun_base(study, [{"fitness": 0.40, "recall": 0.40}, {"fitness": 0.42, "recall": 0.44}])
    data = data_of(study)

    plots = drawn(data)

    sds = {"fitness": 0.02 / math.sqrt(2), "recall": 0.04 / math.sqrt(2)}
    traces = {trace.name: trace for trace in plots["front"].figure.data}
    for name in ("on the front", "base"):
        assert (traces[name].error_x.value, traces[name].error_y.value) == pytest.approx(tuple(sds.values()))
    assert traces["other trials"].error_x.value is None
    upright, level = plots["front"].figure.layout.shapes
    assert (upright.x0, upright.x1) == pytest.approx((0.4 - half_band(sds["fitness"]), 0.4 + half_band(sds["fitness"])))
    assert (level.y0, level.y1) == pytest.approx((0.4 - half_band(sds["recall"]), 0.4 + half_band(sds["recall"])))
    assert "0.014 in fitness and 0.028 in recall, from 2 reruns of the base" in plots["front"].noise
    sizes = "± 0.039 in fitness and ± 0.078 in recall"
    assert sizes in plots["history"].noise
    assert sizes in plots["parallel"].noise
    bands = [shape for shape in plots["history"].figure.layout.shapes if shape.type == "rect"]
    assert [(band.y1 - band.y0) / 2 for band in bands] == pytest.approx([half_band(sd) for sd in sds.values()])
    assert "from 2 reruns of the base" in plots["classes"].noise


def test_front_three_objectives_shows_each_pair_once_with_its_strips(make: Make) -> None:
    study = make(objectives=("fitness", "recall", "precision"))
    rerun_base(study, [{"fitness": 0.40, "recall": 0.40}, {"fitness": 0.42, "recall": 0.44}])

    plot = drawn(data_of(study))["front"]

    bases = [trace for trace in plot.figure.data if trace.name == "base"]
    assert [(trace.x[0], trace.y[0]) for trace in bases] == [(0.40, 0.40), (0.40, 0.50), (0.40, 0.50)]
    assert sum(bool(trace.showlegend) for trace in bases) == 1
    assert len([shape for shape in plot.figure.layout.shapes if shape.type == "rect"]) == 6
    assert plot.wide


def test_objective_importances_has_each_objective_and_names_of_strangers_stay_text(make: Make) -> None:
    data = data_of(make(), class_names=("</script><b>cat", "dog"))

    found = objective_importances(data)

    assert list(found) == ["fitness", "recall"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.values())
    assert "&lt;/script&gt;&lt;b&gt;cat" in drawn(data)["classes"].figure.data[0].x


def test_parallel_has_all_objectives_then_the_keys_and_colours_by_role(make: Make) -> None:
    lines = drawn(data_of(make()))["parallel"].figure.data[0]

    assert [dimension.label for dimension in lines.dimensions][:2] == ["fitness", "recall"]
    assert {dimension.label for dimension in lines.dimensions[2:]} == {"box", "cls"}
    by_fitness = dict(zip(lines.dimensions[0]["values"], lines.line.color, strict=True))
    assert by_fitness == {0.50: 1.0, 0.41: 1.0, 0.40: 2.0, 0.39: 0.0, 0.32: 0.0, 0.30: 1.0}
