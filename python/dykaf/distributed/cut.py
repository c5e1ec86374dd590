"""How an array is cut into one box per rank, and what of each matrix a box holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dykaf.ops import Place


class Box(NamedTuple):
    """Part of an array: in each dimension ``size`` entries from ``start`` on."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.size)

    def within(self, whole: Tensor) -> Tensor:
        """The entries of ``whole`` that are in the box, as a view."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole


@dataclass(frozen=True)
class Cut:
    """An array, a box of it for each rank of a team, and the matrices that it is made of.

    The first ``num_batch`` dimensions count the matrices; ``num_batch`` is 0 for a single one.
    Boxes are equal or apart: copies of a box are on several ranks where the array is replicated.
    """

    shape: tuple[int, ...]
    num_batch: int
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        """The number of matrices."""
        return math.prod(self.shape[: self.num_batch])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of each, more than two dimensions where the array has them."""
        return self.shape[self.num_batch :]

    def part(self, rank: int, matrix: int) -> Box | None:
        """What a rank holds of a matrix, in the matrix's coordinates; None for nothing."""
        start, size = self.boxes[rank]
        for place, low, num in zip(self._indices(matrix), start, size, strict=False):
            if not low <= place < low + num:
                return None
        box = Box(start[self.num_batch :], size[self.num_batch :])
        return box if box.numel > 0 else None

    def holders(self, matrix: int) -> dict[Box, list[int]]:
        """The ranks that hold each part of a matrix."""
        found: dict[Box, list[int]] = {}
        for rank in range(len(self.boxes)):
            box = self.part(rank, matrix)
            if box is not None:
                found.setdefault(box, []).append(rank)
        return found

    def local_part(self, local: Tensor, rank: int, matrix: int) -> Tensor:
        """What ``local``, the rank's box, has of a matrix; a view."""
        indices = self._indices(matrix)
        lows = self.boxes[rank].start[: self.num_batch]
        return local[tuple(idx - low for idx, low in zip(indices, lows, strict=True))]

    def _indices(self, matrix: int) -> list[int]:
        indices: list[int] = []
        for size in reversed(self.shape[: self.num_batch]):
            matrix, idx = divmod(matrix, size)
            indices.insert(0, idx)
        return indices


def cut_by_rows(shape: tuple[int, ...], num_batch: int, num_ranks: int) -> Cut:
    """The cut of DTensor's ``Shard(0)``: equal parts of the first dimension, the last ones less."""
    rows, *rest = shape
    step = -(-rows // num_ranks)
    boxes = []
    for rank in range(num_ranks):
        start = min(rows, rank * step)
        box_rows = min(rows, start + step) - start
        boxes.append(Box((start, *[0] * len(rest)), (box_rows, *rest)))
    return Cut(shape, num_batch, tuple(boxes))


def copies(shape: tuple[int, ...], num_batch: int, num_ranks: int, only: int | None = None) -> Cut:
    """The whole array on each rank, or on one alone."""
    whole = Box((0,) * len(shape), shape)
    nothing = Box((0,) * len(shape), (0,) * len(shape))
    boxes = (whole if only in (None, rank) else nothing for rank in range(num_ranks))
    return Cut(shape, num_batch, tuple(boxes))


def place_of(name: str, shape: Sequence[int], box: Box) -> Place:
    """Where the elements of a box are in the whole matrix, row by row.

    Args:
        name: of the parameter, for messages.
        shape: of the whole matrix.
        box: of it.

    Raises:
        ValueError: for a box that is cut in too many dimensions.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(low * stride for low, stride in zip(box.start, strides, strict=True))
    partial = [dim for dim, size in enumerate(box.size) if size != shape[dim]]
    if not partial or math.prod(box.size[: partial[-1]]) == 1:
        return first, 0, 0
    last = partial[-1]
    # The runs must follow each other at one distance: of the dimensions before, only the first that
    # has more than one entry may be cut.
    outer = next(dim for dim in range(last) if box.size[dim] > 1)
    if any(outer < dim < last for dim in partial):
        raise ValueError(
            f"{name}: expected shards that are cut in at most two dimensions, got one of shape "
            f"{tuple(box.size)} of {tuple(shape)}"
        )
    return first, box.size[last] * strides[last], shape[last] * strides[last]
