"""Data set YAML, splits, labels and fingerprint: what is accepted, and one clear line for what is not."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from yolocore.data.dataset import (
    fingerprint,
    image_paths,
    load_dataset_config,
    parse_labels,
    scan_split,
)
from yolocore.data.images import label_path, native_size, read_damaged_image, read_image
from yolocore.errors import DatasetError

LABEL_CASES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "label_file_cases.json").read_text(encoding="utf-8"),
)
TEXT_CASES = [name for name in LABEL_CASES if not name.startswith("__")]


def write_image(path: Path, height: int = 20, width: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))


def write_yaml(folder: Path, **changes: Any) -> Path:
    document = {"path": ".", "train": "images/train", "val": "images/val", "names": ["cat", "dog"], **changes}
    source = folder / "pets.yaml"
    source.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return source


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A small correct data set: two training images, one of them background, and one for validation."""
    for name in ("train/a", "train/b", "val/c"):
        write_image(tmp_path / "images" / f"{name}.png")
    for name, text in (("train/a", "0 0.5 0.5 0.2 0.2\n1 0.25 0.25 0.1 0.1\n"), ("val/c", "1 0.5 0.5 0.5 0.5\n")):
        label = tmp_path / "labels" / f"{name}.txt"
        label.parent.mkdir(parents=True)
        label.write_text(text)
    write_yaml(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("case", TEXT_CASES)
def test_parse_labels_golden_text_accepted_or_refused_alike(case: str) -> None:
    golden = LABEL_CASES[case]
    if not golden["accepted"]:
        with pytest.raises(DatasetError, match=r"^a\.txt:\d: "):
            parse_labels(golden["text"], "a.txt", 3)
        return
    labels, polygons, duplicates = parse_labels(golden["text"], "a.txt", 3)
    expected = np.array(golden["labels"], np.float32).reshape(-1, 5)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.float32
    assert len(polygons) == golden["n_segments"]
    assert bool(duplicates) == golden["message"]


def test_parse_labels_only_spaces_refused_with_its_line() -> None:
    with pytest.raises(DatasetError, match=r"^a\.txt:2: the line holds only spaces"):
        parse_labels("0 0.5 0.5 0.2 0.2\n   \n", "a.txt", 1)


def test_parse_labels_duplicate_polygons_keep_their_own_points() -> None:
    text = "1 .1 .1 .4 .1 .4 .5\n0 .2 .2 .6 .3 .5 .9\n1 .1 .1 .4 .1 .4 .5\n"
    labels, polygons, duplicates = parse_labels(text, "a.txt", 2)
    assert labels[:, 0].tolist() == [0, 1]
    assert duplicates == 1
    assert polygons[0][0].tolist() == pytest.approx([0.2, 0.2])
    assert polygons[1][0].tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(("size", "accepted"), [((9, 30), False), ((10, 30), True), ((10, 10), True)])
def test_native_size_golden_sides_accepted_or_refused(size: tuple[int, int], accepted: bool, tmp_path: Path) -> None:
    height, width = size
    assert LABEL_CASES[f"__image_img{height}x{width}"]["accepted"] is accepted
    write_image(tmp_path / "a.png", height, width)
    if accepted:
        assert native_size(tmp_path / "a.png") == size
    else:
        with pytest.raises(DatasetError, match="30x9 pixels; both sides must be at least 10"):
            native_size(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_native_size_exif_orientation_same_as_decoded(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_image(path, 20, 30)
    tag = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + b"\0\0\0\0\0\0"
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(tag) + 2).to_bytes(2, "big") + tag + data[2:])
    assert native_size(path) == read_image(path).shape[:2] == ((30, 20) if orientation in (6, 8) else (20, 30))


def test_label_path_golden_paths_same(small_golden_dir: Path) -> None:
    golden = json.loads((small_golden_dir / "image_to_label_paths.json").read_text())
    assert {image: str(label_path(image)) for image in golden} == golden


# ------------------------------------------------------------------------------------------- a good data set


def test_scan_split_good_set_labels_sizes_and_background(pets: Path) -> None:
    config = load_dataset_config(pets / "pets.yaml")
    split = scan_split(config, "train")
    assert config.num_classes == 2
    assert [item.image.name for item in split.images] == ["a.png", "b.png"]
    assert [item.size for item in split.images] == [(20, 30), (20, 30)]
    assert split.images[0].labels[:, 0].tolist() == [0, 1]
    assert split.images[1].labels.shape == (0, 5)
    assert split.problems == ()
    assert split.label_count == 2


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("images/train", ["a.png", "b.png"]),
        (["images/val", "images/train"], ["a.png", "b.png", "c.png"]),
        ("images", ["a.png", "b.png", "c.png"]),
        ("lists/some.txt", ["b.png", "c.png"]),
        (["lists/some.txt", "images/train"], ["a.png", "b.png", "c.png"]),
        ("../images/train", ["a.png", "b.png"]),
    ],
)
def test_image_paths_every_kind_of_entry_found_once_sorted(split: Any, expected: list[str], pets: Path) -> None:
    (pets / "lists").mkdir()
    (pets / "lists" / "some.txt").write_text("./../images/train/b.png\n\nimages/val/c.png\n")
    config = load_dataset_config(write_yaml(pets, train=split))
    assert [image.name for image in image_paths(config, "train")] == expected


