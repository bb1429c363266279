"""The contact sheet shows every class, and boxes where the objects are."""

from pathlib import Path

import cv2
import numpy as np

from yolocore.data.dataset import LabelledImage
from yolocore.data.sheet import choose_images, class_colour, contact_sheet


def item(folder: Path, name: str, rows: list[list[float]], size: tuple[int, int] = (100, 124)) -> LabelledImage:
    path = folder / name
    cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    return LabelledImage(path, np.array(rows, np.float32).reshape(-1, 5), size)


def test_choose_images_shows_rare_classes_and_a_background(tmp_path: Path) -> None:
    common = [[0, 0.5, 0.5, 0.1, 0.1]]
    images = [item(tmp_path, f"{index:02d}.png", common) for index in range(40)]
    images[7] = item(tmp_path, "07.png", [[3, 0.5, 0.5, 0.1, 0.1]])
    images[23] = item(tmp_path, "23.png", [])
    chosen = choose_images(images, 3)
    assert [one.image.name for one in chosen if one.image.name in ("07.png", "23.png")] == ["07.png", "23.png"]
    assert len(chosen) == 3
    assert len(choose_images(images, 100)) == 40
    assert choose_images(images, 3) == chosen


def test_contact_sheet_box_drawn_at_its_place_in_the_colour_of_its_class(tmp_path: Path) -> None:
    page = np.array(contact_sheet([item(tmp_path, "a.png", [[1, 0.5, 0.5, 0.5, 0.5]])], ["cat", "dog"], "pets"))
    cell = page[-516:-16, 8:628]  # 124x100 pixels, five times as large
    colour = class_colour(1)
    rows, columns = np.nonzero((cell == colour).all(axis=2))
    below_name = rows >= 125
    assert (columns.min(), columns.max(), rows[below_name].max()) == (155, 465, 375)
    assert (cell[125, 250:460] == colour).all()
    assert (cell[200:360, 165:455] == 0).all()


def test_contact_sheet_many_long_names_and_edge_boxes_fit(tmp_path: Path) -> None:
    names = [f"a rather long class name number {index}" for index in range(60)]
    rows = [[index, 0.99, 0.01, 0.5, 0.5] for index in range(60)]
    few = contact_sheet([item(tmp_path, "a.png", rows[:1])], names, "pets")
    many = contact_sheet([item(tmp_path, "a.png", rows)], names, "pets")
    assert many.width == few.width
    assert many.height > few.height


def test_contact_sheet_names_with_control_characters_drawn_on_one_line(tmp_path: Path) -> None:
    row = [[0, 0.5, 0.5, 0.5, 0.5]]
    plain = contact_sheet([item(tmp_path, "a.png", row)], ["cat"], "pets")
    odd = contact_sheet([item(tmp_path, "a\nb.png", row)], ["c\na\x1bt\u2028"], "pe\nts")
    assert odd.size == plain.size


def test_class_colour_first_twenty_classes_differ() -> None:
    colours = np.array([class_colour(index) for index in range(20)])
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(20)
    assert distance.min() > 30
