"""`init` and `schema`: the files that they write, and the questions on a real terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import write_data

from search.cli import main
from search.config import load_study_config
from search.schema import schema_text

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def yolosearch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["yolosearch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny digits: 16 images to train on, two classes."""
    return write_data(tmp_path_factory.getbasetemp())


def test_init_writes_a_study_that_check_passes(yolosearch: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "mine.yaml"

    code, out, _ = yolosearch("init", data, "-o", file, "--name", "mine", "--epochs", 3)

    assert code == 0
    assert f"yolosearch check {file} --measure" in out
    assert "the study is called mine" in out
    assert (file.parent / "study.schema.json").read_text() == schema_text()
    config = load_study_config(file)
    assert (config.name, config.train.epochs, config.train.image_size) == ("mine", 3, 64)
    code, out, _ = yolosearch("check", file, "--runs-dir", tmp_path / "runs")
    assert code == 0
    assert "16 train, 8 val" in out


def test_init_takes_the_folder_of_the_data(
    yolosearch: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert yolosearch("init", data.parent, "--no-schema")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.yaml"]


def test_init_file_that_exists_stays_without_force(yolosearch: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("mine")

    code, _, err = yolosearch("init", data, "-o", file)

    assert (code, file.read_text()) == (2, "mine")
    assert err == f"{file}: exists already; allowed: another --output, or --force\n"
    assert yolosearch("init", data, "-o", file, "--force")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-size", 100), "train.image_size: got 100; allowed: a whole number >= 32 and a multiple of 32"),
        (("--weights", "no.pt"), "--weights: no.pt: no such file; nothing is downloaded: take it from the official "),
        (("--name", "a b"), "'a b'"),
    ],
)
def test_init_bad_wish_is_one_line_and_writes_nothing(
    yolosearch: Command, data: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    file = tmp_path / "study.yaml"

    code, _, err = yolosearch("init", data, "-o", file, *options)

    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not file.exists()


def test_init_data_that_training_refuses_names_the_errors(yolosearch: Command, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("path: .\ntrain: images\nval: images\nnames: [a]\n")
    (tmp_path / "images").mkdir()

    code, _, err = yolosearch("init", file, "-o", tmp_path / "study.yaml")

    assert code == 2
    assert err.splitlines()[0].startswith("error: ")
    assert f"`yolosearch data check {file}` shows all" in err.splitlines()[-1]
    assert not (tmp_path / "study.yaml").exists()


def test_init_on_a_terminal_asks_and_enter_takes_the_suggestion(data: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    words = [
        sys.executable,
        "-m",
        "search",
        "init",
        str(data),
        "-o",
        str(tmp_path / "study.yaml"),
        "--image-size",
        "96",
    ]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "100"})
    os.close(slave)
    os.write(master, b"s\n\n7\n\n")  # model, weights, epochs, trials

    assert process.wait(timeout=60) == 0
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "model size" in shown
    assert "image size" not in shown
    config = load_study_config(tmp_path / "study.yaml")
    assert (config.train.model, config.train.image_size, config.train.epochs) == ("s", 96, 7)
    assert (config.train.weights, config.trials) == (None, 12 * len(config.space))


def test_schema_prints_the_schema(yolosearch: Command) -> None:
    code, out, _ = yolosearch("schema")

    assert code == 0
    assert json.loads(out)["properties"]["trials"] == {
        "description": "Number of trials, the base (trial 0) included.",
        "type": "integer",
        "minimum": 1,
    }
    assert "box" in yaml.safe_load(out)["properties"]["space"]["properties"]
