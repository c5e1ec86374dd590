"""Which rank works on which matrix, so that no rank is much the slowest in any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dykaf.state import Layout

# What a rank may hold of the state, over an equal share.
MAX_SHARE = 1.5


class Task(NamedTuple):
    """A matrix and what its owner does."""

    step: int  # multiply-adds of a step without refreshes
    refreshes: tuple[int, int]  # of a refresh, left and right
    slots: tuple[int, int]  # the steps of the period in which these come
    period: int
    size: int  # bytes of state
    ranks: Sequence[int]  # that may own it


def task_of(
    layout: Layout,
    group: Mapping[str, Any],
    slots: tuple[int, int],
    ranks: Sequence[int],
) -> Task:
    """The task of one matrix of a parameter.

    Args:
        layout: of the whole parameter.
        group: its options.
        slots: places of its left and right side in the period of the geometric schedule; on the
            fixed one all have the same.
        ranks: that may own it.
    """
    m, n = layout.m, layout.n
    if not layout.is_matrix:
        return Task(m * n, (0, 0), (0, 0), 1, 2 * layout.dtype.itemsize * m * n, ranks)
    short, long = min(m, n), max(m, n)
    work = m * n
    if layout.skinny_rank:
        work += 6 * layout.skinny_rank * m * n
    else:
        for side, is_kept in ((m, layout.left), (n, layout.right)):
            # Into the basis, out of it, and the factor's update.
            work += 4 * side * m * n if is_kept else 0
        work += int(group["orthogonalize"]) * (2 * short**2 * long + short**3)
    left, right = layout.refresh_costs
    itemsizes = [
        dtype.itemsize * torch.Size(shape[len(layout.batch) :]).numel()
        for shape, dtype in layout.shapes().values()
    ]
    # A power iteration, its orthonormalisation, and exp_avg in the new basis.
    refreshes = (6 * left + (left and m * m * n), 6 * right + (right and m * n * n))
    slots = (0, 0) if group["refresh_schedule"] == "fixed" else slots
    return Task(work, refreshes, slots, int(group["precondition_frequency"]), sum(itemsizes), ranks)


def assign(tasks: Sequence[Task], num_ranks: int, owners: Sequence[int | None]) -> list[int]:
    """Gives each task to a rank: the longest first, to the rank whose slowest step stays fastest.

    Whole numbers and ties by the rank's number make it the same on all ranks.

    Args:
        tasks: in an order that all ranks agree on.
        num_ranks: of the team.
        owners: of those tasks that have one already.

    Returns:
        the owner of each task.
    """
    period = max((task.period for task in tasks), default=1)
    loads = torch.zeros(num_ranks, period, dtype=torch.int64, device="cpu")
    held = [0] * num_ranks
    cap = MAX_SHARE * sum(task.size for task in tasks) / num_ranks
    found = [-1] * len(tasks)

    def cost(task: Task) -> torch.Tensor:
        steps = torch.full((period,), task.step, dtype=torch.int64, device="cpu")
        for refresh, slot in zip(task.refreshes, task.slots, strict=True):
            steps[slot % task.period :: task.period] += refresh
        return steps

    def give(idx: int, rank: int) -> None:
        found[idx] = rank
        loads[rank] += cost(tasks[idx])
        held[rank] += tasks[idx].size

    for idx, owner in enumerate(owners):
        if owner is not None:
            give(idx, owner)
    longest_first = sorted(
        (idx for idx, owner in enumerate(owners) if owner is None),
        key=lambda idx: -(tasks[idx].step * period + sum(tasks[idx].refreshes)),
    )
    for idx in longest_first:
        task = tasks[idx]
        ranks = [rank for rank in task.ranks if held[rank] + task.size <= cap] or task.ranks
        after = loads[list(ranks)] + cost(task)
        peaks, totals = after.amax(1).tolist(), after.sum(1).tolist()
        give(idx, min(zip(peaks, totals, ranks, strict=True))[2])
    return found


def loads_of(tasks: Sequence[Task], owners: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The multiply-adds of each rank in each step of the period."""
    period = max((task.period for task in tasks), default=1)
    loads = torch.zeros(num_ranks, period, dtype=torch.int64, device="cpu")
    for task, owner in zip(tasks, owners, strict=True):
        loads[owner] += task.step
        for refresh, slot in zip(task.refreshes, task.slots, strict=True):
            loads[owner, slot % task.period :: task.period] += refresh
    result: list[list[int]] = loads.tolist()
    return result
