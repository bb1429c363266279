"""Ground truth to anchors: which cells must predict which object. Static shapes, nothing waits for the device.

An assignment depends on the labels and the anchors alone, so one serves every slot of a pack. Rows that do not match
stay in place with `valid` False, because dropping them would need their number on the host.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LevelAssignment:
    """The candidate rows of one level: 5 offsets x A anchors x T targets, N = 5*A*T, in this order of nesting.

    The first offset is the object's own cell, then its left, upper, right and lower neighbour. What a row holds where
    `valid` is False is finite and in range, and means nothing.
    """

    image: Tensor
    """[N] int64, index in the batch."""
    anchor: Tensor
    """[N] int64, index of the anchor on this level."""
    row: Tensor
    """[N] int64, y of the cell."""
    column: Tensor
    """[N] int64, x of the cell."""
    cell: Tensor
    """[N] int64, flat index into B*A*H*W; the dump cell B*A*H*W where the row is not valid."""
    box: Tensor
    """[N, 4] centre relative to the cell's corner, and size; grid units of this level."""
    cls: Tensor
    """[N] int64, class of the object."""
    anchor_size: Tensor
    """[N, 2] width and height of the anchor, grid units."""
    valid: Tensor
    """[N] bool, whether the row is a match."""
    count: Tensor
    """Number of valid rows, a 0-dim float tensor."""
    winner: Tensor
    """[B*A*H*W] int64, the last valid row that claims the cell, or -1."""

    def wins(self) -> Tensor:
        """[N] bool, whether the row is the one that its cell keeps: valid, and no later row claims the cell."""
        order = torch.arange(self.cell.shape[0], device=self.cell.device)
        last = self.winner.index_select(0, self.cell.clamp(max=self.winner.shape[0] - 1))
        return self.valid & (last == order)

    def matched(self) -> "LevelAssignment":
        """The same level without the rows that do not match. Waits for the device."""
        if not len(self.valid):
            return self
        kept = self.valid.nonzero().squeeze(1)
        renumbered = (self.valid.cumsum(0) - 1).index_select(0, self.winner.clamp(min=0))
        rows = ("image", "anchor", "row", "column", "cell", "box", "cls", "anchor_size", "valid")
        selected = {name: getattr(self, name).index_select(0, kept) for name in rows}
        return dataclasses.replace(self, **selected, winner=torch.where(self.winner >= 0, renumbered, -1))


@dataclass(frozen=True, slots=True)
class Assignment:
    """The assignment of a batch, level by level."""

    levels: tuple[LevelAssignment, ...]

    def matched(self) -> "Assignment":
        """The same assignment without the rows that do not match, in their order. Waits for the device."""
        return Assignment(tuple(level.matched() for level in self.levels))


@torch.no_grad()
def assign_targets(
    targets: Tensor,
    grid_sizes: Sequence[tuple[int, int]],
    anchors: Tensor,
    batch_size: int,
    anchor_threshold: float,
) -> Assignment:
    """Match every object of a batch to anchors and cells, on every level.

    An anchor matches when neither side differs from the object's by the factor `anchor_threshold` or more. Each match
    claims the object's own cell and the nearest neighbour cell on each axis.

    Args:
        targets: [T, 6] float rows (image, class, x, y, width, height); image is an index in the batch, the last four
            are fractions of the network's input. Padding rows have image -1. The boxes keep this dtype.
        grid_sizes: (rows, columns) of each level.
        anchors: [L, A, 2] width and height in grid units, on the device of the targets.
        batch_size: number of images B.
        anchor_threshold: the hyp key `anchor_t`.
    """
    anchors = anchors.to(targets.dtype)
    levels = (
        _assign_level(targets, size, anchors[i], batch_size, anchor_threshold) for i, size in enumerate(grid_sizes)
    )
    return Assignment(tuple(levels))


def _assign_level(
    targets: Tensor, grid_size: tuple[int, int], anchors: Tensor, batch_size: int, anchor_threshold: float
) -> LevelAssignment:
    rows, columns = grid_size
    A, T = anchors.shape[0], targets.shape[0]
    x, y, w, h = targets[:, 2] * columns, targets[:, 3] * rows, targets[:, 4] * columns, targets[:, 5] * rows
    real = (targets[:, 0] >= 0) & (targets[:, 0] < batch_size)
    matched = _matches(torch.stack((w, h), dim=-1), anchors, anchor_threshold) & real
    valid = (_neighbours(x, y, rows, columns)[:, None] & matched).flatten()
    column, row = _cells(x, y, rows, columns)
    box = torch.stack((x - column, y - row, w.expand(5, T), h.expand(5, T)), dim=-1)
    box = torch.where(valid[:, None], _spread(box, A), 1.0)  # a zero size would make NaN of rows that are masked anyway
    image = _spread(targets[:, 0].long().clamp(0, batch_size - 1).expand(5, T), A)
    anchor = torch.arange(A, device=targets.device)[:, None].expand(5, A, T).flatten()
    row, column = _spread(row, A), _spread(column, A)
    num_cells = batch_size * A * rows * columns
    cell = torch.where(valid, ((image * A + anchor) * rows + row) * columns + column, num_cells)
    return LevelAssignment(
        image=image,
        anchor=anchor,
        row=row,
        column=column,
        cell=cell,
        box=box,
        cls=_spread(targets[:, 1].long().expand(5, T), A),
        anchor_size=anchors[:, None].expand(5, A, T, 2).flatten(0, 2),
        valid=valid,
        count=valid.sum().to(targets.dtype),
        winner=_winners(cell, num_cells),
    )


def _matches(sizes: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """Whether each anchor [A, 2] is near enough in shape to each object [T, 2]: [A, T]."""
    ratio = sizes / anchors[:, None]
    return torch.maximum(ratio, 1 / ratio).amax(dim=-1) < threshold


def _neighbours(x: Tensor, y: Tensor, rows: int, columns: int) -> Tensor:
    """Which of the five cells (own, left, upper, right, lower) an object at grid position (x, y) claims: [5, T]."""

    def near(distance: Tensor) -> Tensor:
        return (distance.remainder(1) < 0.5) & (distance > 1)

    return torch.stack((torch.ones_like(x, dtype=torch.bool), near(x), near(y), near(columns - x), near(rows - y)))


def _cells(x: Tensor, y: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column and row of the five cells, clamped into the grid: two [5, T] int64."""
    column = torch.stack((x, x - 0.5, x, x + 0.5, x)).long().clamp(0, columns - 1)
    row = torch.stack((y, y, y - 0.5, y, y + 0.5)).long().clamp(0, rows - 1)
    return column, row


def _spread(values: Tensor, num_anchors: int) -> Tensor:
    """[5, T, ...] per offset and target to [5*A*T, ...], the same for every anchor."""
    return values[:, None].expand(-1, num_anchors, *values.shape[1:]).flatten(0, 2)


def _winners(cell: Tensor, num_cells: int) -> Tensor:
    """The last row that claims each cell, or -1.

    A plain scatter leaves open which of several writes survives; the maximum of the row order is the same on every
    device. int32, because not every backend has the maximum for int64.
    """
    order = torch.arange(cell.shape[0], dtype=torch.int32, device=cell.device)
    last = torch.full((num_cells + 1,), -1, dtype=torch.int32, device=cell.device)
    return last.scatter_reduce(0, cell, order, "amax")[:num_cells].long()
