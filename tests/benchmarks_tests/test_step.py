"""`benchmarks/step.py`: what it compares is comparable, and a checkout of YOLOv5 is run as a user would run it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import step
import torch
import yaml

from yolocore.device import resolve_device
from yolocore.evaluate import evaluate
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import ANCHORS_KEY
from yolocore.training.config import TrainConfig
from yolocore.training.trainer import TrainingData, start_weights

STAND_IN = """
import json, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(words["--project"], words["--name"])
folder.mkdir(parents=True)
epochs = int(words["--epochs"])
with open("calls.jsonl", "a") as log:
    log.write(json.dumps({"words": sys.argv[1:], "data": Path(words["--data"]).read_text(), "python": sys.executable}) + "\\n")
time.sleep(0.02 * epochs)
rows = epochs - ROWS_LEFT_OUT
(folder / "results.csv").write_text("   epoch,  x\\n" + "".join(f"  {n},  0\\n" for n in range(rows)))
sys.exit(EXIT_CODE)
"""  # noqa: E501


def stand_in(folder: Path, left_out: int = 0, code: int = 0) -> step.Checkout:
    """A folder with a train.py that takes YOLOv5's options, leaves its results and writes down how it was called."""
    folder.mkdir(exist_ok=True)
    text = STAND_IN.replace("ROWS_LEFT_OUT", str(left_out)).replace("EXIT_CODE", str(code))
    (folder / "train.py").write_text(text)
    return step.Checkout(folder, sys.executable)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Ten images to train on, six to validate: bright squares of two classes on noise."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 6)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 80, (64, 48, 3), dtype=np.uint8)
            x, y = rng.integers(2, 22, 2).tolist()
            image[y : y + 24, x : x + 24, index % 2 * 2] = 255
            cv2.imwrite(str(folder / "images" / split / f"{index:02}.png"), image)
            line = f"{index % 2} {(x + 12) / 48} {(y + 12) / 64} {24 / 48} {24 / 64}\n"
            (folder / "labels" / split / f"{index:02}.txt").write_text(line)
    source = folder / "squares.yaml"
    source.write_text("path: null\ntrain: images/train\nval: images/val\nnames: [blue, red]\n")
    return TrainConfig(
        model="n", data=source, image_size=64, batch_size=4, epochs=4, device="cpu", precision="fp32", workers=0
    )


def test_plain_validation_gives_our_metrics(fixtures_dir: Path) -> None:
    config = TrainConfig(
        model="n",
        data=fixtures_dir / "data" / "bccd" / "bccd.yaml",
        weights=fixtures_dir / "weights" / "yolov5n.pt",
        image_size=160,
        batch_size=16,
        epochs=2,
        device="cpu",
        precision="fp32",
        workers=0,
    )
    data = TrainingData.load(config, Hyperparameters())
    weights = start_weights(config, data.num_classes).state
    # A head that answers something: that of a training would take minutes.
    for level in range(3):
        weights[f"model.24.m.{level}.weight"].normal_(std=0.05, generator=torch.Generator().manual_seed(level))
    plain = step.PlainTrainer(config, data, weights, weights[ANCHORS_KEY]).validate()
    pack = step.OurTrainer(config, data, weights).pack
    ours = evaluate(pack.evaluation_model(), data.validation, pack.loss_weights, 4.0, resolve_device("cpu"), "fp32")[0]
    assert ours.map50 > 0
    assert (plain.map50, plain.map, plain.recall) == pytest.approx((ours.map50, ours.map, ours.recall), rel=0.02)
    assert plain.box_loss == pytest.approx(ours.box_loss + ours.obj_loss + ours.cls_loss, rel=0.01)
    assert (plain.images, plain.labels) == (ours.images, ours.labels)


def test_compare_times_every_contender_and_its_validation(config: TrainConfig) -> None:
    rows, validation = step.compare(config, ["fp32"], 2)
    assert set(rows) == set(validation) == {step.PLAIN, "ours fp32"}
    assert all(0 < seconds < 60 for seconds in validation.values())
    for row in rows.values():
        assert row["step"] == pytest.approx(sum(row[part] for part in (*step.PARTS, "other")))
        assert all(row[part] > 0 for part in step.PARTS)


