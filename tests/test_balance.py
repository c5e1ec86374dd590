"""Owners: the work of ranks against bounds that any assignment must keep, and the memory cap."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dykaf
from dykaf.distributed.balance import MAX_SHARE, Task, assign, loads_of, task_of
from dykaf.state import Layout


def even(costs: list[int], num_ranks: int) -> list[Task]:
    return [Task(cost, (0, 0), (0, 0), 1, 0, range(num_ranks)) for cost in costs]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7), st.integers(1, 3))
def test_within_grahams_bound_of_the_best(costs: list[int], num_ranks: int) -> None:
    """Longest first ends within 4/3 - 1/(3 n) of the best of all assignments (Graham 1969)."""
    tasks = even(costs, num_ranks)
    owners = assign(tasks, num_ranks, [None] * len(tasks))
    actual = max(sum(load) for load in loads_of(tasks, owners, num_ranks))
    best = min(
        max(sum(c for c, r in zip(costs, ranks, strict=True) if r == k) for k in range(num_ranks))
        for ranks in itertools.product(range(num_ranks), repeat=len(costs))
    )
    assert actual <= best * (4 / 3 - 1 / (3 * num_ranks)) + 1e-9


def test_refreshes_of_one_step_go_to_different_ranks() -> None:
    """Equal work on the whole; by sums alone two refreshes of slot 0 could be on one rank."""
    tasks = [Task(10, (100, 0), (slot, 0), 4, 0, range(2)) for slot in (0, 0, 1, 1)]
    owners = assign(tasks, 2, [None] * 4)
    assert max(max(load) for load in loads_of(tasks, owners, 2)) == 10 + 10 + 100


def test_no_rank_has_all_of_the_state() -> None:
    """Large but cheap matrices, which work alone would heap on one rank."""
    tasks = [Task(1000, (0, 0), (0, 0), 1, 1, range(2))]
    tasks += [Task(1, (0, 0), (0, 0), 1, 100, range(2)) for _ in range(10)]
    owners = assign(tasks, 2, [None] * 11)
    held = [sum(t.size for t, o in zip(tasks, owners, strict=True) if o == k) for k in (0, 1)]
    assert max(held) <= MAX_SHARE * sum(held) / 2
    without = assign([t._replace(size=0) for t in tasks], 2, [None] * 11)
    assert len(set(without[1:])) == 1


def test_owners_stay_and_candidates_alone_are_taken() -> None:
    tasks = [*even([5, 5, 5], 3), Task(50, (0, 0), (0, 0), 1, 0, [2])]
    owners = assign(tasks, 3, [1, None, None, None])
    assert owners[0] == 1
    assert owners[3] == 2
    assert sorted(owners[1:3]) == [0, 0]  # rank 1 has work already, rank 2 the longest


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 6)])
def test_the_work_of_a_matrix(shape: tuple[int, int]) -> None:
    """Counted from the products of a step: rotations, factor, Newton-Schulz."""
    group = dykaf.DyKAF([torch.ones(shape)]).param_groups[0]
    m, n = shape
    short, long = min(shape), max(shape)
    task = task_of(Layout.of(torch.ones(shape), group), group, (3, 4), [0])
    rotations = 2 * short * short * long
    factor = 2 * short * short * long  # G G^T in full, and what it is added to
    newton_schulz = 3 * (2 * short * short * long + short**3)
    assert task.step == m * n + rotations + factor + newton_schulz
    left, right = task.refreshes
    assert (left > 0, right > 0) == (m <= n, m > n)
    assert max(left, right) == 6 * short**3 + short * short * long
    assert task.slots == (3, 4)
    group["refresh_schedule"] = "fixed"
    assert task_of(Layout.of(torch.ones(shape), group), group, (3, 4), [0]).slots == (0, 0)
