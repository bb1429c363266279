"""The plots of a study, however little there is to draw."""

import json
from pathlib import Path

import pytest
from made_up import data_of, made_up_study
from tiny import TinyStudy

from search.ledger import TicketState
from search.plots import Plot, figure_json, importances, main_importance, study_plots
from search.review import StudyData, findings
from search.statistics import compare

COMPLETE, PRUNED, FAIL = TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL
KEYS = ("history", "importance", "classes", "confirmation", "curves", "slice", "parallel", "contour", "front")


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
        ([(COMPLETE, 0.4), (COMPLETE, 0.5)], {"history", "curves", "classes", "slice", "parallel", "front"}),
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
    assert any(shape.type == "rect" for shape in plots["confirmation"].figure.layout.shapes)


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
