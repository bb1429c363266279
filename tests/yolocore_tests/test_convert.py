"""COCO and Pascal VOC to YOLO folders: the same boxes come out, and what is malformed or malicious is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2
import numpy as np
import pytest

from yolocore.data.coco import find_coco_files, joined_outline, read_coco
from yolocore.data.convert import select_classes, split_at_random, write_yolo
from yolocore.data.dataset import SplitName, load_dataset_config, scan_split
from yolocore.data.voc import read_voc
from yolocore.errors import DatasetError

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
BOX = [10.0, 5.0, 20.0, 10.0]


def write_image(path: Path, size: tuple[int, int] = (40, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return path


def voc_text(name: str, size: tuple[int, int], objects: list[tuple[str, list[float]]], extra: str = "") -> str:
    """An annotation as this test's own writer makes it."""
    boxes = "".join(
        f"<object><name>{escape(label)}</name>{extra}<bndbox><xmin>{x1!r}</xmin><ymin>{y1!r}</ymin>"
        f"<xmax>{x2!r}</xmax><ymax>{y2!r}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in objects
    )
    height, width = size
    head = f"<filename>{escape(name)}</filename><size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{head}{boxes}</annotation>"


# ------------------------------------------------------------------------------------------- round trips


def bccd_as_coco(config: Any, folder: Path) -> Any:
    """Category ids with gaps, so that indices and ids differ."""
    files: dict[SplitName, Path] = {}
    for split in SPLITS:
        images, annotations = [], []
        for number, item in enumerate(scan_split(config, split).images):
            height, width = item.size
            images.append({"id": 10 * number + 3, "file_name": item.image.name, "height": height, "width": width})
            for label, x, y, w, h in item.labels.astype(np.float64).tolist():
                bbox = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                annotations.append({"image_id": 10 * number + 3, "category_id": 7 * int(label) + 1, "bbox": bbox})
        categories = [{"id": 7 * index + 1, "name": name} for index, name in enumerate(config.names)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        files[split] = folder / f"{split}.json"
        files[split].write_text(json.dumps(document))
    return read_coco(files, folder, [config.root / "images" / split for split in SPLITS])


def bccd_as_voc(config: Any, folder: Path) -> Any:
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for split in SPLITS:
        items = scan_split(config, split).images
        (lists / f"{split}.txt").write_text("".join(f"{item.image.stem}\n" for item in items))
        for item in items:
            height, width = item.size
            objects = [
                (
                    config.names[int(c)],
                    [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height],
                )
                for c, x, y, w, h in item.labels.astype(np.float64).tolist()
            ]
            text = voc_text(item.image.name, item.size, objects)
            (folder / "Annotations" / f"{item.image.stem}.xml").write_text(text)
    return read_voc(folder, [config.root / "images" / split for split in SPLITS])


@pytest.mark.parametrize("through", [bccd_as_coco, bccd_as_voc])
def test_write_yolo_bccd_through_another_format_identical_boxes(
    through: Callable[..., Any], fixtures_dir: Path, tmp_path: Path
) -> None:
    original = load_dataset_config(fixtures_dir / "data" / "bccd" / "bccd.yaml")
    (tmp_path / "other").mkdir()
    report = write_yolo(
        select_classes(through(original, tmp_path / "other"), original.names), tmp_path / "out", "x", link=True
    )
    again = load_dataset_config(report.yaml)
    assert again.names == original.names
    for split in SPLITS:
        pairs = zip(scan_split(original, split).images, scan_split(again, split).images, strict=True)
        for before, after in pairs:
            assert (before.image.name, before.size) == (after.image.name, after.size)
            np.testing.assert_allclose(after.labels, before.labels, rtol=0, atol=1e-6)
    assert report.boxes["train"] == (2381, 214, 209)
    assert (report.images, dict(report.skipped)) == ({"train": 205, "val": 87, "test": 72}, {})


# ------------------------------------------------------------------------------------------- COCO


def entry(**changes: Any) -> dict[str, Any]:
    """A sound annotation, but for the changes; a value None leaves the key out."""
    whole = {"image_id": 5, "category_id": 3, "bbox": BOX, **changes}
    return {key: value for key, value in whole.items() if value is not None}


def coco(folder: Path, **changes: Any) -> Path:
    """A small COCO folder: two images of 80x40 pixels, sparse categories, one box."""
    for name in ("a.png", "b.png"):
        write_image(folder / "images" / name)
    document: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 80}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "cat"}],
        "annotations": [{"image_id": 5, "category_id": 90, "bbox": BOX}],
        **changes,
    }
    file = folder / "train.json"
    file.write_text(json.dumps(document))
    return file


