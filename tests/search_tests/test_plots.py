"""The plots of a study, however little there is to draw."""

import json
import math
from pathlib import Path

import pytest
from made_up import data_of, made_up_study, rerun_base
from tiny import TinyStudy

from search.ledger import TicketState
from search.plots import Plot, figure_json, importances, main_importance, study_plots
from search.review import StudyData, findings, half_band
from search.statistics import compare

COMPLETE, PRUNED, FAIL = TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL
KEYS = (
    "history",
    "importance",
    "classes",
    "confirmation",
    "curves",
    "slice",
    "parallel",
    "contour",
    "precision_recall",
)


def drawn(data: StudyData) -> dict[str, Plot]:
    importance = importances(data)
    return {plot.key: plot for plot in study_plots(data, findings(data, main_importance(importance)), importance)}


@pytest.fixture
def twelve(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    fates = [
        (COMPLETE, 0.4),
        *((COMPLETE, 0.3 + 0.02 * n) for n in range(8)),
        (PRUNED, 0.1),
        (PRUNED, 0.2),
        (FAIL, 0.1),
    ]
    return made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates)


@pytest.mark.parametrize(
    ("fates", "made"),
    [
        ([], set()),
        ([(PRUNED, 0.1)], {"history", "curves"}),
        ([(COMPLETE, 0.4)], {"history", "curves", "classes"}),
        ([(COMPLETE, 0.4), (COMPLETE, 0.5)], {"history", "curves", "classes", "slice", "parallel", "precision_recall"}),
    ],
    ids=["none", "pruned", "one", "two"],
)
def test_study_plots_few_trials_leaves_out_what_cannot_be_made_with_its_reason(
    fates: list[tuple[TicketState, float]], made: set[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates)

    plots = drawn(data_of(study))

    assert tuple(plots) == KEYS
    assert {key for key, plot in plots.items() if plot.figure is not None} == made
    assert all(bool(plot.missing) != (plot.figure is not None) for plot in plots.values())


def test_study_plots_of_a_study_has_all_but_what_was_not_done(twelve: TinyStudy) -> None:
    plots = drawn(data_of(twelve))

    assert [key for key, plot in plots.items() if plot.figure is None] == ["confirmation"]
    history = {trace.name: trace for trace in plots["history"].figure.data}
    assert len(history["complete"].x) == 9
    assert len(history["pruned"].x) == 2
    assert max(history["best so far"].y) == pytest.approx(0.44)
    assert len(plots["curves"].figure.data) == 12
    assert set(plots["importance"].figure.data[0].y) == {"box", "cls"}


def test_study_plots_with_noise_draws_the_band_into_every_comparison(twelve: TinyStudy) -> None:
    confirmation = compare([0.4, 0.41, 0.39], {"trial 8": [0.42, 0.43, 0.42]})
    data = data_of(twelve, confirmation=confirmation, candidates={"trial 8": 8}, noise=0.01)

    plots = drawn(data)

    assert data.band is not None
    for key in ("history", "curves", "slice"):
        bands = [(shape.y0, shape.y1) for shape in plots[key].figure.layout.shapes if shape.type == "rect"]
        assert data.band in bands, key
        assert f"(± {half_band(0.01):.3f})" in plots[key].noise, key


def test_study_plots_confirmation_band_is_that_of_a_mean_of_paired_differences(twelve: TinyStudy) -> None:
    confirmation = compare([0.4, 0.41, 0.39], {"trial 8": [0.42, 0.43, 0.42]})
    data = data_of(twelve, confirmation=confirmation, candidates={"trial 8": 8}, noise=0.05)

    plot = drawn(data)["confirmation"]

    # Of three pairs, and of the noise that pairing leaves, whatever the reruns of the base say.
    half = 1.96 * confirmation.noise * math.sqrt(2 / 3)
    (band,) = (shape for shape in plot.figure.layout.shapes if shape.type == "rect")
    assert (band.x0, band.x1) == pytest.approx((-half, half))
    assert f"the mean over 3 paired seeds leaves the shaded band (± {half:.3f})" in plot.noise


def test_study_plots_reruns_of_the_base_give_each_class_its_own_band(twelve: TinyStudy) -> None:
    rerun_base(twelve, [{"fitness": 0.40, "class_ap/1": 0.10}, {"fitness": 0.42, "class_ap/1": 0.30}])
    data = data_of(twelve)

    plot = drawn(data)["classes"]

    spread = {"cat": 0.02 / math.sqrt(2), "dog": 0.2 / math.sqrt(2)}
    assert data.class_noise == pytest.approx(spread)
    order = list(plot.figure.data[0].x)
    bands = {order[round((shape.x0 + shape.x1) / 2)]: shape for shape in plot.figure.layout.shapes}
    for name, base in {"cat": 0.4, "dog": 0.2}.items():
        assert (bands[name].y0 + bands[name].y1) / 2 == pytest.approx(base)
        assert (bands[name].y1 - bands[name].y0) / 2 == pytest.approx(half_band(spread[name]))
    assert plot.noise.endswith("± 0.039 to 0.392, from 2 reruns of the base.")


def test_study_plots_classes_of_a_confirmed_winner_are_means_over_its_paired_seeds(twelve: TinyStudy) -> None:
    confirmation = compare([0.4, 0.41, 0.39], {"trial 8": [0.42, 0.43, 0.42]})
    cat = compare([0.4, 0.41, 0.39], {"trial 8": [0.5, 0.52, 0.51]})
    known = {"confirmation": confirmation, "candidates": {"trial 8": 8}, "class_confirmations": {0: cat}}
    data = data_of(twelve, **known)

    plot, (change,) = drawn(data)["classes"], findings(data).classes

    assert (change.name, change.base, change.change) == ("cat", pytest.approx(0.4), pytest.approx(0.11))
    assert list(plot.figure.data[1].y) == pytest.approx([0.51])
    (band,) = plot.figure.layout.shapes
    half = 1.96 * cat.noise * math.sqrt(2 / 3)
    assert (band.y0, band.y1) == pytest.approx((0.4 - half, 0.4 + half))
    assert plot.noise.startswith("Means over 3 paired seeds, as the confirmation compares them.")
    assert plot.noise.endswith(f"by chance alone: ± {half:.3f}.")


def test_study_plots_noise_is_in_the_colours_of_the_lines_and_in_the_contour(twelve: TinyStudy) -> None:
    data = data_of(twelve, noise=0.01)
    assert data.band is not None

    plots = drawn(data)

    values = [ticket.value or 0.0 for ticket in data.complete]
    scale = plots["parallel"].figure.data[0].line.colorscale
    ends = [min(values) + place * (max(values) - min(values)) for place, colour in scale if colour == "#d97706"]
    assert ends == pytest.approx([max(data.band[0], min(values)), min(data.band[1], max(values))])
    lines = [trace for trace in plots["contour"].figure.data if trace.type == "contour"][-1]
    assert (lines.contours.start, lines.contours.end) == pytest.approx(data.band)
    assert all(f"± {half_band(0.01):.3f}" in plots[key].noise for key in ("parallel", "contour"))


def test_study_plots_without_noise_say_nothing_of_it(twelve: TinyStudy) -> None:
    assert {plot.noise for plot in drawn(data_of(twelve)).values()} == {""}


def test_precision_recall_line_joins_those_that_none_beats_and_bars_are_a_deviation(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    places = [(0.5, 0.5), (0.6, 0.4), (0.4, 0.7), (0.45, 0.45)]
    figures = {number: {"precision": p, "recall": r} for number, (p, r) in enumerate(places)}
    fates = [(COMPLETE, 0.4 - 0.01 * number) for number in range(4)]
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, figures=figures)
    runs = [{"fitness": 0.4, "precision": 0.5, "recall": value} for value in (0.5, 0.52)]
    rerun_base(study, runs)

    plot = drawn(data_of(study))["precision_recall"]

    line = plot.figure.data[0]
    assert list(zip(line.x, line.y, strict=True)) == [(0.7, 0.4), (0.5, 0.5), (0.4, 0.6)]
    # From the right to the left, each at its own height: no corner lies where no trial reaches.
    assert line.line.shape == "hv"
    base = next(trace for trace in plot.figure.data if trace.name == "base")
    assert base.error_x.value == pytest.approx(0.02 / math.sqrt(2))
    assert "0.014 in recall and 0.000 in precision, from 2 reruns" in plot.noise


def test_importances_both_methods_sum_to_one(twelve: TinyStudy) -> None:
    found = importances(data_of(twelve))

    assert list(found) == ["fANOVA", "PED-ANOVA"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.values())


def test_study_plots_class_name_with_markup_stays_text(twelve: TinyStudy) -> None:
    data = data_of(twelve, class_names=("</script><b>cat", "dog"))

    figure = drawn(data)["classes"].figure

    assert "&lt;/script&gt;&lt;b&gt;cat" in figure.data[0].x
    assert "<" not in figure_json(figure)
    assert json.loads(figure_json(figure))["data"]


def test_study_plots_trial_outside_the_space_is_drawn_as_well(twelve: TinyStudy) -> None:
    data = data_of(twelve)
    ticket = data.every_ticket[3]
    assert ticket.params is not None
    ticket.params["box"] = 0.9

    assert drawn(data)["slice"].figure is not None
    assert drawn(data)["importance"].figure is not None
