"""What `check_dataset` counts, and that it names every problem of a data set rather than the first."""

from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import pytest
import yaml

from yolocore.data.check import check_dataset
from yolocore.data.dataset import load_dataset_config
from yolocore.data.images import allowed_suffixes

BCCD = {"train": (205, [2381, 214, 209]), "val": (87, [967, 87, 83]), "test": (72, [805, 71, 69])}


def add(folder: Path, name: str, text: str | None, size: tuple[int, int] = (40, 80)) -> Path:
    """One image of its own content with its label file; returns the image."""
    image, label = folder / "images" / f"{name}.png", folder / "labels" / f"{name}.txt"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(
        str(image), np.random.default_rng(crc32(name.encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
    )
    if text is not None:
        label.write_text(text)
    return image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes; 60 boxes of the first and one of the second to train on."""
    many = "".join(f"0 0.5 0.5 {0.1 + i / 1000:.3f} 0.5\n" for i in range(30))
    add(tmp_path, "train/a", many)
    add(tmp_path, "train/b", many + "1 0.25 0.25 0.5 0.5\n")
    add(tmp_path, "train/c", None)
    add(tmp_path, "train/d", "")
    add(tmp_path, "val/e", "0 0.5 0.5 1 1\n", (100, 50))
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}))
    return path


def test_check_dataset_bccd_published_counts_and_nothing_wrong(fixtures_dir: Path) -> None:
    config = load_dataset_config(fixtures_dir / "data" / "bccd" / "bccd.yaml")
    report, images = check_dataset(config, 320, decode=False)
    assert {s.split: (s.images, [count.boxes for count in s.classes]) for s in report.splits} == BCCD
    assert (report.errors, report.warnings, report.usable) == ((), (), True)
    assert report.imbalance == pytest.approx(2381 / 209)
    train = report.splits[0]
    assert (train.native.small, train.native.medium, train.native.large) == (23, 855, 1926)
    np.testing.assert_allclose(np.array(train.native.size) / 2, train.scaled.size)
    assert sum(len(item.labels) for item in images["test"]) == 945


def test_check_dataset_counts_backgrounds_sizes_and_aspects(source: Path) -> None:
    report, images = check_dataset(load_dataset_config(source), 160)
    train, val = report.splits
    assert (train.images, train.without_labels, train.without_label_file, train.boxes) == (4, 2, 1, 61)
    assert [(count.name, count.boxes, count.images) for count in train.classes] == [("cat", 60, 2), ("dog", 1, 1)]
    assert train.image_sizes == ((80, 40), (80, 40))
    assert (val.native.size[1], val.scaled.size[1]) == (pytest.approx(5000**0.5), pytest.approx(1.6 * 5000**0.5))
    assert (val.native.medium, val.scaled.large) == (1, 1)
    assert (val.box_aspect[1], val.image_aspect[1]) == (0.5, 0.5)
    assert report.imbalance == 60
    assert len(images["train"]) == 4


def test_check_dataset_rare_and_absent_classes_are_warnings(source: Path) -> None:
    report, _ = check_dataset(load_dataset_config(source))
    assert report.usable
    assert report.warnings == (
        f"{source}: train: class dog has 1 box only",
        f"{source}: train: 60 boxes of the commonest class for each of the rarest",
        f"{source}: val: class dog has no box",
    )


def test_check_dataset_bad_files_every_line_is_named(source: Path) -> None:
    folder = source.parent
    add(
        folder,
        "train/x",
        "0 0.5 0.5 0.1\n\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n0 0.5 hello 0.1 0.1\n0 0.5 0.5 2 0.1\n",
    )
    broken = add(folder, "train/y", "0 0.5 0.5 0.1 0.1\n")
    broken.write_bytes(b"no image at all")
    report, images = check_dataset(load_dataset_config(source))
    label = folder / "labels" / "train" / "x.txt"
    assert not report.usable
    assert report.errors == (
        f"{label}:1: 4 values; expected 5 (class x y w h)",
        f"{label}:3: class 7 is not among the 2 names; allowed are 0 to 1",
        f"{label}:5: 'hello' is not a number; expected class x y w h",
        f"{label}:6: w is 2; allowed is 0 to 1 (fraction of the image)",
        f"{broken}: cannot decode the image; allowed are intact {allowed_suffixes()} files",
    )
    assert len(images["train"]) == 4


def test_check_dataset_list_file_every_bad_entry_is_named(source: Path) -> None:
    listing = source.parent / "val.txt"
    listing.write_text("images/val/e.png\ngone.png\n\nnotes.md\n")
    source.write_text(source.read_text().replace("images/val", "val.txt"))
    report, images = check_dataset(load_dataset_config(source), splits=["val"])
    assert [line.partition(" ")[0] for line in report.errors] == [f"{listing}:2:", f"{listing}:4:"]
    assert [item.image.name for item in images["val"]] == ["e.png"]


def test_check_dataset_odd_lines_are_warnings_with_their_line(source: Path) -> None:
    add(source.parent, "val/e", "0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0 0.2\n0 0.95 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n")
    report, _ = check_dataset(load_dataset_config(source), splits=["val"])
    label = source.parent / "labels" / "val" / "e.txt"
    assert report.warnings[:3] == (
        f"{label}:2: the box has no area; it is never learned",
        f"{label}:3: the box reaches 5.0% of the side beyond the image",
        f"{label}:4: the same as line 1; duplicates are left out",
    )
    assert report.usable


def test_check_dataset_copied_and_orphaned_files_are_warnings(source: Path) -> None:
    folder = source.parent
    original = folder / "images" / "train" / "a.png"
    for copy in ("train/z", "val/z"):
        (folder / "images" / f"{copy}.png").write_bytes(original.read_bytes())
    (folder / "labels" / "train" / "lost.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    report, _ = check_dataset(load_dataset_config(source))
    assert f"{folder / 'images/train/z.png'}: the same image as {original}" in report.warnings
    assert f"{folder / 'labels/train/lost.txt'}: no image belongs to this label file" in report.warnings
    leak = f"{folder / 'images/val/z.png'}: in val, and the same image is in train as {original}"
    assert leak in report.warnings


def test_check_dataset_truncated_jpeg_is_a_warning_found_by_decoding(source: Path) -> None:
    image = source.parent / "images" / "val" / "f.jpg"
    cv2.imwrite(str(image), cv2.imread(str(image.with_name("e.png"))))
    image.write_bytes(image.read_bytes()[:-3000])
    quick, _ = check_dataset(load_dataset_config(source), splits=["val"], decode=False)
    full, _ = check_dataset(load_dataset_config(source), splits=["val"])
    assert (quick.errors, full.errors, full.usable) == ((), (), True)
    warning = f"{image}: the JPEG has no end marker; pixels that are missing are made up"
    assert (warning in quick.warnings, warning in full.warnings) == (False, True)


def test_check_dataset_jpeg_cut_off_in_its_header_is_an_error_found_by_decoding(source: Path) -> None:
    image = source.parent / "images" / "val" / "f.jpg"
    cv2.imwrite(str(image), cv2.imread(str(image.with_name("e.png"))))
    content = image.read_bytes()
    image.write_bytes(content[: content.index(b"\xff\xda")])  # the size is there, and no pixel
    quick, _ = check_dataset(load_dataset_config(source), splits=["val"], decode=False)
    full, _ = check_dataset(load_dataset_config(source), splits=["val"])
    assert (quick.errors, full.errors) == (
        (),
        (f"{image}: cannot decode the image; allowed are intact {allowed_suffixes()} files",),
    )


def test_check_dataset_name_with_a_line_break_warnings_of_one_line(source: Path) -> None:
    source.write_text(source.read_text().replace("dog", '"d\\nog"'))
    report, _ = check_dataset(load_dataset_config(source))
    assert f"{source}: val: class d\\nog has no box" in report.warnings


def test_check_dataset_no_label_at_all_is_an_error(source: Path) -> None:
    (source.parent / "labels" / "val" / "e.txt").unlink()
    report, _ = check_dataset(load_dataset_config(source), splits=["val"])
    assert report.errors[0].startswith(f"{source}: val: no image has a label; expected label files such as ")


def test_check_dataset_pixel_boxes_vanish_at_a_small_size(source: Path) -> None:
    add(source.parent, "val/e", "0 0.5 0.5 0.02 0.5\n0 0.5 0.5 0.5 0.5\n", (100, 100))
    at_100, _ = check_dataset(load_dataset_config(source), 100, ["val"])
    at_320, _ = check_dataset(load_dataset_config(source), 320, ["val"])
    assert [r.splits[0].scaled.vanishing for r in (at_100, at_320)] == [1, 0]
    assert "val: 1 of 2 boxes have a side of at most 2 pixels at 100 pixels" in at_100.warnings[-1]
