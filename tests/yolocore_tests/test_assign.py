import numpy as np
import pytest
import torch
from loss_goldens import CASES, load_case, padded
from torch import Tensor

from yolocore.assign import LevelAssignment, assign_targets
from yolocore.loss import matched_iou, objectness_targets

ONE_ANCHOR = torch.tensor([[[2.0, 2.0]]])


def level_of(
    rows: list[list[float]], grid: tuple[int, int] = (8, 8), batch: int = 1, limit: float = 4.0
) -> LevelAssignment:
    targets = torch.tensor(rows).reshape(-1, 6)
    return assign_targets(targets, [grid], ONE_ANCHOR, batch, limit).levels[0]


def cells_of(level: LevelAssignment) -> list[list[int]]:
    """(row, column) of the valid rows."""
    return torch.stack((level.row, level.column), dim=1)[level.valid].tolist()


@pytest.mark.parametrize("name", CASES)
def test_assign_targets_golden_case_is_exact_in_order(name: str) -> None:
    case = load_case(name)
    for i, level in enumerate(case.assignment().levels):
        index = torch.stack((level.image, level.anchor, level.row, level.column), dim=1)
        expected = {key: case.arrays[f"assign_{i}_{key}"] for key in ("img_anchor_gj_gi", "cls", "box", "anchor")}
        np.testing.assert_array_equal(index[level.valid].numpy(), expected["img_anchor_gj_gi"])
        np.testing.assert_array_equal(level.cls[level.valid].numpy(), expected["cls"])
        np.testing.assert_array_equal(level.box[level.valid].numpy(), expected["box"])
        np.testing.assert_array_equal(level.anchor_size[level.valid].numpy(), expected["anchor"])
        assert int(level.count) == case.info["n_assigned"][i]


@pytest.mark.parametrize("name", CASES)
def test_objectness_targets_golden_case_last_row_wins(name: str) -> None:
    case = load_case(name)
    assignment, predictions = case.assignment(), case.predictions
    for i, (p, m) in enumerate(zip(predictions, assignment.levels, strict=True)):
        offsets = p[:, m.image, m.anchor, m.row, m.column, :4]
        iou = matched_iou(torch.where(m.valid[:, None], offsets, 0.0), m.anchor_size, m.box)
        expected = torch.from_numpy(case.arrays[f"tobj_{i}"])
        actual = objectness_targets(iou, m.winner).view(expected.shape)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_level_assignment_matched_drops_rows_and_renumbers_the_winners() -> None:
    for level in load_case("crowded_duplicates").assignment(96).levels:
        short = level.matched()
        for key in ("image", "anchor", "row", "column", "cell", "box", "cls", "anchor_size"):
            assert torch.equal(getattr(short, key), getattr(level, key)[level.valid])
        assert len(short.valid) == int(level.count)
        claimed = level.winner >= 0
        assert torch.equal(short.winner >= 0, claimed)
        assert torch.equal(short.cell[short.winner[claimed]], claimed.nonzero().squeeze(1))
        assert torch.equal(short.wins(), level.wins()[level.valid])


def test_level_assignment_wins_is_true_once_for_every_claimed_cell() -> None:
    levels = load_case("crowded_duplicates").assignment(96).levels
    for level in levels:
        wins = level.wins().nonzero().squeeze(1)
        assert wins.tolist() == sorted(level.winner[level.winner >= 0].tolist())
    assert sum(int(level.wins().sum()) for level in levels) < sum(int(level.count) for level in levels)


def test_assign_targets_more_padding_changes_no_valid_row() -> None:
    case = load_case("crowded_duplicates")
    for few, many in zip(case.assignment(32).levels, case.assignment(160).levels, strict=True):
        for key in ("image", "anchor", "row", "column", "cell", "box", "cls", "anchor_size"):
            assert torch.equal(getattr(few, key)[few.valid], getattr(many, key)[many.valid])
        assert len(few.valid) == 5 * 3 * 64
        assert len(many.valid) == 5 * 3 * 160
        assert torch.equal(few.winner >= 0, many.winner >= 0)


