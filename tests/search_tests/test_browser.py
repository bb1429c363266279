"""A finished study in MLflow's UI and on its report page, in a real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import data_of, made_up_study
from test_gallery import mirror_of
from tiny import NAME, TinyStudy
from ui_pages import UiPages, chromium, open_browser, open_ui

from search.ledger import TicketState
from search.page import Review, report_page

COMPLETE, PRUNED = TicketState.COMPLETE, TicketState.PRUNED
FATES = [(COMPLETE, 0.4), *((COMPLETE, 0.3 + 0.02 * n) for n in range(7)), *[(PRUNED, 0.1)] * 4]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", autouse=True)
def browser() -> None:
    """Skips where there is no browser, but not in CI, which names the fixtures."""
    pytest.importorskip("playwright", reason="needs playwright (the extra dev)")
    if chromium() is None and not list(Path.home().glob(".cache/ms-playwright/chromium*")):
        reason = "needs chromium: apt-get install chromium, or playwright install chromium"
        pytest.fail(reason) if os.environ.get("YOLOSEARCH_FIXTURES") else pytest.skip(reason)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """Twelve trials, recorded and drawn."""
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


@pytest.mark.slow
def test_ui_table_shows_all_trials_with_objective_and_searched_keys(ui: UiPages) -> None:
    text = ui.table()

    assert len(ui.trials) == 12
    assert all(name in text for name in ui.trials)
    header = text[text.index("Run Name") :]
    for column in ("objective", "mAP50", "box", "cls", "yolosearch.state"):
        assert column in header
    # The best trial first.
    assert text.index("trial-00007") < text.index("trial-00000") < text.index("trial-00001")


@pytest.mark.slow
def test_ui_charts_show_the_fitness_of_all_trials_at_once(ui: UiPages) -> None:
    assert ui.charts("metrics/fitness") >= len(ui.trials)


@pytest.mark.slow
def test_ui_trial_has_its_own_charts(ui: UiPages) -> None:
    assert ui.trial("trial-00001") >= 3


@pytest.mark.slow
def test_ui_compares_three_trials(ui: UiPages) -> None:
    text = ui.compare(ui.trials[:3])

    assert "Comparing 3 Runs from 1 Experiment" in text
    assert all(name in text for name in ui.trials[:3])


@pytest.mark.slow
def test_ui_shows_a_plot_and_the_report_among_the_artifacts(ui: UiPages) -> None:
    plot = ui.artifact("summary", "plots", "01-history.html")
    assert plot.query_selector(".js-plotly-plot .scatterlayer .point") is not None

    report = ui.artifact("summary", "", "report.html")
    assert "Unconfirmed" in report.inner_text("h1")


@pytest.mark.parametrize("width", [1280, 390])
def test_report_page_fits_its_window_and_asks_for_nothing(
    width: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), FATES)
    path = tmp_path / "report.html"
    path.write_text(report_page(Review.of(data_of(study)), "box: 0.05\n"))
    problems: list[str] = []
    with open_browser(width) as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-drawn]")

        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".js-plotly-plot").count() >= 8
        assert page.locator("h1").bounding_box()["y"] < 300
    assert problems == []
