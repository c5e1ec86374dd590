"""What other optimizers launch, move and compute on a GPU: eager torch, one operation at a time.

SOAP and the research code are bench/textbook_soap.py and bench/textbook.py; Muon and AdamW are
torch's own. Numbers of operations, and of numbers in and out of them, were counted by running them
(tests/test_cuda_bounds.py does it again). Parameters that are no matrices go to the fused AdamW for
all of them. State and arithmetic are float32, but for Muon's products in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.cuda_costs import Matrix
from bench.cuda_rates import FLOAT, Device
from bench.cuda_refresh import Work, work_of

MAX_PRECOND_DIM = 10000
FREQUENCY = 10  # steps between refreshes, in both published codes
MUON_STEPS = 5
# Numbers in and out: in float32 of m n; in bfloat16 of m n and of the short side's square.
MUON_FLOATS, MUON_HALVES = 11, (30, 30)
# Fused AdamW takes lists of tensors in chunks (PyTorch, aten/src/ATen/native/cuda/
# MultiTensorApply.cuh, four lists).
CHUNK, CHUNKS_PER_LAUNCH, TENSORS_PER_LAUNCH = 65536, 320, 36


class Eager(NamedTuple):
    """Of one matrix with factors of both sides, and of one side alone.

    Numbers in and out are `of_size` m n + `of_square` times the squares of the sides with factors;
    products are counted per such side.
    """

    operations: int
    products: int
    of_size: float
    of_square: float
    refresh_operations: int  # per side
    refresh_products: int  # of n x n, per side
    refresh_of_size: float
    refresh_of_square: float


SOAP = {2: Eager(20, 4, 41, 7, 2, 1, 0, 6), 1: Eager(15, 4, 33, 7, 2, 1, 0, 6)}
RESEARCH = {2: Eager(36, 6, 51, 14, 7, 3, 2, 14), 1: Eager(18, 4, 33, 10, 7, 3, 2, 14)}


def factored(p: Matrix) -> list[int]:
    return [side for side in (p.m, p.n) if side <= MAX_PRECOND_DIM]


def operands_of(precision: str) -> str:
    """Of float32 products by torch's setting, which on CUDA knows no bfloat16."""
    return "float32" if precision == "highest" else "TF32"


def eager_step(p: Matrix, forms: dict[int, Eager], device: Device, precision: str) -> Work:
    sides = factored(p)
    form = forms[len(sides)]
    seconds = 0.0
    for side in sides:
        rate = device.library_rate(operands_of(precision), p.size // side, side, side)
        seconds += form.products * 2.0 * p.size * side / rate
    numbers = form.of_size * p.size + form.of_square * sum(side**2 for side in sides)
    return work_of(device, form.operations, seconds, numbers)


def eager_refresh(p: Matrix, forms: dict[int, Eager], device: Device, precision: str) -> Work:
    total = Work()
    form = forms[len(factored(p))]
    for side in factored(p):
        rate = device.library_rate(operands_of(precision), side, side, side)
        seconds = form.refresh_products * 2.0 * side**3 / rate + device.qr_seconds(side)
        numbers = form.refresh_of_size * p.size + form.refresh_of_square * side**2
        total.add(work_of(device, form.refresh_operations, seconds, numbers))
    return total


def eager_first_step(p: Matrix, device: Device) -> float:
    """Seconds: eigenvectors of each factor."""
    return sum(device.eigh_seconds(side) for side in factored(p))


def muon_step(p: Matrix, device: Device) -> Work:
    s, large = p.short, p.long
    gram = 2.0 * s * s * large
    seconds = MUON_STEPS * (
        2 * gram / device.library_rate("bfloat16", s, s, large)
        + 2.0 * s**3 / device.library_rate("bfloat16", s, s, s)
    )
    numbers = MUON_FLOATS * p.size + (MUON_HALVES[0] * p.size + MUON_HALVES[1] * s * s) / 2
    return work_of(device, 8 + 3 * MUON_STEPS, seconds, numbers)


def adamw_step(matrices: Sequence[Matrix], device: Device) -> Work:
    """torch.optim.AdamW(fused=True): one addition to all counts of steps, then the kernel."""
    if not matrices:
        return Work()
    chunks = sum(math.ceil(p.size / CHUNK) for p in matrices)
    launches = max(
        math.ceil(chunks / CHUNKS_PER_LAUNCH), math.ceil(len(matrices) / TENSORS_PER_LAUNCH)
    )
    data = sum((4 * FLOAT + 3 * p.param_bytes) * p.size for p in matrices)
    return work_of(device, launches + 1, 0.0, data / FLOAT)


def total(works: Iterable[Work]) -> Work:
    result = Work()
    for work in works:
        result.add(work)
    return result