def test_assign_targets_interior_object_claims_own_left_and_upper_cell() -> None:
    level = level_of([[0, 1, 3.25 / 8, 5.25 / 8, 0.25, 0.25]])
    assert cells_of(level) == [[5, 3], [5, 2], [4, 3]]
    assert level.box[level.valid].tolist() == [[0.25, 0.25, 2, 2], [1.25, 0.25, 2, 2], [0.25, 1.25, 2, 2]]
    assert level.cls[level.valid].tolist() == [1, 1, 1]


def test_assign_targets_object_in_corner_cell_claims_no_cell_outside() -> None:
    assert cells_of(level_of([[0, 0, 0.25 / 8, 0.25 / 8, 0.25, 0.25]])) == [[0, 0]]
    assert cells_of(level_of([[0, 0, 7.75 / 8, 7.75 / 8, 0.25, 0.25]])) == [[7, 7]]


def test_assign_targets_object_on_grid_line_claims_its_own_cell_twice() -> None:
    assert cells_of(level_of([[0, 0, 3 / 8, 3.5 / 8, 0.25, 0.25]])) == [[3, 3], [3, 2], [3, 3]]


def test_assign_targets_object_at_right_edge_is_clamped_with_offset_one() -> None:
    level = level_of([[0, 0, 1.0, 0.5, 0.25, 0.25]], grid=(4, 4))
    assert cells_of(level)[0] == [2, 3]
    assert level.box[0].tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("width", "height", "matches"),
    [(7.9, 2.0, True), (8.0, 2.0, False), (0.51, 2.0, True), (0.5, 2.0, False), (0.0, 2.0, False), (2.0, 0.0, False)],
)
def test_assign_targets_ratio_limit_is_strict(width: float, height: float, matches: bool) -> None:
    level = level_of([[0, 0, 0.55, 0.55, width / 8, height / 8]])
    assert bool(level.valid.any()) is matches


def test_assign_targets_rows_outside_the_batch_never_match() -> None:
    level = level_of([[-1, 0, 0.5, 0.5, 0.25, 0.25], [1, 0, 0.5, 0.5, 0.25, 0.25]])
    assert not level.valid.any()
    assert int(level.count) == 0
    assert (level.cell == 64).all()
    assert (level.winner == -1).all()
    assert torch.isfinite(level.box).all()


def test_assign_targets_no_rows_at_all_gives_empty_assignment() -> None:
    level = level_of([])
    assert level.valid.shape == (0,)
    assert (level.winner == -1).all()


def brute_force_winner(level: LevelAssignment) -> list[int]:
    winner = [-1] * len(level.winner)
    for row, (cell, valid) in enumerate(zip(level.cell.tolist(), level.valid.tolist(), strict=True)):
        if valid:
            winner[cell] = row
    return winner


def random_targets(seed: int, count: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 6, generator=generator)
    targets[:, 0] = torch.randint(0, batch, (count,), generator=generator)
    targets[:, 1] = torch.randint(0, 3, (count,), generator=generator)
    targets[:, 4:] = targets[:, 4:] * 0.4 + 0.02
    return targets


@pytest.mark.parametrize("seed", range(5))
def test_assign_targets_random_crowd_winner_is_the_last_claim(seed: int) -> None:
    anchors = torch.tensor([[[1.0, 1.0], [2.0, 3.0], [4.0, 3.0]], [[1.0, 2.0], [2.0, 2.0], [3.0, 3.0]]])
    assignment = assign_targets(padded(random_targets(seed, 90, 2), 32), [(5, 7), (3, 4)], anchors, 2, 4.0)
    for level, (rows, columns) in zip(assignment.levels, [(5, 7), (3, 4)], strict=True):
        assert level.winner.tolist() == brute_force_winner(level)
        flat = ((level.image * 3 + level.anchor) * rows + level.row) * columns + level.column
        assert torch.equal(level.cell, torch.where(level.valid, flat, 2 * 3 * rows * columns))


def test_assign_targets_float64_targets_keep_their_precision() -> None:
    targets = random_targets(9, 32, 2).double()
    level = assign_targets(targets, [(8, 8)], ONE_ANCHOR, 2, 4.0).levels[0]
    assert level.box.dtype == torch.float64
    x = targets[:, 2] * 8
    torch.testing.assert_close(level.box[:32, 0][level.valid[:32]], (x - x.floor())[level.valid[:32]], atol=0, rtol=0)