def test_load_dataset_config_names_as_mapping_ordered_by_key(pets: Path) -> None:
    assert load_dataset_config(write_yaml(pets, names={1: "dog", 0: "cat"})).names == ("cat", "dog")


def test_load_dataset_config_no_path_means_folder_of_the_yaml(
    pets: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_dataset_config(write_yaml(pets, path=None)).root == pets


def test_load_dataset_config_missing_test_split_matters_only_when_asked(pets: Path) -> None:
    config = load_dataset_config(write_yaml(pets, test="images/test"))
    assert len(scan_split(config, "val").images) == 1
    with pytest.raises(DatasetError, match=r"pets\.yaml: test: "):
        scan_split(config, "test")


def test_image_paths_linked_folder_in_a_loop_ends(pets: Path) -> None:
    (pets / "images" / "train" / "again").symlink_to(pets / "images" / "train")
    config = load_dataset_config(pets / "pets.yaml")
    assert [image.name for image in image_paths(config, "train")] == ["a.png", "b.png"]


def test_scan_split_duplicate_labels_removed_and_told(pets: Path) -> None:
    label = pets / "labels" / "train" / "a.txt"
    label.write_text("1 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n")
    split = scan_split(load_dataset_config(pets / "pets.yaml"), "train")
    assert split.images[0].labels[:, 0].tolist() == [0, 1]
    assert split.problems == (f"{label}: 1 duplicate label removed",)


def test_scan_split_not_strict_leaves_the_image_out_and_tells(pets: Path) -> None:
    label = pets / "labels" / "train" / "b.txt"
    label.write_text("0 0.5 0.5 0.2\n")
    split = scan_split(load_dataset_config(pets / "pets.yaml"), "train", strict=False)
    assert [item.image.name for item in split.images] == ["a.png"]
    assert split.problems == (f"image left out: {label}:1: 4 values; expected 5 (class x y w h)",)


def test_scan_split_bccd_counts_match(fixtures_dir: Path) -> None:
    config = load_dataset_config(fixtures_dir / "data" / "bccd" / "bccd.yaml")
    splits = [scan_split(config, name) for name in ("train", "val", "test")]
    assert sum(len(split.images) for split in splits) == 364
    assert {item.size for split in splits for item in split.images} == {(480, 640)}
    assert config.names == ("RBC", "WBC", "Platelets")


# ------------------------------------------------------------------------------------------- broken data sets


@pytest.mark.parametrize("missing", [2, 3, 300])
def test_read_image_jpeg_without_end_marker_same_pixels_as_imread(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    whole, content = read_image(path), path.read_bytes()
    path.write_bytes(content[:-missing])
    found, completed = read_damaged_image(path)
    assert completed
    np.testing.assert_array_equal(found, cv2.imread(str(path)))
    np.testing.assert_array_equal(found[:40], whole[:40])
    path.write_bytes(content + b"tail")
    assert not read_damaged_image(path)[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 1e39 .5 .2 .2", "'1e39' is too large"),
        ("-1e300 .5 .5 .2 .2", "'-1e300' is too large"),
        ("0 inf .5 .2 .2", "x is inf"),
        ("0 inf .5 -inf .5 .2 .2", "x is nan"),
        ("0 3e38 3e38 3e38 3e38 3e38 3e38", "x is inf"),
    ],
)
def test_parse_labels_numbers_beyond_float32_one_line_and_no_warning(line: str, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DatasetError, match=re.escape(f"a.txt:2: {message}")):
            parse_labels(f"0 .5 .5 .2 .2\n{line}\n", "a.txt", 2)


def rewrite(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def with_yaml(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_yaml(folder, **changes)

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return change


def truncate(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:20])

    return change


def empty_folder(folder: Path) -> None:
    for image in (folder / "images" / "val").iterdir():
        image.unlink()


YAML = "pets.yaml"
BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no YAML": (without(YAML), (YAML, "No such file")),
    "YAML is no YAML": (rewrite(YAML, "train: [a\nval: b\n"), (f"{YAML}:2", "not valid YAML")),
    "YAML is a list": (rewrite(YAML, "- a\n"), (YAML, "mapping", "['a']")),
    "YAML is no text": (rewrite(YAML, b"\xff\xfe\x00"), (YAML, "UTF-8")),
    "val is missing": (with_yaml(val=None), (f"{YAML}: val", "train, val and names")),
    "train is a number": (with_yaml(train=3), (f"{YAML}: train", "found 3", "a list file")),
    "path is no folder": (with_yaml(path="nowhere"), (f"{YAML}: path", "'nowhere'", "folder")),
    "split folder is missing": (with_yaml(val="images/vla"), (f"{YAML}: val", "'images/vla'", "does not exist")),
    "data never fetched": (
        with_yaml(val="images/vla", download="https://example.org/pets.zip"),
        (f"{YAML}: val", "fetch the data first"),
    ),
    "split folder is empty": (empty_folder, (f"{YAML}: val", "images/val", "png")),
    "split is an image": (with_yaml(val="images/val/c.png"), (f"{YAML}: val", "c.png", "folder")),
    "names with a gap": (with_yaml(names={0: "cat", 2: "dog"}), (f"{YAML}: names", "[0, 2]", "0 to 1")),
    "names by text": (with_yaml(names={"cat": 0}), (f"{YAML}: names", "['cat']", "integers")),
    "name read as boolean": (
        rewrite(YAML, "train: a\nval: b\nnames: [yes, no]\n"),
        (f"{YAML}: names", "True", "quotes"),
    ),
    "name twice": (with_yaml(names=["cat", "cat"]), (f"{YAML}: names", "'cat'", "more than once")),
    "half a character": (with_yaml(names=["a\ud800"]), (f"{YAML}: names", "class 0", "\\ud800", "expected text")),
    "no name": (with_yaml(names=[]), (f"{YAML}: names", "missing")),
    "nc differs": (with_yaml(nc=3), (f"{YAML}: nc", "3", "2 entries")),
    "class out of range": (
        rewrite("labels/train/a.txt", "0 .5 .5 .2 .2\n2 .5 .5 .2 .2\n"),
        ("labels/train/a.txt:2", "class 2", "0 to 1"),
    ),
    "negative class": (rewrite("labels/train/a.txt", "-1 .5 .5 .2 .2\n"), ("a.txt:1", "class -1", "0 to 1")),
    "pixels instead of fractions": (
        rewrite("labels/train/a.txt", "0 15 10 4 4\n"),
        ("labels/train/a.txt:1", "x is 15", "0 to 1"),
    ),
    "four columns": (rewrite("labels/train/a.txt", "0 .5 .5 .2\n"), ("a.txt:1", "4 values", "class x y w h")),
    "label is words": (rewrite("labels/train/a.txt", "\ncat .5 .5 .2 .2\n"), ("a.txt:2", "'cat'", "class x y w h")),
    "label is binary": (rewrite("labels/train/a.txt", b"0 .5 .5 .2 .2\n\xff"), ("a.txt:2", "not text")),
    "no labels at all": (without("labels/val"), (f"{YAML}: val", "none of the 1 images", "labels/val/c.txt")),
    "image cut off": (truncate("images/train/b.png"), ("images/train/b.png", "cannot decode", "png")),
    "image is empty": (rewrite("images/train/b.png", b""), ("images/train/b.png", "cannot decode")),
    "listed image is missing": (
        lambda folder: (
            rewrite("train.txt", "images/train/a.png\nimages/train/z.png\n")(folder),
            with_yaml(train="train.txt")(folder),
        )[0],
        ("train.txt:2", "images/train/z.png", "does not exist"),
    ),
    "listed file is no image": (
        lambda folder: (
            rewrite("train.txt", "images/train/a.gif\n")(folder),
            with_yaml(train="train.txt")(folder),
        )[0],
        ("train.txt:1", "a.gif", "png"),
    ),
}


def load_all(source: Path) -> None:
    config = load_dataset_config(source)
    scan_split(config, "train")
    scan_split(config, "val")


@pytest.mark.parametrize("case", BROKEN)
def test_scan_split_broken_set_one_line_with_place_value_and_remedy(case: str, pets: Path) -> None:
    breaks, expected = BROKEN[case]
    breaks(pets)
    with pytest.raises(DatasetError) as caught:
        load_all(pets / YAML)
    message = str(caught.value)
    assert "\n" not in message
    assert str(pets) in message
    for part in expected:
        assert part in message


def test_scan_split_several_bad_files_first_named_others_counted(pets: Path) -> None:
    for name in ("a", "b"):
        (pets / "labels" / "train" / f"{name}.txt").write_text("7 .5 .5 .2 .2\n")
    with pytest.raises(DatasetError, match=r"a\.txt:1: class 7 .* \(and 1 more bad files in train\)$"):
        scan_split(load_dataset_config(pets / YAML), "train")


# ------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_moved_set_same(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = fingerprint(load_dataset_config(pets / YAML))
    moved = tmp_path_factory.mktemp("other") / "moved"
    shutil.copytree(pets, moved)
    assert fingerprint(load_dataset_config(write_yaml(moved, path=str(moved), names={0: "cat", 1: "dog"}))) == before
    assert len(before) == 16


@pytest.mark.parametrize(
    "change",
    [
        with_yaml(names=["cat", "cow"]),
        rewrite("labels/train/a.txt", "0 0.5 0.5 0.2 0.3\n"),
        without("labels/val/c.txt"),
        without("images/train/b.png"),
        lambda folder: write_image(folder / "images" / "val" / "c.png", 40, 40),
        with_yaml(train="images/val", val="images/train"),
    ],
)
def test_fingerprint_anything_changed_differs(change: Callable[[Path], None], pets: Path) -> None:
    before = fingerprint(load_dataset_config(pets / YAML))
    change(pets)
    assert fingerprint(load_dataset_config(pets / YAML)) != before


# ------------------------------------------------------------------------------------------- one class for all


def test_load_dataset_config_single_class_labels_become_class_0(pets: Path) -> None:
    plain, single = (load_dataset_config(pets / "pets.yaml", single_class=flag) for flag in (False, True))
    assert (single.names, single.num_classes) == (("item",), 1)
    before, after = (scan_split(config, "train").images[0].labels for config in (plain, single))
    assert before[:, 0].tolist() == [0, 1]
    assert after[:, 0].tolist() == [0, 0]
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert fingerprint(plain) != fingerprint(single)


def test_load_dataset_config_single_class_of_one_keeps_its_name_and_limits_stay(pets: Path) -> None:
    write_yaml(pets, names=["cat"])
    config = load_dataset_config(pets / "pets.yaml", single_class=True)
    assert config == load_dataset_config(pets / "pets.yaml")
    write_yaml(pets, names=["cat", "dog"])
    (pets / "labels" / "train" / "a.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DatasetError, match=r"a\.txt:1: class 2 is not among the 2 names"):
        scan_split(load_dataset_config(pets / "pets.yaml", single_class=True), "train")
