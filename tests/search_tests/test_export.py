"""The exported hyp YAML: complete, raw, honest about where it comes from."""

import dataclasses
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from search.config import StudyConfig, parse_study
from search.database import make_engine
from search.errors import UserInputError
from search.export import BestTrial, best_trial, export_best
from search.ledger import Ledger, StudyRecord, TicketState
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, Hyperparameters

BEST = BestTrial(
    study="blood",
    trial_number=7,
    hyperparameters=Hyperparameters(box=0.1 + 0.2, cls_pw=1.7, fl_gamma=1e-05),
    searched=("box", "cls_pw", "fl_gamma"),
    objective="fitness at the last epoch",
    value=0.41234,
    base_value=0.4,
    complete=9,
    fingerprint="0123456789abcdef",
    metrics={"fitness": 0.41234, "map50": 0.6, "val_box": 0.03},
    anchors="kept: best possible recall 1.0000, 5.21 anchors per label",
)


def test_export_best_file_has_every_key_in_raw_units_and_no_anchors(tmp_path: Path) -> None:
    path = export_best(BEST, tmp_path / "deep" / "hyp.best.yaml")

    values = yaml.safe_load(path.read_text())
    assert list(values) == list(HYPERPARAMETER_KEYS)
    assert (values["box"], values["cls_pw"], values["fl_gamma"]) == (0.30000000000000004, 1.7, 1e-05)
    assert (values["cls"], values["obj"], values["weight_decay"]) == (0.5, 1.0, 0.0005)
    assert Hyperparameters.from_yaml(path) == BEST.hyperparameters
    assert list(path.parent.iterdir()) == [path]


def test_export_best_header_names_where_the_values_come_from(tmp_path: Path) -> None:
    text = export_best(BEST, tmp_path / "hyp.yaml").read_text()

    comments = [line for line in text.splitlines() if line.startswith("#")]
    header = "\n".join(comments)
    assert comments == text.splitlines()[: len(comments)]
    assert "yolosearch 0." in comments[0]
    assert "study:      blood, trial 7, the best of 9 complete trials" in header
    assert "fitness at the last epoch = 0.41234, base 0.40000 (+0.01234)" in header
    assert "metrics:    fitness 0.4123, map50 0.6000\n" in header
    assert "fingerprint 0123456789abcdef" in header
    assert "anchors:    kept: best possible recall 1.0000" in header
    assert "written:    20" in header
    assert "unconfirmed" in header
    assert "cls_pw is the positive weight of YOLOv5's class loss" in header


def test_export_best_when_nothing_beat_the_base_says_so(tmp_path: Path) -> None:
    base = dataclasses.replace(BEST, trial_number=0, hyperparameters=Hyperparameters(), value=0.4)

    text = export_best(base, tmp_path / "hyp.yaml").read_text()

    assert "no trial beat the base" in text


def test_export_best_into_a_file_as_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserInputError, match=r"hyp\.yaml: cannot be written: .*; allowed: a path in a writable folder"):
        export_best(BEST, tmp_path / "file" / "hyp.yaml")


def test_export_best_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text("box: 0.05\n")
    broken = dataclasses.replace(BEST, hyperparameters=dataclasses.replace(BEST.hyperparameters))
    object.__setattr__(broken.hyperparameters, "box", 1e9)

    with pytest.raises(Exception, match="box"):
        export_best(broken, path)

    assert path.read_text() == "box: 0.05\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def config() -> StudyConfig:
    return parse_study(
        {"name": "blood", "data": "builtin:digits", "space": {"box": {"low": 0.02, "high": 0.2}}, "trials": 3},
        source="study.yaml",
    )


@pytest.fixture
def ledger(tmp_path: Path, config: StudyConfig) -> Ledger:
    ledger = Ledger(make_engine(f"sqlite:///{tmp_path}/study.db"))
    ledger.initialise()
    record = StudyRecord(name="blood", config=config.to_json(), fingerprint="feed", versions={}, created=0.0)
    ledger.create_study(record, [{"box": 0.05}, None, None], (1, 0, {"box": 0.05}))
    return ledger


def finish(ledger: Ledger, values: list[float | None]) -> None:
    for index, (ticket, value) in enumerate(zip(ledger.claim("blood", "w", 3, 60.0), values, strict=True)):
        if ticket.trial_id is None:
            ticket = ledger.link_trial(ticket, index + 1, index, {"box": 0.05 + index / 100})
        if value is not None:
            ledger.record_epoch(ticket, 0, value / 2, {"fitness": value / 2}, 1.0)
            ledger.record_epoch(ticket, 1, value, {"fitness": value}, 2.0)
        ledger.finish(ticket, TicketState.FAIL if value is None else TicketState.COMPLETE, value, None)


def test_best_trial_is_the_complete_one_with_the_highest_value(ledger: Ledger, config: StudyConfig) -> None:
    finish(ledger, [0.3, None, 0.5])

    best = best_trial(ledger, config)

    assert (best.trial_number, best.value, best.base_value, best.complete) == (2, 0.5, 0.3, 2)
    assert best.hyperparameters.box == pytest.approx(0.07)
    assert (best.fingerprint, best.metrics, best.searched) == ("feed", {"fitness": 0.5}, ("box",))


def test_best_trial_of_equals_is_the_base(ledger: Ledger, config: StudyConfig) -> None:
    finish(ledger, [0.5, 0.5, 0.1])

    assert best_trial(ledger, config).is_base


def test_best_trial_without_a_complete_trial_is_one_line(ledger: Ledger, config: StudyConfig) -> None:
    with pytest.raises(UserInputError, match="study blood: none of 3 trials is complete; allowed: "):
        best_trial(ledger, config)


def test_export_while_others_write_is_always_a_whole_file_of_one_trial(
    ledger: Ledger, config: StudyConfig, tmp_path: Path
) -> None:
    path = tmp_path / "hyp.yaml"
    ledger.add_tickets("blood", 17)
    over = threading.Event()

    def write() -> None:
        """Each trial is better than those before it, and its value tells its box."""
        for number in range(20):
            (ticket,) = ledger.claim("blood", "w", 1, 60.0)
            if ticket.trial_id is None:
                ticket = ledger.link_trial(ticket, number + 1, number, {"box": 0.05 + number / 1000})
            ledger.record_epoch(ticket, 0, number / 100, {"fitness": number / 100}, 1.0)
            ledger.finish(ticket, TicketState.COMPLETE, number / 100, None)
            time.sleep(0.01)

    def export() -> int:
        exports = 0
        while not over.is_set():
            with suppress(UserInputError):  # as long as no trial is complete
                export_best(best_trial(ledger, config), path)
                exports += 1
        return exports

    with ThreadPoolExecutor(3) as pool:
        exporters = [pool.submit(export) for _ in range(2)]
        writer = pool.submit(write)
        read = 0
        try:
            while not writer.done():
                if path.exists():
                    text = path.read_text()
                    shown = re.search(r"trial (\d+)", text)
                    assert shown is not None
                    assert yaml.safe_load(text)["box"] == pytest.approx(0.05 + int(shown[1]) / 1000)
                    read += 1
        finally:
            over.set()
        writer.result()
    assert read > 0
    assert all(exporter.result() > 0 for exporter in exporters)
    assert best_trial(ledger, config).trial_number == 19
