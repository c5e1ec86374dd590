"""Where in its period each side of each matrix has its turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dykaf.state import STRUCTURAL_OPTIONS, Layout, shape_of

_OPTIONS = ("precondition_frequency", *STRUCTURAL_OPTIONS)


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
            (*(group[name] for name in _OPTIONS), *(shape_of(param) for param in group["params"]))
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


def stagger_offsets(layouts: Iterable[tuple[Layout, int]]) -> list[tuple[int, int]]:
    """Spreads the refreshes of all sides over the period, so that no step is much the slowest.

    The dearest side goes first, always to the slot with the least work so far; a refresh costs the
    cube of the side, or less for the long side of a skinny matrix. Matrices of a stack take
    consecutive slots from the offset on.

    Args:
        layouts: each parameter's layout and precondition_frequency.

    Returns:
        for each parameter the offsets of its left and right side.
    """
    tasks = [
        (cost, layout.count, period) for layout, period in layouts for cost in layout.refresh_costs
    ]
    costs = [math.ceil(count / period) * cost for cost, count, period in tasks]
    dearest_first = sorted((idx for idx, cost in enumerate(costs) if cost), key=lambda i: -costs[i])

    # Slots beyond the number of turns would stay empty.
    num_turns = sum(tasks[idx][1] for idx in dearest_first)
    slots = [0] * len(tasks)
    loads: dict[int, list[int]] = {}  # the work in each slot, by period
    for idx in dearest_first:
        _, count, period = tasks[idx]
        load = loads.setdefault(period, [0] * min(period, num_turns))
        slots[idx] = load.index(min(load))
        for turn in range(min(len(load), count)):
            load[(slots[idx] + turn) % len(load)] += costs[idx]
    return list(zip(slots[::2], slots[1::2], strict=True))
