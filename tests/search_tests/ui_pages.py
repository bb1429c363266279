"""MLflow's UI in a real browser: opens what a user looks at after a study, and takes pictures of it.

python tests/search_tests/ui_pages.py RUNS_DIR STUDY docs/images
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from search.launch.mlflow_ui import MlflowUi
from search.tracking import MlflowTracker

SECONDS = 60_000
"""How long a page may take on a busy machine, milliseconds."""

# What the UI would remember of a user who has seen it before: no assistant over the page, the menu of model training.
REMEMBERED = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}


def chromium() -> str | None:
    """A browser on this machine, or None for Playwright's own."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def require_browser() -> None:
    """Skips the test where there is no browser, but not in CI, which names the fixtures."""
    pytest.importorskip("playwright", reason="needs playwright (the extra dev)")
    if chromium() is None and not list(Path.home().glob(".cache/ms-playwright/chromium*")):
        reason = "needs chromium: apt-get install chromium, or playwright install chromium"
        pytest.fail(reason) if os.environ.get("YOLOSEARCH_FIXTURES") else pytest.skip(reason)


@contextmanager
def open_browser(width: int = 1360, height: int = 900) -> Iterator[Any]:
    """A page of a headless browser, without any network but this machine's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A sandbox needs a user that is not root.
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(SECONDS)
        remembered = json.dumps(REMEMBERED)
        page.add_init_script(
            f"Object.entries({remembered}).forEach(([key, value]) => localStorage.setItem(key, value));"
        )
        yield page
        browser.close()


@dataclass(frozen=True)
class UiPages:
    """The pages of one study."""

    page: Any
    table_link: str
    """What `yolosearch ui STUDY` prints."""
    experiment: str
    """Its id."""
    runs: dict[str, str]
    """Run id by name."""

    @property
    def _root(self) -> str:
        return self.table_link.partition("/runs")[0]

    @property
    def trials(self) -> list[str]:
        """Names of the trials' runs."""
        return sorted(name for name in self.runs if name.startswith("trial-"))

    def table(self) -> str:
        """Opens the table of runs; its text."""
        self.page.goto(self.table_link)
        self.page.get_by_text(self.trials[0], exact=True).first.wait_for()
        self.page.wait_for_timeout(1500)  # columns arrive after the rows
        return str(self.page.inner_text("body"))

    def charts(self, metric: str = "fitness") -> int:
        """Opens the charts of all runs; how many lines one metric has."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.table_link}&compareRunsMode=CHART")
        self.page.get_by_text("Search metric charts").or_(
            self.page.get_by_placeholder("Search metric charts")
        ).wait_for()
        self.page.get_by_placeholder("Search metric charts").fill(metric)
        find = "els => Math.max(0, ...els.map(el => (el.data || []).filter(t => (t.x || []).length > 1).length))"
        self.page.wait_for_selector(".js-plotly-plot")
        for _ in range(60):
            lines = int(self.page.eval_on_selector_all(".js-plotly-plot", find))
            if lines >= len(self.trials):
                break
            self.page.wait_for_timeout(500)
        return lines

    def enlarge_chart(self) -> None:
        """Gives the first chart the whole page."""
        self.page.locator("[data-component-id=fullscreen_button_chartcard]").first.click()
        self.page.locator("[role=dialog] .js-plotly-plot").wait_for()

    def trial(self, name: str) -> int:
        """Opens one run's own charts; how many are drawn."""
        self.page.goto(f"{self._root}/runs/{self.runs[name]}/model-metrics")
        self.page.wait_for_selector(".js-plotly-plot")
        self.page.wait_for_timeout(1500)
        return int(self.page.locator(".js-plotly-plot").count())

    def compare(self, names: Sequence[str]) -> str:
        """Opens the comparison of some runs; its text."""
        runs, experiments = json.dumps([self.runs[name] for name in names]), json.dumps([self.experiment])
        base = self.table_link.partition("/#")[0]
        self.page.goto(f"{base}/#/compare-runs?runs={runs}&experiments={experiments}")
        self.page.wait_for_selector(".js-plotly-plot")
        self.page.wait_for_timeout(1500)
        return str(self.page.inner_text("body"))

    def artifact(self, run: str, folder: str, name: str) -> Any:
        """Opens an HTML artifact in the UI; the frame that shows it, once its plot is drawn."""
        self.page.goto(f"{self._root}/runs/{self.runs[run]}/artifacts")
        if folder:
            self.page.get_by_text(folder, exact=True).first.click()
        self.page.get_by_text(name, exact=True).first.click()
        for _ in range(120):
            for frame in self.page.frames[1:]:
                if frame.query_selector("body[data-drawn]"):
                    return frame
            self.page.wait_for_timeout(500)
        raise AssertionError(f"{name} was not drawn")


@contextmanager
def open_ui(runs_dir: Path, study: str) -> Iterator[UiPages]:
    """MLflow's server on a runs folder, and a browser that looks at one study."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    with MlflowUi.start(uri, runs_dir, port=0) as server:
        server.wait_until_healthy()
        link = MlflowTracker(uri, runs_dir / "mlartifacts").experiment_url(study, server.address)
        assert link is not None
        with open_browser() as page:
            yield UiPages(page, link, experiment.experiment_id, runs)


def take_pictures(runs_dir: Path, study: str, folder: Path) -> None:
    """Writes the pictures that the documents use."""
    with open_ui(runs_dir, study) as ui:
        ui.table()
        _save(ui.page, folder / "mlflow-table.png")
        ui.charts("metrics/fitness")
        ui.enlarge_chart()
        _save(ui.page, folder / "mlflow-charts.png")
        ui.compare(ui.trials[:3])
        _save(ui.page, folder / "mlflow-compare.png")
        ui.artifact("summary", "plots", "01-history.html")
        # Where the files lie on this machine is nobody's business.
        ui.page.get_by_text("Path: ").first.evaluate("element => { element.style.visibility = 'hidden'; }")
        _save(ui.page, folder / "mlflow-plot.png")
        frame = ui.artifact("summary", "", "report.html")
        page = ui.page.context.browser.new_page(viewport={"width": 1080, "height": 1250})
        page.set_content(frame.content())
        page.wait_for_selector("body[data-drawn]")
        _save(page, folder / "report.png")


def _save(page: Any, path: Path) -> None:
    """A picture of few colours: small enough for a repository."""
    from PIL import Image

    page.wait_for_timeout(1000)
    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128)
    small.save(path, optimize=True)


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3]))