def test_read_coco_sparse_ids_numbered_in_their_order(tmp_path: Path) -> None:
    source = read_coco({"train": coco(tmp_path)}, tmp_path)
    assert source.names == ("cat", "zebra")
    (found,) = source.splits["train"][0].objects
    assert (found.name, found.box) == ("zebra", (10, 5, 30, 15))
    assert source.splits["train"][1].size == (40, 80)


def test_write_yolo_coco_labels_polygons_and_what_is_left_out(tmp_path: Path) -> None:
    annotations = [
        {
            "image_id": 5,
            "category_id": 3,
            "bbox": BOX,
            "segmentation": [[8, 4, 16, 4, 16, 12], [40, 20, 48, 20, 48, 28]],
        },
        {"image_id": 5, "category_id": 90, "bbox": BOX, "segmentation": {"counts": [1], "size": [40, 80]}},
        {"image_id": 5, "category_id": 3, "bbox": BOX, "iscrowd": 1, "segmentation": {"counts": [1]}},
        {"image_id": 5, "category_id": 3, "bbox": [90, 5, 10, 10]},
        {"image_id": 9, "category_id": 3, "bbox": [60, 20, 40, 40]},
    ]
    source = read_coco({"train": coco(tmp_path, annotations=annotations)}, tmp_path)
    report = write_yolo(source, tmp_path / "out", "x")
    labels = tmp_path / "out" / "labels" / "train"
    ring, box = (line.split() for line in (labels / "a.txt").read_text().splitlines())
    assert ring[0] == "0"
    points = np.array(ring[1:], float).reshape(-1, 2) * (80, 40)
    assert {tuple(point) for point in points.tolist()} == {(8, 4), (16, 4), (16, 12), (40, 20), (48, 20), (48, 28)}
    assert box == ["1", "0.125", "0.125", "0.375", "0.125", "0.375", "0.375", "0.125", "0.375"]
    assert (labels / "b.txt").read_text() == "0 0.875 0.75 0.25 0.5\n"  # clipped to the image
    assert dict(report.skipped) == {"crowd regions": 1, "boxes without area inside the image": 1}
    assert (report.boxes, report.polygons) == ({"train": (2, 1)}, 2)


def test_read_coco_no_polygons_boxes_only(tmp_path: Path) -> None:
    annotations = [{"image_id": 5, "category_id": 3, "bbox": BOX, "segmentation": [[8, 4, 16, 4, 16, 12]]}]
    source = read_coco({"train": coco(tmp_path, annotations=annotations)}, tmp_path, polygons=False)
    assert source.splits["train"][0].objects[0].polygon is None


