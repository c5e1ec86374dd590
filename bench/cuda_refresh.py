"""Counts of refreshes and of the first step, which the CUDA backend leaves to torch's operations.

csrc/aten does them: the matrices of one shape whose basis is due go as one batch. How many
operations that takes, and how many numbers go in and out of them, was counted by running them
(tests/test_cuda_bounds.py does it again). An operation is a launch at least; views are none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.cuda_costs import Matrix, default_options
from bench.cuda_rates import EAGER, FLOAT, LAUNCH, QR_COLUMN, QR_MATRIX, Device
from dykaf.schedule import stagger_offsets
from dykaf.state import Layout

# Operations of one batch; a batch of several stacks its arrays first.
DENSE_OPS, DENSE_STACKS = 105, 6
LONG_OPS, LONG_STACKS = 139, 7  # without the four by which a CPU alone looks at the result
# Numbers in and out of them per matrix, products included: of a side n of a matrix of `size`; of
# `used` rows of length l and a short side s.
DENSE_NUMBERS = (97, 37)  # n^2, size
LONG_NUMBERS = (22, 7, 54)  # used l, s l, used^2
DENSE_PRODUCTS, CORRECTIONS = 5, 2 / 32  # of n x n; the correction is every 32nd time
FIRST_DENSE_OPS, FIRST_LONG_OPS = 99, 129  # of one matrix: they go one by one

BATCH_ENTRIES = 1 << 24  # kMaxEntries of csrc/aten/matrix.cpp


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


def refresh_of(p: Matrix, num: int, device: Device) -> Work:
    """Of the side with a factor in full, of `num` matrices in one batch."""
    n, other = p.side, p.size // p.side
    operations = DENSE_OPS + (DENSE_STACKS if num > 1 else 0)
    squares = DENSE_PRODUCTS + CORRECTIONS
    cube = 2.0 * n**3
    rate = device.library_rate("float32", n, n, n, num)
    seconds = num * squares * cube / rate
    seconds += num * 2.0 * p.size * n / device.library_rate("float32", n, n, other, num)
    seconds += num * 2 * n**3 / rate  # two triangular solves, as products of half the flops
    seconds += 3 * max(device.cholesky_seconds(n), num * n**3 / 3 / rate)
    numbers = DENSE_NUMBERS[0] * n * n + DENSE_NUMBERS[1] * p.size
    return work_of(device, operations, seconds, num * numbers)


def long_period(p: Matrix) -> int:
    """Steps until the rows of `basis` are full, which forces a refresh, or the period."""
    period = int(default_options()["precondition_frequency"])
    return min(period, max(1, p.skinny_rank // p.short))


def long_refresh_of(p: Matrix, num: int, device: Device) -> Work:
    """Of the long side of skinny matrices: Q of the rows in use, matrix by matrix."""
    used, s, length = p.skinny_rank + p.short * long_period(p), p.short, p.long
    operations = LONG_OPS + (LONG_STACKS if num > 1 else 0)
    rate = device.library_rate("float32", used, used, used, num)
    seconds = num * (device.qr_seconds(used) + QR_MATRIX.value) + QR_COLUMN.value * used
    # T core T^T, S P, Z P, exp_avg V^T
    flops = 6.0 * used**3 + 2.0 * length * used * p.skinny_rank + 2.0 * s * length * p.skinny_rank
    seconds += num * flops / rate
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


def first_step_of(matrices: Iterable[Matrix], device: Device) -> Work:
    """First gradients: factors, and eigenvectors of each side, one matrix after the other."""
    total = Work()
    for p in matrices:
        if p.is_adamw:
            continue
        rate = device.library_rate("float32", p.side, p.side, p.side)
        seconds = device.eigh_seconds(p.side)
        # Q^T F Q and the factor's product
        seconds += (4.0 * p.side**3 + 2.0 * p.size * p.side) / rate
        if p.skinny_rank:
            seconds += device.qr_seconds(p.short) + device.eigh_seconds(p.short)
        operations = FIRST_LONG_OPS if p.skinny_rank else FIRST_DENSE_OPS
        total.add(work_of(device, operations, seconds, 20 * p.side**2 + 10 * p.size))
    return total
