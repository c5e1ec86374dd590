"""Where in the period of the geometric schedule each side of each matrix has its turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dykaf.state import STRUCTURAL_OPTIONS, Layout, shape_of

# What layouts and the places of their sides in the period hang on.
PLANNED_OPTIONS = ("precondition_frequency", *STRUCTURAL_OPTIONS)


class Offsets:
    """The offsets of all parameters of an optimizer, made anew when a shape or an option changes.

    They hang on nothing else: a run that is resumed finds the same.
    """

    def __init__(self) -> None:
        self._key: list[object] = []
        self._offsets: list[tuple[int, int]] = []

    def of(self, param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """For each parameter the offsets of its left and its right side."""
        key: list[object] = [
            (
                *(group[name] for name in PLANNED_OPTIONS),
                *(shape_of(param) for param in group["params"]),
            )
            for group in param_groups
        ]
        if key != self._key:
            params = [(group, param) for group in param_groups for param in group["params"]]
            self._offsets = stagger_offsets(
                (Layout.of(param, group), int(group["precondition_frequency"]))
                for group, param in params
            )
            self._key = key
        return self._offsets


# What one batch of csrc/aten holds of the largest arrays (kMaxEntries): more matrices in one step
# would go one batch after the other.
BATCH_ENTRIES = 1 << 24

# Sides that are alike share a step as long as their cubes add up to less than this part of the
# multiply-adds of one product of every gradient with its bases. A refresh takes a dozen for one of
# its cube, a plain step at least three for one of those: a quarter of a plain step, and about half
# of its time, for decompositions are slower.
_SHARE = 1 / 16


def stagger_offsets(layouts: Iterable[tuple[Layout, int]]) -> list[tuple[int, int]]:
    """Spreads the refreshes of all sides over the period, so that no step is much the slowest.

    Sides of matrices that are alike go together, for a GPU takes them as one batch: as many as a
    batch holds and as keep the step below half as much again (see _SHARE). The dearest of these go
    first, always to the slot with the least work so far; a refresh costs the cube of the side, or
    less for the long side of a skinny matrix. Matrices of a stack take consecutive slots from the
    offset on. Shapes and options alone decide, so that a run finds its places again on any machine.

    Args:
        layouts: each parameter's layout and precondition_frequency.

    Returns:
        for each parameter the offsets of its left and right side.
    """
    tasks = [
        _Task(layout, side, cost, period)
        for layout, period in layouts
        for side, cost in enumerate(layout.refresh_costs)
    ]
    most = _SHARE * sum(task.work for task in tasks)
    pieces = sorted(_pieces(tasks, most), key=lambda piece: -sum(tasks[idx].cost for idx in piece))

    # Slots beyond the number of turns would stay empty.
    num_turns = sum(tasks[piece[0]].layout.count for piece in pieces)
    slots = [0] * len(tasks)
    loads: dict[int, list[int]] = {}  # the work in each slot, by period
    for piece in pieces:
        count, period = tasks[piece[0]].layout.count, tasks[piece[0]].period
        load = loads.setdefault(period, [0] * min(period, num_turns))
        slot = load.index(min(load))
        for idx in piece:
            slots[idx] = slot
            for turn in range(min(len(load), count)):
                load[(slot + turn) % len(load)] += tasks[idx].cost
    return list(zip(slots[::2], slots[1::2], strict=True))


class _Task:
    """A side of a parameter.

    `cost` is that of a turn: of one matrix or, of a stack longer than the period, of more.
    """

    def __init__(self, layout: Layout, side: int, cost: int, period: int) -> None:
        self.layout, self.period = layout, period
        self.cost = math.ceil(layout.count / period) * cost
        self.likeness = (layout.m, layout.n, layout.skinny_rank, side, period)
        has_factor = (layout.left, layout.right)[side]
        width = (layout.m, layout.n)[side] if has_factor else layout.skinny_rank
        self.work = layout.count * layout.m * layout.n * width
        largest = max(
            layout.m * layout.n, width**2, 2 * layout.skinny_rank * max(layout.m, layout.n)
        )
        self.num_in_batch = max(1, BATCH_ENTRIES // max(1, largest))


def _pieces(tasks: Sequence[_Task], most: float) -> list[list[int]]:
    """What has a cost, in groups of places that share a slot.

    Those that are alike are cut into as few equal ones as `most` and a batch's memory allow.
    """
    alike: dict[object, list[int]] = {}
    for idx, task in enumerate(tasks):
        if task.cost:
            key = task.likeness if task.layout.count == 1 else idx
            alike.setdefault(key, []).append(idx)
    pieces = []
    for members in alike.values():
        first = tasks[members[0]]
        size = max(1, min(first.num_in_batch, int(most // first.cost)))
        num = math.ceil(len(members) / size)
        cuts = [len(members) * cut // num for cut in range(num + 1)]
        pieces += [members[begin:end] for begin, end in itertools.pairwise(cuts)]
    return pieces
