"""The commands on data sets: what they print, their JSON, their exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from tiny import write_data

from search.cli import main


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def yolosearch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["yolosearch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("command", ["check", "convert"])
def test_help_of_every_data_command_has_an_example(yolosearch: Command, command: str) -> None:
    result = yolosearch("data", command, "--help")
    assert (result.code, f"Example: yolosearch data {command} " in result.out) == (0, True)


def test_data_check_tables_and_sheet(yolosearch: Command, digits: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "out" / "sheet.png"
    result = yolosearch("data", "check", digits, "--sheet", sheet, "--sheet-images", 2)
    assert result.code == 0
    assert "digit 4" in result.out
    assert f"contact sheet: {sheet}" in result.out
    assert "warning: " in result.err
    assert cv2.imread(str(sheet)).shape[1] > 1000


def test_data_check_json_one_split(yolosearch: Command, digits: Path) -> None:
    result = yolosearch("data", "check", digits, "--json", "--split", "val")
    report = json.loads(result.out)
    assert [split["split"] for split in report["splits"]] == ["val"]
    assert report["splits"][0]["images"] == 8
    assert (report["usable"], report["sheet"], result.code) == (True, None, 0)


def test_data_check_bad_label_exit_code_2_and_its_line(yolosearch: Command, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), 9 * cv2.getStructuringElement(cv2.MORPH_RECT, (20, 20)))
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2\n3 0.5 0.5 0.2 0.2\n")
    (tmp_path / "d.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    result = yolosearch("data", "check", tmp_path / "d.yaml", "--split", "train")
    label = tmp_path / "labels" / "a.txt"
    assert result.code == 2
    assert f"error: {label}:1: 4 values" in result.err
    assert f"error: {label}:2: class 3 is not among the 1 names" in result.err
    assert "2 errors" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("missing.yaml",), "missing.yaml: cannot read the data set YAML (No such file"),
        (("missing.yaml", "--sheet", "a.jpg"), "--sheet: got 'a.jpg'; allowed: a file name that ends in .png"),
    ],
)
def test_data_check_bad_input_one_line(yolosearch: Command, words: tuple[str, ...], message: str) -> None:
    result = yolosearch("data", "check", *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_data_check_names_that_look_like_markup_printed_as_they_are(yolosearch: Command, tmp_path: Path) -> None:
    folder = tmp_path / "[/x]"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    cv2.imwrite(str(folder / "images" / "a.png"), 9 * cv2.getStructuringElement(cv2.MORPH_RECT, (20, 20)))
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    names = ["[/x]", "[red]b", ":cat:", "c\n\x1b[31md"]
    (folder / "d.yaml").write_text(json.dumps({"train": "images", "val": "images", "names": names}))
    result = yolosearch("data", "check", folder / "d.yaml", "--sheet", folder / "s.png")
    assert (result.code, (folder / "s.png").is_file()) == (0, True)
    for shown in ("[/x]", "[red]b", ":cat:", r"c\n\x1b[31md"):
        assert f" {shown} " in result.out
        assert f"class {shown} has " in result.err


# ------------------------------------------------------------------------------------------- convert


def coco_folder(folder: Path) -> Path:
    images = []
    for number in range(5):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.full((20, 40, 3), number, np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 20})
    objects = [{"image_id": number, "category_id": 8, "bbox": [4, 4, 8, 8]} for number in range(5)]
    document = {"images": images, "annotations": objects, "categories": [{"id": 8, "name": "cell"}]}
    (folder / "train.json").write_text(json.dumps(document))
    return folder


def test_data_convert_then_check_is_usable(yolosearch: Command, tmp_path: Path) -> None:
    source, out = coco_folder(tmp_path / "coco"), tmp_path / "yolo"
    result = yolosearch("data", "convert", "--from", "coco", source, out)
    assert result.code == 0
    assert "val is a random part of train, seed 0" in result.out
    report = json.loads(yolosearch("data", "check", out / "data.yaml", "--json").out)
    assert [(split["split"], split["images"], split["boxes"]) for split in report["splits"]] == [
        ("train", 4, 4),
        ("val", 1, 1),
    ]


def test_data_convert_name_that_looks_like_markup_printed_as_it_is(yolosearch: Command, tmp_path: Path) -> None:
    source = coco_folder(tmp_path / "coco")
    (source / "train.json").write_text((source / "train.json").read_text().replace('"cell"', '"[/x]"'))
    result = yolosearch("data", "convert", "--from", "coco", source, tmp_path / "yolo")
    assert (result.code, "[/x] " in result.out) == (0, True)


def test_data_convert_json_and_one_file_as_source(yolosearch: Command, tmp_path: Path) -> None:
    source = coco_folder(tmp_path / "coco") / "train.json"
    result = yolosearch("data", "convert", "--from", "coco", source, tmp_path / "o", "--val-fraction", 0.4, "--json")
    report = json.loads(result.out)
    assert (report["images"], report["boxes"]["val"]) == ({"train": 3, "val": 2}, {"cell": 2})
    assert report["skipped"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "coco", "missing", "out"), "missing: no such file or folder"),
        (("--from", "voc", ".", "out", "--train", "a.json"), "--train, --val, --test: only for coco"),
        (("--from", "voc", ".", "out"), ".: no XML file in it or in Annotations"),
    ],
)
def test_data_convert_bad_input_one_line(
    yolosearch: Command, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = yolosearch("data", "convert", *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
