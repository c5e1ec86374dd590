"""Counts of refreshes and of the first step, which the CUDA backend leaves to torch's operations.

csrc/aten does them: the matrices of one shape whose basis is due, or whose gradient is the first,
go as one batch. How many operations that takes, and how many numbers go in and out of them, was
counted by running them (tests/test_cuda_bounds.py does it again). An operation is a launch at
least; views are none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.cuda_costs import Matrix, default_options
from bench.cuda_rates import EAGER, FLOAT, LAUNCH, Device
from dykaf.schedule import BATCH_ENTRIES, stagger_offsets
from dykaf.state import Layout

# Operations of one batch; a batch of several stacks its arrays first.
DENSE_OPS, DENSE_STACKS = 107, 6
LONG_OPS, LONG_STACKS = 257, 7
FIRST_DENSE_OPS, FIRST_DENSE_STACKS = 103, 6
FIRST_LONG_OPS, FIRST_LONG_STACKS = 191, 5
# Numbers in and out of them per matrix, products included: of a side n of a matrix of `size`; of
# `used` rows of length l and a short side s.
DENSE_NUMBERS = (97, 37)  # n^2, size
LONG_NUMBERS = (24.8, 8.4, 165)  # used l, s l, used^2
DENSE_PRODUCTS, CORRECTIONS = 5, 2 / 32  # of n x n; the correction is every 32nd time
LONG_PRODUCTS = 8  # of used x l with l x used or used x used: a pass has two, the last one has one
# Of used x used: those of a pass, twice, of P's four passes, and six with T and F.
LONG_SMALL_PRODUCTS, LONG_CHOLESKYS, LONG_SOLVES = 14, 10, 8
LONGEST_WITH_EIGENVECTORS, FIRST_ITERATIONS = 1024, 2  # csrc/aten/first_basis


@dataclass
class Work:
    """What torch's operations do: their number, and seconds on a device, at best and likely."""

    operations: float = 0
    bound: float = 0.0
    likely: float = 0.0

    def add(self, other: Work, times: float = 1) -> None:
        self.operations += times * other.operations
        self.bound += times * other.bound
        self.likely += times * other.likely

    @property
    def host(self) -> float:
        return self.operations * EAGER.value


def work_of(device: Device, operations: float, seconds: float, numbers: float) -> Work:
    """`seconds` of products and decompositions, and the other operations' traffic."""
    memory = FLOAT * numbers / device.dram.value
    likely = seconds + memory / device.copied.value + operations * LAUNCH.value
    return Work(operations, seconds + memory, likely)


def turn_seconds(device: Device, n: int, num: int) -> float:
    """A power iteration of `num` sides n in one batch, with their bases."""
    rate = device.library_rate("float32", n, n, n, num)
    products = num * DENSE_PRODUCTS * 2.0 * n**3 / rate
    solves = num * 2 * n**3 / rate  # two, as products of half the flops
    return products + solves + 3 * max(device.cholesky_seconds(n), num * n**3 / 3 / rate)


def refresh_of(p: Matrix, num: int, device: Device) -> Work:
    """Of the side with a factor in full, of `num` matrices in one batch."""
    n, other = p.side, p.size // p.side
    operations = DENSE_OPS + (DENSE_STACKS if num > 1 else 0)
    seconds = turn_seconds(device, n, num)
    seconds += num * CORRECTIONS * 2.0 * n**3 / device.library_rate("float32", n, n, n, num)
    seconds += num * 2.0 * p.size * n / device.library_rate("float32", n, n, other, num)
    numbers = DENSE_NUMBERS[0] * n * n + DENSE_NUMBERS[1] * p.size
    return work_of(device, operations, seconds, num * numbers)