def test_seconds_per_epoch_interleaves_and_takes_the_best_runs() -> None:
    calls: list[tuple[str, int]] = []
    taken = {("a", 1): [9.0, 3.0], ("a", 5): [7.0, 8.0], ("b", 1): [2.0, 2.5], ("b", 5): [14.0, 10.0]}

    def run(name: str, epochs: int) -> float:
        calls.append((name, epochs))
        return taken[name, epochs][calls.count((name, epochs)) - 1]

    seconds = step.seconds_per_epoch({name: lambda n, name=name: run(name, n) for name in "ab"}, 1, 5)
    assert seconds == {"a": (7 - 3) / 4, "b": (10 - 2) / 4}
    assert calls == [("a", 1), ("b", 1), ("a", 5), ("b", 5)] * 2


def test_seconds_per_epoch_that_the_noise_hides_says_so() -> None:
    with pytest.raises(SystemExit, match=r"a: 4 epochs took no longer than 1; give more --epochs"):
        step.seconds_per_epoch({"a": lambda n: 3.0}, 1, 4)


def test_against_yolov5_runs_its_train_py_in_turn_with_ours(config: TrainConfig, tmp_path: Path) -> None:
    checkout = stand_in(tmp_path / "yolov5")
    given = replace(config, device="auto", seed=3)
    seconds = step.against_yolov5(checkout, given, ["fp32"], 2)
    assert set(seconds) == {"yolov5", "ours fp32"}
    assert min(seconds.values()) > 0
    calls = [json.loads(line) for line in (checkout.folder / "calls.jsonl").read_text().splitlines()]
    assert [call["words"][call["words"].index("--epochs") + 1] for call in calls] == ["1", "2", "1", "2"]
    words = calls[0]["words"]
    assert (words[-1], calls[0]["python"]) == ("--exist-ok", sys.executable)
    options = dict(zip(words[:-1:2], words[1::2], strict=True))
    assert (options["--img"], options["--batch"], options["--seed"]) == ("64", "4", "3")
    assert options["--device"] == ("0" if torch.cuda.is_available() else "cpu")
    assert yaml.safe_load(calls[0]["data"])["path"] == str(config.data.parent)
    assert len({call["words"][call["words"].index("--project") + 1] for call in calls}) == 4


@pytest.mark.parametrize(
    ("left_out", "code", "message"), [(1, 0, "results.csv has 1 epochs, expected 2"), (0, 3, "exit code 3")]
)
def test_run_yolov5_that_does_not_train_every_epoch_ends_the_benchmark(
    left_out: int, code: int, message: str, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        step.run_yolov5(stand_in(tmp_path / "yolov5", left_out, code), config, 2)


def test_write_inputs_any_path_in_the_yaml_becomes_absolute(config: TrainConfig, tmp_path: Path) -> None:
    for given, expected in ((None, tmp_path), ("", tmp_path), ("sub", tmp_path / "sub"), ("/data", Path("/data"))):
        source = tmp_path / "d.yaml"
        source.write_text(yaml.safe_dump({"path": given, "train": "a", "val": "b", "names": ["c"]}))
        data, hyp = step.write_inputs(tmp_path, replace(config, data=source))
        assert yaml.safe_load(data.read_text())["path"] == str(expected.resolve())
        assert Hyperparameters.from_yaml(hyp) == Hyperparameters()


def test_yolov5_device_is_what_ours_comes_to() -> None:
    assert step.yolov5_device("cpu") == "cpu"
    assert step.yolov5_device("auto") == step.yolov5_device(str(resolve_device("auto")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "1"], "--epochs: got 1; allowed: 2 or more"),
        (["--yolov5", "nowhere"], "--yolov5: nowhere holds no train.py"),
        (["--yolov5", ".", "--yolov5-python", "no-such-python"], "--yolov5-python: no-such-python is no program"),
    ],
)
def test_parse_what_cannot_be_run_one_line_before_anything_starts(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(stand_in(tmp_path / "checkout").folder)
    with pytest.raises(SystemExit) as caught:
        step.parse(["--data", "d", "--weights", "w", *words])
    assert (caught.value.code, message in capsys.readouterr().err) == (2, True)
