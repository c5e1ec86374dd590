"""Where in its period each side of each matrix, and each matrix, has its turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dykaf.state import Layout


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
    slots = _spread(
        [
            (cost, layout.count, period)
            for layout, period in layouts
            for cost in layout.refresh_costs
        ]
    )
    return list(zip(slots[::2], slots[1::2], strict=True))


def update_offsets(layouts: Iterable[tuple[Layout, int]]) -> list[int]:
    """Spreads the factor updates of all matrices likewise.

    Args:
        layouts: each parameter's layout and factor_update_every.

    Returns:
        for each parameter its offset.
    """
    return _spread([(layout.update_cost, layout.count, period) for layout, period in layouts])


def _spread(tasks: Sequence[tuple[int, int, int]]) -> list[int]:
    """The slots of tasks that are given by cost, number of matrices and period."""
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
    return slots
