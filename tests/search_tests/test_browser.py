"""A finished study in MLflow's UI, in a real browser."""

from collections.abc import Iterator

import pytest
from made_up import made_up_study
from test_gallery import mirror_of
from tiny import NAME, TinyStudy
from ui_pages import UiPages, open_ui, require_browser

from search.ledger import TicketState

COMPLETE, PRUNED = TicketState.COMPLETE, TicketState.PRUNED
FATES = [(COMPLETE, 0.4), *((COMPLETE, 0.3 + 0.02 * n) for n in range(7)), *[(PRUNED, 0.1)] * 4]

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """Twelve trials, recorded and drawn."""
    require_browser()
    folder = tmp_path_factory.mktemp("browser")
    review = {"tracking": {"review": True}}
    study = made_up_study(folder / "study", tmp_path_factory.getbasetemp(), FATES, tracked=True, **review)
    with mirror_of(study) as mirror:
        mirror.reconcile()
    return study


@pytest.fixture(scope="module")
def ui(study: TinyStudy) -> Iterator[UiPages]:
    with open_ui(study.runs, NAME) as pages:
        yield pages


def test_ui_table_shows_all_trials_with_objective_and_searched_keys(ui: UiPages) -> None:
    text = ui.table()

    assert len(ui.trials) == 12
    assert all(name in text for name in ui.trials)
    header = text[text.index("Run Name") :]
    for column in ("objective", "mAP50", "box", "cls", "yolosearch.state"):
        assert column in header
    # The best trial first.
    assert text.index("trial-00007") < text.index("trial-00000") < text.index("trial-00001")


def test_ui_charts_show_the_fitness_of_all_trials_at_once(ui: UiPages) -> None:
    assert ui.charts("metrics/fitness") >= len(ui.trials)


def test_ui_trial_has_its_own_charts(ui: UiPages) -> None:
    assert ui.trial("trial-00001") >= 3


def test_ui_compares_three_trials(ui: UiPages) -> None:
    text = ui.compare(ui.trials[:3])

    assert "Comparing 3 Runs from 1 Experiment" in text
    assert all(name in text for name in ui.trials[:3])


def test_ui_shows_a_plot_and_the_report_among_the_artifacts(ui: UiPages) -> None:
    plot = ui.artifact("summary", "plots", "01-history.html")
    assert plot.query_selector(".js-plotly-plot .scatterlayer .point") is not None

    report = ui.artifact("summary", "", "report.html")
    assert "Unconfirmed" in report.inner_text("h1")
