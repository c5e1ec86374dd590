"""Where in the refresh period each side of each matrix has its turn."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    parameters = list(layouts)
    sides = []
    for idx, (layout, period) in enumerate(parameters):
        turns = math.ceil(layout.count / period)
        for side_idx, cost in enumerate(layout.refresh_costs):
            if cost:
                sides.append((turns * cost, idx, side_idx))
    sides.sort(key=lambda side: (-side[0], side[1], side[2]))

    # Slots beyond the number of refreshes would stay empty.
    num_refreshes = sum(parameters[idx][0].count for _, idx, _ in sides)
    offsets = [[0, 0] for _ in parameters]
    loads: dict[int, list[int]] = {}  # the work in each slot, by period
    for cost, idx, side_idx in sides:
        layout, period = parameters[idx]
        load = loads.setdefault(period, [0] * min(period, num_refreshes))
        slot = load.index(min(load))
        offsets[idx][side_idx] = slot
        for turn in range(min(len(load), layout.count)):
            load[(slot + turn) % len(load)] += cost
    return [(left, right) for left, right in offsets]