def test_joined_outline_same_area_as_its_parts() -> None:
    parts = [np.array([[x, y], [x + 10, y], [x + 10, y + 6], [x, y + 6]], float) for x, y in ((0, 0), (20, 3), (5, 30))]
    ring = joined_outline(parts)
    x, y = ring.T
    assert abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 == pytest.approx(3 * 60)
    assert {tuple(p) for p in ring.tolist()} == {tuple(p) for part in parts for p in part.tolist()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            (
                "annotations/instances_train2017.json",
                "annotations/instances_val2017.json",
                "annotations/captions_train2017.json",
            ),
            {"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"},
        ),
        (
            ("train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"),
            {
                split: f"{folder}/_annotations.coco.json"
                for split, folder in zip(SPLITS, ("train", "valid", "test"), strict=True)
            },
        ),
    ],
)
def test_find_coco_files_usual_layouts(names: tuple[str, ...], expected: dict[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find_coco_files(tmp_path) == {split: tmp_path / name for split, name in expected.items()}


@pytest.mark.parametrize("names", [("a.json",), ("train_a.json", "train_b.json")])
def test_find_coco_files_unclear_layout_one_line(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DatasetError, match=r"--train"):
        find_coco_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": {}}, r"annotations: missing or no list"),
        ({"annotations": [entry(image_id=6)]}, r"annotations\[0\]\.image_id: no image has the id 6"),
        ({"annotations": [entry(category_id=4)]}, r"annotations\[0\]\.category_id: no category"),
        ({"annotations": [entry(bbox=BOX[:3])]}, r"annotations\[0\]\.bbox: 3 numbers; expected 4"),
        ({"annotations": [entry(bbox=[0, 0, 1, float("nan")])]}, r"annotations\[0\]\.bbox: got"),
        ({"annotations": [entry(bbox=[0, 0, 1, "2"])]}, r"annotations\[0\]\.bbox: got"),
        ({"annotations": [entry(bbox=[0, 0, 1, 10**400])]}, r"annotations\[0\]\.bbox: got .* -1e\+09 to 1e\+09$"),
        ({"annotations": [entry(segmentation=[[1e200] * 6])]}, r"annotations\[0\]\.segmentation\[0\]: got"),
        ({"annotations": [entry(bbox=None)]}, r"annotations\[0\]\.bbox: missing"),
        ({"annotations": [7]}, r"annotations\[0\]\.image_id: missing"),
        ({"images": [{"id": "5", "file_name": "a.png"}]}, r"images\[0\]\.id: got '5'; allowed: a whole number"),
        ({"images": [{"id": 5, "file_name": "gone.png"}]}, r"images\[0\]\.file_name: image 'gone\.png' does not exist"),
        ({"images": [{"id": 5, "file_name": "a.txt"}]}, r"images\[0\]\.file_name: 'a\.txt' is no image"),
        ({"images": [{"id": 5, "file_name": "a.png", "height": 80, "width": 40}]}, r"for 40x80 pixels, .*g has 80x40"),
        ({"images": [{"id": 5, "file_name": "a.png"}] * 2}, r"images\[1\]\.id: 5 appears twice"),
        ({"categories": [{"id": 3, "name": "\ud800"}]}, r"categories\[0\]\.name: got '\\ud800'; allowed: text"),
        ({"images": [{"id": 5, "file_name": "a.png", "height": 40.5, "width": 80}]}, r"height: got 40\.5; allowed"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]}, r"categories\[1\]: id 4 or name 'a'"),
    ],
)  # fmt: skip
def test_read_coco_malformed_one_line_with_file_and_entry(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = coco(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        read_coco({"train": file}, tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n]", ":2: not valid JSON"), ("[]", "expected a mapping"), ("[" * 10**5, "not usable JSON")],
)
def test_read_coco_no_coco_file_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_coco({"train": tmp_path / "train.json"}, tmp_path)


def test_read_coco_size_written_as_floats_accepted(tmp_path: Path) -> None:
    images = [{"id": 5, "file_name": "a.png", "height": 40.0, "width": 80.0}]
    source = read_coco({"train": coco(tmp_path, images=images)}, tmp_path)
    assert source.splits["train"][0].size == (40, 80)


def test_read_coco_missing_images_skipped_on_request(tmp_path: Path) -> None:
    file = coco(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    source = read_coco({"train": file}, tmp_path, skip_missing=True)
    assert ([image.name for image in source.splits["train"]], dict(source.skipped)) == (
        ["a.png"],
        {"images that do not exist": 1},
    )


def test_read_coco_splits_that_number_classes_differently_refused(tmp_path: Path) -> None:
    first = coco(tmp_path)
    second = tmp_path / "val.json"
    second.write_text(first.read_text().replace('"id": 3', '"id": 4'))
    with pytest.raises(DatasetError, match=r"val\.json: category 4 is 'cat', another split numbers it differently"):
        read_coco({"train": first, "val": second}, tmp_path)


# ------------------------------------------------------------------------------------------- Pascal VOC


def voc(folder: Path, **texts: str) -> Path:
    for name in texts:
        write_image(folder / "JPEGImages" / f"{name}.png")
    (folder / "Annotations").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    return folder


CAT = [("cat", [10.0, 5.0, 30.0, 15.0])]


def test_read_voc_one_based_corners_are_pixels(tmp_path: Path) -> None:
    folder = voc(tmp_path, a=voc_text("a.png", (40, 80), CAT))
    edges, pixels = (read_voc(folder, one_based=flag).splits["train"][0].objects[0].box for flag in (False, True))
    assert (edges, pixels) == ((10, 5, 30, 15), (9, 4, 30, 15))


def test_read_voc_difficult_objects_left_out_unless_kept(tmp_path: Path) -> None:
    folder = voc(tmp_path, a=voc_text("a.png", (40, 80), CAT, "<difficult>1</difficult>"))
    without, kept = (read_voc(folder, keep_difficult=flag) for flag in (False, True))
    assert (without.splits["train"][0].objects, dict(without.skipped)) == ((), {"difficult objects": 1})
    assert (len(kept.splits["train"][0].objects), kept.names) == (1, ("cat",))


def test_read_voc_image_found_by_the_name_of_its_xml_and_size_0_ignored(tmp_path: Path) -> None:
    folder = voc(tmp_path, a=voc_text("", (0, 0), CAT), b=voc_text("b", (40, 80), CAT))
    images = read_voc(folder).splits["train"]
    assert [(image.name, image.size) for image in images] == [("a.png", (40, 80)), ("b.png", (40, 80))]


def test_split_at_random_same_seed_same_split(tmp_path: Path) -> None:
    folder = voc(tmp_path, **{f"i{n}": voc_text(f"i{n}.png", (40, 80), CAT) for n in range(10)})
    source = read_voc(folder)
    first, again, other = (split_at_random(source, 0.3, seed).splits for seed in (1, 1, 2))
    names = [[image.name for image in split["val"]] for split in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert (len(first["train"]), len(first["val"])) == (7, 3)
    assert {image.name for split in first.values() for image in split} == {f"i{n}.png" for n in range(10)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>\n<object>", r"a\.xml:2: not valid XML"),
        ("<html/>", r"a\.xml: root element 'html'; expected 'annotation'"),
        (voc_text("a.png", (40, 80), [("", [1, 2, 3, 4])]), r"object\[0\]: name: missing"),
        (voc_text("a.png", (40, 80), CAT).replace("30.0", "x"), r"object\[0\]: bndbox/xmax: got 'x'"),
        (voc_text("a.png", (40, 80), CAT).replace("<xmin>10.0</xmin>", ""), r"object\[0\]: bndbox/xmin: got None"),
        (voc_text("a.png", (40, 80), [("cat", [30, 5, 10, 15])]), r"object\[0\]: bndbox: 30 5 10 15; allowed"),
        (voc_text("a.png", (80, 40), CAT), r"the annotations are for 40x80 pixels"),
        (voc_text("gone.png", (40, 80), CAT), r"image 'gone\.png' does not exist"),
    ],
)
def test_read_voc_malformed_one_line_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    folder = voc(tmp_path, a=text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_voc(folder)
    assert str(caught.value).startswith(str(folder / "Annotations" / "a.xml"))
    assert "\n" not in str(caught.value)


def test_read_voc_list_that_is_no_text_one_line(tmp_path: Path) -> None:
    folder = voc(tmp_path, a=voc_text("a.png", (40, 80), CAT))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(DatasetError, match=r"Main/train\.txt: not UTF-8 text \(byte 2\)"):
        read_voc(folder)


# ------------------------------------------------------------------------------------------- malice

BOMB = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "ha"}">' for n in range(10))


@pytest.mark.parametrize(
    "head",
    [
        f"<!DOCTYPE annotation [{BOMB}]>",
        '<!DOCTYPE annotation [<!ENTITY e9 SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd">',
    ],
)
def test_read_voc_entities_refused(head: str, tmp_path: Path) -> None:
    text = voc_text("a.png", (40, 80), CAT).replace("cat", "&e9;" if "e9" in head else "cat")
    with pytest.raises(DatasetError, match=r"a\.xml: refused, it declares a document type or entities"):
        read_voc(voc(tmp_path, a=head + text))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/tmp/secret.png", "x/../../secret.png", "..\\secret.png", "C:\\a.png"]
)
def test_readers_names_that_lead_elsewhere_refused(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    folder = tmp_path / "data"
    with pytest.raises(DatasetError, match=r"a\.xml: filename: .* leads out of the image folder"):
        read_voc(voc(folder, a=voc_text(name, (40, 80), CAT)))
    with pytest.raises(DatasetError, match=r"images\[0\]\.file_name: .* leads out of the image folder"):
        read_coco({"train": coco(folder, images=[{"id": 5, "file_name": name}])}, folder)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"\n{name}\n")
    with pytest.raises(DatasetError, match=r"train\.txt:2: .* leads out of the image folder"):
        read_voc(folder)


# ------------------------------------------------------------------------------------------- writing


def test_write_yolo_existing_folder_kept(tmp_path: Path) -> None:
    source = read_coco({"train": coco(tmp_path / "in")}, tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite, message in ((False, "exists; allowed"), (True, "is no earlier conversion")):
        with pytest.raises(DatasetError, match=message):
            write_yolo(source, out, "x", overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and "in/" not in str(path)] == ["precious.txt"]


def test_write_yolo_overwrite_replaces_an_earlier_conversion_whole(tmp_path: Path) -> None:
    source = read_coco({"train": coco(tmp_path / "in")}, tmp_path / "in")
    report = write_yolo(source, tmp_path / "out", "x")
    (tmp_path / "out" / "labels" / "train" / "old.txt").write_text("")
    write_yolo(source, tmp_path / "out", "x", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out" / "labels" / "train").iterdir()) == ["a.txt", "b.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    config = report.yaml.read_text()
    assert config.startswith('# Converted by yolosearch from "x"\n')


def test_write_yolo_never_replaces_what_it_converts(tmp_path: Path) -> None:
    write_yolo(read_coco({"train": coco(tmp_path / "in")}, tmp_path / "in"), tmp_path / "out", "x")
    images = [tmp_path / "out" / "images" / "train"]
    source = read_coco({"train": tmp_path / "in" / "train.json"}, tmp_path, images)
    with pytest.raises(DatasetError, match=r"which is to be converted"):
        write_yolo(source, tmp_path / "out", "x", overwrite=True)


def test_write_yolo_images_that_would_share_a_label_file(tmp_path: Path) -> None:
    for name in ("a.jpg", "x/b.png", "y/b.png"):
        write_image(tmp_path / "images" / name)
    images = [{"id": 1, "file_name": "x/b.png"}, {"id": 2, "file_name": "y/b.png"}]
    file = coco(tmp_path, images=images, annotations=[{"image_id": 2, "category_id": 3, "bbox": BOX}])
    write_yolo(read_coco({"train": file}, tmp_path), tmp_path / "out", "x")
    labels = tmp_path / "out" / "labels" / "train"
    assert {path.name: path.read_text()[:1] for path in labels.iterdir()} == {"x_b.txt": "", "y_b.txt": "0"}
    clash = coco(tmp_path, images=[{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.jpg"}], annotations=[])
    with pytest.raises(DatasetError, match=r"images\[1\]: image 'a\.jpg' would share its label file with 'a\.png'"):
        write_yolo(read_coco({"train": clash}, tmp_path), tmp_path / "clash", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "train.json"]


def test_write_yolo_link_and_copy(tmp_path: Path) -> None:
    source = read_coco({"train": coco(tmp_path / "in")}, tmp_path / "in")
    write_yolo(source, tmp_path / "copied", "x")
    write_yolo(source, tmp_path / "linked", "x", link=True)
    copied, linked = (tmp_path / name / "images" / "train" / "a.png" for name in ("copied", "linked"))
    assert (copied.is_symlink(), linked.readlink()) == (False, tmp_path / "in" / "images" / "a.png")


def test_select_classes_order_and_others_left_out(tmp_path: Path) -> None:
    source = read_coco({"train": coco(tmp_path)}, tmp_path)
    chosen = select_classes(source, ["cat"])
    assert (chosen.names, chosen.splits["train"][0].objects) == (("cat",), ())
    assert dict(chosen.skipped) == {"objects of classes that are not listed": 1}
    with pytest.raises(DatasetError, match=r"classes: 'dog' is not in the data; allowed: cat, zebra"):
        select_classes(source, ["dog"])
