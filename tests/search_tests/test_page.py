"""The one page: complete in itself, safe to open, right in what it says."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result
from made_up import data_of, made_up_study, rerun_base
from tiny import NAME, TinyStudy
from typer.testing import CliRunner

from search.cli import app
from search.errors import UserInputError
from search.ledger import TicketState
from search.page import Review, plot_page, report_page

COMPLETE, PRUNED, FAIL = TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL
FATES = [(COMPLETE, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.3), (COMPLETE, 0.35), (PRUNED, 0.1), (FAIL, 0.1)]


class Page(HTMLParser):
    """What a browser would see: text outside scripts, addresses that it would ask for, figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action", "data")]
        self._inside = f"{tag}:{found.get('id') or ''}" if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    folder = tmp_path_factory.mktemp("page")
    return made_up_study(folder / "study", tmp_path_factory.getbasetemp(), FATES, base_hyp=None)


def test_report_page_has_verdict_figures_yaml_and_failures(study: TinyStudy) -> None:
    review = Review.of(data_of(study))

    page = Page(report_page(review, "box: 0.07\ncls: 0.6\n"))

    assert review.found.verdict in page.text
    assert "box: 0.07 cls: 0.6" in page.text
    assert "trial 5 : the loss is not finite (epoch 1, batch 3)" in page.text
    assert "4 complete, 1 pruned, 1 fail" in page.text
    figures = json.loads(page.scripts["script:figures"])
    assert set(figures) == {f"plot-{plot.key}" for plot in review.plots if plot.figure is not None}
    assert "Left out" in page.text
    assert "nothing was confirmed yet" in page.text


def test_report_page_asks_the_network_for_nothing(study: TinyStudy) -> None:
    text = report_page(Review.of(data_of(study)), None)

    page = Page(text)
    assert page.addresses == []
    assert "@import" not in text
    assert not re.search(r"url\(", page.scripts["style:"])


def test_report_page_names_from_strangers_stay_text(study: TinyStudy) -> None:
    data = data_of(study, class_names=("</script><img src=x onerror=alert(1)>", "dog"))

    page = Page(report_page(Review.of(data), "# </pre><script>alert(2)</script>"))

    assert page.addresses == []
    assert "alert(1)" not in " ".join(page.scripts.values()).replace("onerror=alert(1)", "")
    assert "<script>alert(2)</script>" in page.text


def test_report_page_of_an_empty_study_says_so(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    study = made_up_study(tmp_path / "empty", tmp_path_factory.getbasetemp(), [])

    page = Page(report_page(Review.of(data_of(study)), None))

    assert "Nothing to say yet: 0 of 1 trials have ended" in page.text
    assert json.loads(page.scripts["script:figures"]) == {}


def test_plot_page_has_its_plot_alone(study: TinyStudy) -> None:
    review = Review.of(data_of(study))
    plots = {plot.key: plot for plot in review.plots}

    page = Page(plot_page(plots["history"], NAME))

    assert list(json.loads(page.scripts["script:figures"])) == ["plot-history"]
    with pytest.raises(ValueError, match="confirmation could not be made: nothing was confirmed yet"):
        plot_page(plots["confirmation"], NAME)


def report(study: TinyStudy, output: Path) -> Result:
    return CliRunner().invoke(app, ["report", NAME, "--runs-dir", str(study.runs), "-o", str(output), "--json"])


def test_report_command_writes_the_page_with_the_classes_of_the_data_set(study: TinyStudy, tmp_path: Path) -> None:
    done = report(study, tmp_path / "deep" / "report.html")

    told = json.loads(done.stdout)
    page = Page((tmp_path / "deep" / "report.html").read_text())
    assert told["standing"] == "unconfirmed"
    assert told["verdict"] in page.text
    assert "mostly digit 0" in told["verdict"]
    assert "confirmation" in told["left_out"]
    assert "YOLOv5 hyperparameters found by yolosearch" in page.text


def test_report_command_that_cannot_write_is_bad_input(study: TinyStudy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    done = report(study, tmp_path / "file" / "report.html")

    assert isinstance(done.exception, UserInputError)
    assert "cannot be written" in str(done.exception)


# ---- several objectives ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """Trials 1, 2 and 3 are the front, trial 2 beats the base in both."""
    folder = tmp_path_factory.mktemp("front")
    recalls = {number: {"recall": recall} for number, recall in enumerate((0.4, 0.35, 0.45, 0.6, 0.2))}
    fates = [(COMPLETE, value) for value in (0.4, 0.5, 0.41, 0.3, 0.2)]
    options = {"objectives": ["fitness", "recall"], "pruner": None, "figures": recalls, "base_hyp": None}
    return made_up_study(folder / "study", tmp_path_factory.getbasetemp(), fates, **options)


def test_report_page_of_several_objectives_has_the_front_its_table_and_how_to_export_it(several: TinyStudy) -> None:
    rerun_base(several, [{"fitness": 0.40, "recall": 0.40}, {"fitness": 0.41, "recall": 0.41}])
    review = Review.of(data_of(several))

    page = Page(report_page(review, None))

    assert "3 of 5 complete trials are on the front of fitness and recall; in one run trial 2 beats" in page.text
    assert "a front, unconfirmed" in page.text
    assert list(json.loads(page.scripts["script:figures"])) == [
        "plot-front",
        "plot-classes",
        "plot-history",
        "plot-importance",
        "plot-parallel",
    ]
    table = page.text[page.text.index("The trials of the front") : page.text.index("Each class against the base")]
    assert "0 base 0.4000 0.4000" in table
    assert "1 0.5000 +0.1000 0.3500 -0.0500" in table
    assert "2 better in all 0.4100 +0.0100 0.4500 +0.0500" in table
    assert "4 0.2000" not in table
    assert "The best trials" not in page.text
    assert "yolosearch export tiny --pareto all" in page.text
    assert "yolosearch export tiny --pareto 2 -o hyp.pareto-2.yaml" in page.text
    assert "python train.py --hyp hyp.pareto-2.yaml --data digits.yaml" in page.text
    assert "What it took" in page.text
    assert "The bars are one standard deviation of a run" in page.text
    assert page.addresses == []


def test_report_page_of_several_objectives_nothing_complete_says_so(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = {"objectives": ["fitness", "recall"], "pruner": None}
    study = made_up_study(tmp_path / "empty", tmp_path_factory.getbasetemp(), [], **options)

    page = Page(report_page(Review.of(data_of(study)), None))

    assert "Nothing to say yet: 0 of 1 trials have ended" in page.text
    assert "The trials of the front" not in page.text
    assert "--pareto" not in page.text


def test_report_command_of_several_objectives_tells_the_front(several: TinyStudy, tmp_path: Path) -> None:
    done = report(several, tmp_path / "report.html")

    told = json.loads(done.stdout)
    assert told["standing"] == "front"
    assert [(trial["number"], trial["is_base"]) for trial in told["front"]] == [(1, False), (2, False), (3, False)]
    assert told["front"][0]["values"] == {"fitness": 0.5, "recall": 0.35}
    assert told["verdict"] in Page((tmp_path / "report.html").read_text()).text


def test_plot_page_says_what_its_noise_is(study: TinyStudy) -> None:
    plots = {plot.key: plot for plot in Review.of(data_of(study, noise=0.01)).plots}

    assert plots["history"].noise in Page(plot_page(plots["history"], NAME)).text
    assert "± 0.028" in plots["history"].noise