def long_period(p: Matrix) -> int:
    """Steps until the rows of `basis` are full, which forces a refresh, or the period."""
    period = int(default_options()["precondition_frequency"])
    return min(period, max(1, p.skinny_rank // p.short))


def long_refresh_of(p: Matrix, num: int, device: Device) -> Work:
    """Of the long sides of `num` skinny matrices in one batch."""
    used, s, length = p.skinny_rank + p.short * long_period(p), p.short, p.long
    operations = LONG_OPS + (LONG_STACKS if num > 1 else 0)
    rate = device.library_rate("float32", used, used, length, num)
    small_rate = device.library_rate("float32", used, used, used, num)
    # and the new basis, exp_avg in it
    flops = LONG_PRODUCTS * 2.0 * used**2 * length
    flops += 2.0 * length * used * p.skinny_rank + 2.0 * s * length * p.skinny_rank
    seconds = num * flops / rate
    seconds += num * (2.0 * LONG_SMALL_PRODUCTS + LONG_SOLVES) * used**3 / small_rate
    cholesky = max(device.cholesky_seconds(used), num * used**3 / 3 / small_rate)
    seconds += LONG_CHOLESKYS * cholesky
    numbers = sum(
        c * x for c, x in zip(LONG_NUMBERS, (used * length, s * length, used**2), strict=True)
    )
    return work_of(device, operations, seconds, num * numbers)


def batches(matrices: Iterable[Matrix]) -> dict[Matrix, list[int]]:
    """for_each_batch of csrc/aten/matrix.h: by likeness, and no more than fit."""
    alike: dict[Matrix, int] = defaultdict(int)
    for p in matrices:
        alike[p] += 1
    sizes = {}
    for p, num in alike.items():
        largest = max(p.size, p.side**2, 2 * p.skinny_rank * p.long)
        most = max(1, BATCH_ENTRIES // largest)
        sizes[p] = [min(most, num - begin) for begin in range(0, num, most)]
    return sizes


@dataclass
class Refreshes:
    """Of a step: the mean over a period, and the step with most."""

    mean: Work
    most: Work


def refreshes_of(
    layouts: Sequence[Layout], matrices: Sequence[Matrix], device: Device
) -> Refreshes:
    """Refreshes of one group, by the package's own places in the period.

    Long sides that fill up come together, for all adapters of a run start together.
    """
    period = int(default_options()["precondition_frequency"])
    slots = stagger_offsets((layout, period) for layout in layouts)
    due: dict[int, list[Matrix]] = defaultdict(list)
    place = 0
    for layout, offsets in zip(layouts, slots, strict=True):
        for turn in range(layout.count):
            p = matrices[place]
            place += 1
            if not p.is_adamw:
                due[(offsets[0 if p.left else 1] + turn) % period].append(p)
    skinny = [p for p in matrices if p.skinny_rank]
    mean, most = Work(), Work()
    num_steps = math.lcm(period, *(long_period(p) for p in set(skinny))) if skinny else period
    for step in range(num_steps):
        now = Work()
        for p, sizes in batches(due.get(step % period, [])).items():
            for num in sizes:
                now.add(refresh_of(p, num, device))
        for p, sizes in batches(q for q in skinny if step % long_period(q) == 0).items():
            for num in sizes:
                now.add(long_refresh_of(p, num, device))
        mean.add(now, 1 / num_steps)
        if now.likely + now.host > most.likely + most.host:
            most = now
    return Refreshes(mean, most)


def first_of(p: Matrix, num: int, device: Device) -> Work:
    """Of the first gradients of `num` matrices in one batch: factors and bases of each side."""
    rate = device.library_rate("float32", p.side, p.side, p.side, num)
    # Q^T F Q and the factor's product
    seconds = num * (4.0 * p.side**3 + 2.0 * p.size * p.side) / rate
    if p.side > LONGEST_WITH_EIGENVECTORS:
        seconds += FIRST_ITERATIONS * turn_seconds(device, p.side, num)
    else:
        seconds += num * device.eigh_seconds(p.side)  # one matrix after the other
    if p.skinny_rank:
        seconds += num * device.eigh_seconds(p.short)
        cholesky = device.cholesky_seconds(p.short)
        products = LONG_PRODUCTS * 2.0 * p.short**2 * p.long
        seconds += LONG_CHOLESKYS / 2 * cholesky + num * products / rate
    operations, stacks = FIRST_DENSE_OPS, FIRST_DENSE_STACKS
    if p.skinny_rank:
        operations, stacks = FIRST_LONG_OPS, FIRST_LONG_STACKS
    operations += stacks if num > 1 else 0
    return work_of(device, operations, seconds, num * (20 * p.side**2 + 10 * p.size))


def first_step_of(matrices: Iterable[Matrix], device: Device) -> Work:
    """First gradients of all matrices with a factor."""
    total = Work()
    for p, sizes in batches(p for p in matrices if not p.is_adamw).items():
        for num in sizes:
            total.add(first_of(p, num, device))
    return total
