"""What a data set's figures decide in a new study file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.config import load_study_config, parse_study
from search.starter import (
    Wishes,
    choose_batch_size,
    choose_epochs,
    choose_image_size,
    choose_pruner,
    draft_study,
    search_space,
    study_name_of,
    study_text,
    warn_of_cpu,
)
from yolocore.data.check import BoxSizes, ClassCount, DatasetReport, SplitReport

SIZES = BoxSizes(size=(40.0, 100.0, 160.0), small=10, medium=500, large=490, vanishing=0)
TRAIN = SplitReport(
    split="train",
    images=200,
    without_labels=0,
    without_label_file=0,
    boxes=1000,
    polygons=0,
    classes=(ClassCount("cat", 900, 190), ClassCount("dog: small", 100, 80)),
    boxes_per_image=(1.0, 5.0, 9.0),
    image_sizes=((640, 480), (1920, 1080)),
    image_aspect=(1.3, 1.3, 1.3),
    box_aspect=(1.0, 1.0, 1.0),
    native=SIZES,
    scaled=SIZES,
)


def split(**changes: Any) -> SplitReport:
    return replace(TRAIN, **{**changes, "scaled": replace(SIZES, **changes.get("scaled", {}))})


def report(folder: Path = Path("/data"), imbalance: float | None = 9.0, **changes: Any) -> DatasetReport:
    train = split(**changes)
    return DatasetReport(
        source=folder / "pets.yaml",
        names=tuple(count.name for count in train.classes),
        image_size=640,
        splits=(train, split(split="val")),
        imbalance=imbalance,
        errors=(),
        warnings=(),
    )


ONE_CLASS = (ClassCount("cat", 1000, 190),)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 640),
        ({"image_sizes": ((80, 60), (300, 200))}, 320),
        ({"scaled": {"size": (5.0, 9.0, 30.0)}}, 1280),
        ({"scaled": {"size": (8.0, 9.0, 30.0)}}, 800),
        ({"scaled": {"size": (5.0, 9.0, 30.0)}, "image_sizes": ((640, 480), (1000, 700))}, 1024),
        ({"scaled": {"size": (5.0, 9.0, 30.0)}, "image_sizes": ((640, 480), (640, 480))}, 640),
    ],
    ids=["usual", "small images", "tiny objects", "small objects", "tiny objects, limited", "no pixels to gain"],
)
def test_choose_image_size_follows_images_and_objects(changes: dict[str, Any], size: int) -> None:
    choice = choose_image_size(split(**changes))

    assert choice.value == size
    assert choice.value % 32 == 0


def test_choose_epochs_from_weights_are_a_fifth_and_within_limits() -> None:
    scratch, weights = (choose_epochs(split(images=205), from_weights=which) for which in (False, True))

    assert (scratch.value, weights.value) == (160, 35)
    assert choose_epochs(split(images=100_000), from_weights=False).value == 10
    assert choose_epochs(split(images=3), from_weights=False).value == 300


def test_choose_batch_size_is_never_above_the_images() -> None:
    assert choose_batch_size(split(images=5)).value == 5
    assert choose_batch_size(split()).value == 16


@pytest.mark.parametrize(
    ("images", "epochs", "pruner"),
    [
        (200, 30, {"name": "median", "min_epochs": 8}),  # 100 iterations of 13 an epoch
        (200, 10, {"name": "median", "min_epochs": 5}),
        (200, 60, "median"),
        (100, 10, {"name": "median", "min_epochs": 5}),  # all of it is warm-up
        (200, 1, "none"),
        (2000, 15, "median"),  # three epochs, as `warmup_epochs` says
        (2000, 12, "median"),
        (2000, 10, {"name": "median", "min_epochs": 3}),
    ],
)
def test_choose_pruner_decides_past_the_warm_up_or_half_way(images: int, epochs: int, pruner: object) -> None:
    assert choose_pruner(images, 16, epochs).value == pruner


def test_search_space_one_class_leaves_the_class_loss_out() -> None:
    data = report(classes=ONE_CLASS, imbalance=1.0)

    assert list(search_space(data, data.splits[0])) == ["box", "obj", "obj_pw"]


def test_search_space_imbalance_small_objects_and_background_widen_it() -> None:
    plain = search_space(report(imbalance=2.0), split())
    small = search_space(report(), split(scaled={"small": 600}))
    empty = search_space(report(), split(without_labels=100))

    assert [key for key in plain if key != "fl_gamma"] == ["box", "cls", "obj", "cls_pw", "obj_pw"]
    assert (plain["cls_pw"].value["high"], search_space(report(), split())["cls_pw"].value["high"]) == (4.0, 8.0)
    assert (plain["obj_pw"].value["high"], small["obj_pw"].value["high"]) == (4.0, 8.0)
    assert "fl_gamma" not in plain
    assert empty["fl_gamma"].value == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("path", "name"), [("a/pets.yaml", "pets"), ("My pets/data.yaml", "My-pets"), ("x/ä.yaml", "study")]
)
def test_study_name_of_is_a_name_that_a_study_may_have(tmp_path: Path, path: str, name: str) -> None:
    assert study_name_of(tmp_path / path) == name


@pytest.mark.parametrize(
    ("wishes", "changes"),
    [
        (Wishes(), {}),
        (Wishes(), {"classes": ONE_CLASS}),
        (Wishes(), {"without_labels": 150}),
        (Wishes(name="mine", model="s", image_size=320, batch_size=4, epochs=7, trials=9), {}),
    ],
    ids=["plain", "one class", "background", "wishes"],
)
@pytest.mark.parametrize("with_schema", [True, False])
def test_study_text_is_a_study_that_says_what_was_decided(
    tmp_path: Path, wishes: Wishes, changes: dict[str, Any], with_schema: bool
) -> None:
    (tmp_path / "pets.yaml").write_text("names: [a]\n")
    draft = draft_study(report(tmp_path, **changes), wishes)
    text = study_text(draft, tmp_path, with_schema=with_schema)
    file = tmp_path / "study.yaml"
    file.write_text(text)

    config = load_study_config(file)

    assert (config.name, config.data) == (draft.name, str(tmp_path / "pets.yaml"))
    assert (config.train.image_size, config.train.epochs) == (draft.image_size.value, draft.epochs.value)
    assert (config.trials, list(config.space)) == (draft.trials.value, list(draft.space))
    assert config.pruner.min_epochs == (3 if wishes.epochs == 7 else draft.epochs.value // 5)
    assert config.name == (wishes.name or "pets")
    assert config.trials == (wishes.trials or 12 * len(config.space))
    assert text.startswith("# yaml-language-server: $schema=study.schema.json\n") is with_schema
    assert max(map(len, text.splitlines())) <= 120


def test_study_text_long_trials_are_not_ended_by_patience(tmp_path: Path) -> None:
    texts = [study_text(draft_study(report(), Wishes(epochs=epochs)), tmp_path) for epochs in (100, 101)]

    assert ["patience" in yaml.safe_load(text)["train"] for text in texts] == [False, True]
    assert yaml.safe_load(texts[1])["train"]["patience"] == 0


def test_study_text_of_data_elsewhere_has_its_whole_path_and_quotes_what_yaml_would_misread(tmp_path: Path) -> None:
    draft = draft_study(report(Path("/data/with space: and #")), Wishes())

    document = yaml.safe_load(study_text(draft, tmp_path))

    assert document["data"] == "/data/with space: and #/pets.yaml"
    assert parse_study(document, source="the text").name == "pets"


def test_study_text_the_hint_for_the_rarest_class_is_a_valid_objective(tmp_path: Path) -> None:
    text = study_text(draft_study(report(), Wishes()), tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("objective")]

    hint = yaml.safe_load(line.partition("matters most: ")[2])

    assert hint == {"fitness": 0.7, "class_ap:dog: small": 0.3}


def test_warn_of_cpu_large_study_names_hours_and_remedy() -> None:
    warning = warn_of_cpu(draft_study(report(), Wishes(epochs=160, trials=60, image_size=640)), 200, 2)

    assert warning is not None
    assert "60 trials of 160 epochs at 640 px are roughly 99 hours of training on 2 cores" in warning
    assert warning.endswith("--image-size 160 --epochs 10 --weights yolov5n.pt")


def test_warn_of_cpu_remedy_is_what_is_left_to_make_smaller(tmp_path: Path) -> None:
    wishes = Wishes(model="x", weights=tmp_path / "yolov5x.pt", epochs=10, trials=60, image_size=160)
    warning = warn_of_cpu(draft_study(report(), wishes), 20_000, 2)

    assert warning is not None
    assert warning.endswith("smaller is wiser: --trials 20")


@pytest.mark.parametrize(("images", "cores"), [(200, 2), (2000, 32)])
def test_warn_of_cpu_study_of_a_night_is_none(images: int, cores: int) -> None:
    assert warn_of_cpu(draft_study(report(), Wishes(epochs=10, trials=60, image_size=160)), images, cores) is None
