"""The report page in a real browser, at the width of a desktop and of a phone."""

from pathlib import Path
from typing import Any

import pytest
from made_up import data_of, made_up_study, rerun_base
from ui_pages import open_browser, require_browser

from search.ledger import TicketState
from search.page import Review, report_page

COMPLETE, PRUNED = TicketState.COMPLETE, TicketState.PRUNED
SEVERAL = {"objectives": ["fitness", "recall", "precision"], "pruner": None}
FATES = [(COMPLETE, 0.4), *((COMPLETE, 0.3 + 0.02 * n) for n in range(7)), *[(PRUNED, 0.1)] * 4]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("options", "plots"), [({}, 8), (SEVERAL, 5)], ids=["one objective", "three objectives"])
def test_report_page_fits_its_window_and_asks_for_nothing(
    width: int, options: dict[str, Any], plots: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_browser()
    fates = [fate for fate in FATES if fate[0] is COMPLETE] if options else FATES
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, **options)
    rerun_base(study, [{"fitness": 0.40}, {"fitness": 0.42}])
    path = tmp_path / "report.html"
    path.write_text(report_page(Review.of(data_of(study)), "box: 0.05\n"))
    problems: list[str] = []
    with open_browser(width) as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-drawn]")

        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".js-plotly-plot").count() >= plots
        assert page.locator("h1").bounding_box()["y"] < 300
    assert problems == []
