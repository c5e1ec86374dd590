"""python -m bench.cuda_bounds: its counts by hand and beside what runs, and its rates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import cuda_bounds as bounds
from bench import cuda_others as others
from bench import cuda_refresh as refresh
from bench import cuda_times as times
from bench.cuda_costs import Matrix, launches_of, layout_of, matrices_of, parts_of
from bench.cuda_models import PRICED, Model, lora
from bench.cuda_rates import (
    DEVICES,
    HOST_MATRIX,
    HOST_VECTOR,
    LARGE,
    LAUNCH,
    MEDIUM,
    PRECISIONS,
    TALL,
    WIDE,
    Device,
)
from bench.distributed_models import Param
from bench.textbook import TextbookDyKAF
from bench.textbook_soap import TextbookSOAP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dykaf import DyKAF, ops
from dykaf.nonfinite import Skips
from dykaf.work import GroupWork

DOC = Path(__file__).parent.parent / "docs" / "cuda.md"
H100, A100 = DEVICES["H100"], DEVICES["A100"]
TILES = (LARGE, MEDIUM, WIDE, TALL)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Matrix:
    (found,) = matrices_of([Param(shape)], dtype)
    return found


class Traffic(TorchDispatchMode):
    """Counts operations, without views, and the numbers that go in and out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace == "profiler":
            return result
        self.operations[name] += 1
        if name != "empty":  # what a product of C++ writes to
            tensors = tree_leaves((args, kwargs, result))
            self.numbers += sum(t.numel() for t in tensors if isinstance(t, Tensor))
        return result

    @property
    def total(self) -> int:
        return self.operations.total()


def steps_of(optimizer: torch.optim.Optimizer, num: int) -> list[Traffic]:
    """What each step does."""
    found = []
    for idx in range(num):
        for group in optimizer.param_groups:
            for place, param in enumerate(group["params"]):
                generator = torch.Generator().manual_seed(100 * idx + place)
                param.grad = torch.randn(param.shape, generator=generator)
        with Traffic() as traffic:
            optimizer.step()
        found.append(traffic)
    return found


def params_of(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def test_flops_of_a_square_matrix_by_hand() -> None:
    """768 = 6 blocks: 36 of a whole result, 21 of a symmetric one. Into the basis and out of it,
    three times a Gram matrix, its square and a product, and the factor's increment."""
    blocks = 2 * 36 + 3 * (21 + 21 + 36) + 21
    counted = sum(launch.flops for launch in launches_of([matrix(768, 768)]))
    assert counted == blocks * 2 * 128 * 128 * 768


def test_flops_are_those_of_the_formula_but_for_padding() -> None:
    """README: 3 s^2 l multiply-adds and at most 3 (2 s^2 l + s^3), symmetric results by halves."""
    s, long = 2048, 6144
    counted = sum(launch.flops for launch in launches_of([matrix(s, long)])) / 2
    halves = 2.5 * s * s * long + 3 * (1.5 * s * s * long + 0.5 * s**3)
    assert halves < counted < 1.07 * halves


def test_bytes_of_a_wide_matrix_by_hand() -> None:
    """4 x 6 in bfloat16: each kernel reads and writes its arrays once."""
    size, square = 4 * 24, 4 * 16
    expected = {
        "load": size + 2 * 24,
        "into left": 2 * size + square + 5 * size,
        "normalize": 2 * size,
        **{f"{step} gram wide": size + square for step in (1, 2, 3)},
        **{f"{step} square": 2 * square for step in (1, 2, 3)},
        **{f"{step} product": 2 * size + square for step in (1, 2, 3)},
        "out left": size + square + 2 * 2 * 24,
        "left increment": size + 1.5 * square,
        "left blend": 3 * square,
    }
    found = {part.site: part.bytes for part in parts_of(matrix(4, 6, dtype=torch.bfloat16))}
    assert {site: moved for site, moved in found.items() if moved} == expected


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_rates_are_ordered_and_below_the_peaks(device: Device) -> None:
    for tile in TILES:
        rates = [device.product_rate(precision, tile) for precision in PRECISIONS]
        assert rates == sorted(rates)
        passes = dict(zip(PRECISIONS, (3, 1, 1), strict=True))
        for precision, rate in zip(PRECISIONS, rates, strict=True):
            peak = device.peaks["bfloat16" if precision == "medium" else "TF32"].value
            assert 1e12 < passes[precision] * rate <= device.mma_sync.value * peak
    for precision in PRECISIONS:
        by_tile = [device.product_rate(precision, tile) for tile in (WIDE, MEDIUM, LARGE)]
        assert by_tile == sorted(by_tile)
    for operands in device.library:
        sizes = (16, 100, 1000, 1024, 1500, 2048, 3000, 4096, 9000)
        by_size = [device.library_rate(operands, n, n, n) for n in sizes]
        assert by_size == sorted(by_size)
        assert by_size[-1] < device.peaks[operands].value
        assert by_size[3] == pytest.approx(device.library[operands][0][1])
        assert device.library_rate(operands, 512, 512, 512, 8) == pytest.approx(by_size[3])


def test_the_newer_device_is_faster() -> None:
    for tile in TILES:
        for precision in PRECISIONS:
            assert H100.product_rate(precision, tile) > A100.product_rate(precision, tile)
    assert H100.dram.value > A100.dram.value and H100.l2.value > A100.l2.value


def test_ceilings_by_hand() -> None:
    """128 x 128: 2 128^2 flops of each k for 2 128 numbers of 4 bytes from L2."""
    ceilings = H100.ceilings("high", LARGE)
    assert ceilings["mma.sync"] == pytest.approx(0.629 * 494.7e12)
    assert ceilings["L2"] == pytest.approx(32 * 9.7e12)
    # Stored once, and read by four warps of 64 x 64: 2 128 + 4 128 numbers of each k.
    assert ceilings["shared memory"] == pytest.approx(2 * 128**2 / (4 * 768) * 128 * 132 * 1.83e9)


SASS_ROW = re.compile(r"\| (\d+x\d+) (.*) (highest|high|medium) \|.*\| (\d+)% \| (\w+) \|")


@pytest.mark.parametrize(("device", "arch"), [(H100, 90), (A100, 80)], ids=["sm_90", "sm_80"])
def test_shared_memory_binds_as_in_the_machine_code(device: Device, arch: int) -> None:
    """The share of mma.sync's rate that the compiled main loops can reach, in docs/cuda.md."""
    begin = DOC.read_text().split(f"### sm_{arch}, matrix multiplications")[1]
    rows = SASS_ROW.findall(begin.split("###")[0])
    assert len(rows) == 48
    for name, form, precision, percent, limit in rows:
        (tile,) = (tile for tile in TILES if tile.name == name)
        ceilings = device.ceilings(precision, tile)
        share = min(1.0, ceilings["shared memory"] / ceilings["mma.sync"])
        assert share == pytest.approx(int(percent) / 100, abs=0.011), (name, form, precision)
        assert (limit == "shared") == (share < 1)


def test_times_are_in_seconds() -> None:
    (launch,) = (x for x in launches_of([matrix(4096, 4096)]) if x.site == "into left")
    assert launch.flops == 2 * 4096**3
    rate = H100.product_rate("high", LARGE)
    assert launch.seconds(H100, "high", reached=False) == pytest.approx(2 * 4096**3 / rate)
    assert 1e-4 < launch.seconds(H100, "high", reached=False) < 1e-3
    (load,) = (x for x in launches_of([matrix(4096, 4096)]) if x.site == "load")
    assert load.seconds(H100, "high", reached=False) == 2 * 4 * 4096**2 / 3.35e12


def test_an_estimate_is_what_others_reached_of_the_bound() -> None:
    launches = {x.site: x for x in launches_of([matrix(4096, 4096)])}
    for site, share in (("load", 1704 / 2039), ("into left", 0.35 / 0.629)):
        bound, likely = (launches[site].seconds(H100, "high", reached) for reached in (False, True))
        assert bound / likely == pytest.approx(share)


def test_a_block_has_one_multiprocessor() -> None:
    """16 x 32 from k = 4096 is one block: 16 of them take no longer than two."""
    (one,) = (x for x in launches_of([matrix(16, 4096)]) if x.site == "into V wide")
    assert one.blocks == 2  # the gradient's and exp_avg's
    (many,) = (x for x in launches_of(8 * [matrix(16, 4096)]) if x.site == "into V wide")
    assert many.blocks == 16
    bound = one.seconds(H100, "high", reached=False)
    assert bound == many.seconds(H100, "high", reached=False)
    assert bound == pytest.approx(2 * 16 * 64 * 4096 * 132 / H100.product_rate("highest", WIDE))


@pytest.mark.parametrize("shape", [(20, 90), (110, 30), (40, 40)])
@pytest.mark.parametrize("num", [1, 3])
def test_operations_and_traffic_of_a_refresh(shape: tuple[int, int], num: int) -> None:
    with ops.aten_alone():
        optimizer = DyKAF(
            params_of(*num * [shape]), refresh_schedule="fixed", precondition_frequency=4
        )
        *_, plain, due = steps_of(optimizer, 5)
    operations = due.total - plain.total
    assert operations == refresh.DENSE_OPS + (refresh.DENSE_STACKS if num > 1 else 0)
    # torch sees the products of C++ as the memory that they write to.
    assert due.operations["empty"] - plain.operations["empty"] == refresh.DENSE_PRODUCTS + 1
    if num == 1:
        n, size = min(shape), shape[0] * shape[1]
        unseen = 16 * n * n + 2 * size
        expected = refresh.DENSE_NUMBERS[0] * n * n + refresh.DENSE_NUMBERS[1] * size
        assert due.numbers - plain.numbers + unseen == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", [(16, 1536), (1024, 8), (16, 768)])
@pytest.mark.parametrize("num", [1, 3])
def test_operations_and_traffic_of_a_long_sides_refresh(shape: tuple[int, int], num: int) -> None:
    p = matrix(*shape)
    with ops.aten_alone():
        optimizer = DyKAF(params_of(*num * [shape]), refresh_schedule="fixed")
        found = steps_of(optimizer, 20)[12:]
    plain = min(found, key=lambda traffic: traffic.total)
    due = [traffic for traffic in found if traffic.total > plain.total]
    assert len(due) == 8 // refresh.long_period(p)
    operations = due[0].total - plain.total
    assert operations == refresh.LONG_OPS + (refresh.LONG_STACKS if num > 1 else 0)
    if num == 1:
        used = p.skinny_rank + p.short * refresh.long_period(p)
        sizes = (used * p.long, p.short * p.long, used**2)
        expected = sum(c * x for c, x in zip(refresh.LONG_NUMBERS, sizes, strict=True))
        # Four Gram matrices, three turns, T, the new basis, and exp_avg in it.
        unseen = p.long * ((4 + 2 * 3 + 2 + 1) * used + 2 * p.skinny_rank + p.short)
        assert due[0].numbers - plain.numbers + unseen == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("shape", [(20, 50), (16, 1024)])
def test_operations_of_first_gradients(shape: tuple[int, int], num: int) -> None:
    """Beside what a step with zero gradients takes, which starts nothing, and zeros, of which
    states are made."""

    def total(scale: float) -> int:
        params = params_of(*num * [shape])
        optimizer = DyKAF(params)
        for place, param in enumerate(params):
            generator = torch.Generator().manual_seed(place)
            param.grad = scale * torch.randn(param.shape, generator=generator)
        with ops.aten_alone(), Traffic() as traffic:
            optimizer.step()
        return traffic.total - traffic.operations["zeros"]

    expected, stacks = refresh.FIRST_DENSE_OPS, refresh.FIRST_DENSE_STACKS
    if matrix(*shape).skinny_rank:
        expected, stacks = refresh.FIRST_LONG_OPS, refresh.FIRST_LONG_STACKS
    assert total(1.0) - total(0.0) == expected + (stacks if num > 1 else 0)


@pytest.mark.parametrize("num", [1, 3])
def test_operations_of_the_skip_flag(num: int) -> None:
    """Beside what turns the flag into an integer for each group."""
    skips = Skips()
    group = {"nonfinite": "skip"}
    items = [GroupWork(group, torch.device("cpu"), True, []) for _ in range(num)]
    maxima = [torch.ones(5, dtype=torch.float64) for _ in range(num)]
    for _ in range(2):  # the first makes the count
        with Traffic() as traffic:
            skips.hear()
            skip, firsts = skips.flag(items, maxima, None)
            assert skip is not None
            skips.count_on_gpu(skip, firsts, items, captured=False)
    assert traffic.total == times.FLAG_OPS + num * (times.FLAG_OPS_PER_GROUP - 1)


def soap(max_precond_dim: int) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: TextbookSOAP(
        params, max_precond_dim=max_precond_dim, precondition_frequency=5
    )


def research(max_precond_dim: int) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: TextbookDyKAF(
        params, max_precond_dim=max_precond_dim, precondition_frequency=5
    )


@pytest.mark.parametrize(
    ("make", "forms", "sides"),
    [
        (soap(1000), others.SOAP, (60, 150)),
        (soap(100), others.SOAP, (60,)),
        (research(1000), others.RESEARCH, (60, 150)),
        (research(100), others.RESEARCH, (60,)),
    ],
    ids=["SOAP", "SOAP one side", "research", "research one side"],
)
def test_what_eager_optimizers_run(
    make: Callable[[Any], torch.optim.Optimizer],
    forms: dict[int, others.Eager],
    sides: tuple[int, ...],
) -> None:
    form = forms[len(sides)]
    *_, plain, due = steps_of(make(params_of((60, 150))), 6)
    assert plain.total == form.operations
    products = plain.operations["mm"] + plain.operations["addmm_"]
    assert products == form.products * len(sides)
    squares = sum(side**2 for side in sides)
    expected = form.of_size * 60 * 150 + form.of_square * squares
    assert plain.numbers == pytest.approx(expected, rel=0.05)
    assert due.total - plain.total == form.refresh_operations * len(sides)
    assert due.operations["mm"] - plain.operations["mm"] == form.refresh_products * len(sides)
    more = len(sides) * form.refresh_of_size * 60 * 150 + form.refresh_of_square * squares
    assert due.numbers - plain.numbers == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize("shape", [(60, 150), (150, 60)])
def test_what_muon_runs(shape: tuple[int, int]) -> None:
    *_, plain = steps_of(torch.optim.Muon(params_of(shape)), 3)
    p = matrix(*shape)
    work = others.muon_step(p, H100)
    assert plain.total == work.operations
    assert plain.operations["mm"] + plain.operations["addmm"] == 3 * others.MUON_STEPS
    of_size, of_square = others.MUON_HALVES
    expected = (others.MUON_FLOATS + of_size) * p.size + of_square * p.short**2
    assert plain.numbers == pytest.approx(expected, rel=1e-3)


def test_fused_adamw_by_hand() -> None:
    """Lists of 36 tensors or of 320 chunks of 65536; in bfloat16 22 bytes of each entry."""
    vectors = 100 * [matrix(65536, dtype=torch.bfloat16)]
    work = others.adamw_step(vectors, H100)
    assert work.operations == 3 + 1
    assert work.bound == pytest.approx(100 * 65536 * (16 + 6) / 3.35e12)
    assert others.adamw_step(9 * vectors, H100).operations == 25 + 1
    assert others.adamw_step([matrix(400 * 65536)], H100).operations == 2 + 1


@pytest.mark.parametrize(("rank", "period"), [(16, 2), (8, 4), (32, 1)])
def test_long_sides_are_due_when_their_rows_are_full(rank: int, period: int) -> None:
    """The counts that a run keeps, and the same on paper."""
    shape = (rank, 1024)
    optimizer = DyKAF(params_of(shape), refresh_schedule="fixed")
    steps_of(optimizer, 9)
    (state,) = optimizer.state.values()
    done = int(state["refreshes"][1])
    assert refresh.long_period(matrix(*shape)) == period
    steps_of(optimizer, 8)
    assert int(state["refreshes"][1]) - done == 8 // period


def test_refreshes_come_once_in_a_period_each() -> None:
    params = 3 * [Param((40, 60)), Param((60, 40)), Param((50, 50))]
    matrices = matrices_of(params, torch.float32)
    layouts = [layout_of(param, torch.float32) for param in params]
    found = refresh.refreshes_of(layouts, matrices, H100)
    assert found.mean.operations == pytest.approx(9 * refresh.DENSE_OPS / 50)
    assert found.most.operations == refresh.DENSE_OPS  # in a step of its own


def test_adapters_refresh_together() -> None:
    params = lora("q v")
    matrices = matrices_of(params, torch.bfloat16)
    layouts = [layout_of(param, torch.bfloat16) for param in params]
    found = refresh.refreshes_of(layouts, matrices, H100)
    # Sides of 16 by their kinds, whose batches come one in a step; three shapes' long sides, 64 or
    # fewer at a time, in every other step.
    long = 3 * (refresh.LONG_OPS + refresh.LONG_STACKS)
    short = refresh.DENSE_OPS + refresh.DENSE_STACKS
    assert found.most.operations == long + short
    assert found.mean.operations == pytest.approx(long / 2 + 3 * short / 50)


def small_step() -> times.Step:
    params = [Param((768, 2304)), Param((2304, 768)), Param((768,))]
    return times.step_of(Model("small", params, torch.float32))


def test_counts_of_a_step_by_hand() -> None:
    """Two groups, each with two kernels for max|G| and a copy, a pass each with a copy."""
    step = small_step()
    assert (step.num_passes, step.copies) == (2, 4)
    plan = sum(len(launches_of(group)) for group in step.groups)
    assert step.kernels() == plan + 4
    assert step.operations == 7 + 2 * 12
    host = 2 * HOST_MATRIX.value + (step.kernels() + 4) * LAUNCH.value + step.operations * 5e-6
    assert step.host() == pytest.approx(host + HOST_VECTOR.value)


def test_the_slower_of_host_and_device_sets_the_pace() -> None:
    assert times.Times(bound=1.0, likely=2.0, host=3.0).estimate == 3.0
    assert times.Times(bound=1.0, likely=2.0, host=0.5).estimate == 2.0


def test_bounds_and_estimates_are_ordered() -> None:
    step = small_step()
    for device in DEVICES.values():
        rows = {q: dict(times.rows_of(step, device, q)) for q in PRECISIONS}
        for row in rows.values():
            assert all(
                t.bound <= t.likely <= t.estimate and t.estimate >= t.host for t in row.values()
            )
            plain, mean, most = (
                row[k] for k in ("a plain step", "mean with refreshes", "slowest step")
            )
            assert plain.bound < mean.bound < most.bound
        bound = [rows[q]["a plain step"].bound for q in PRECISIONS]
        assert bound == sorted(bound, reverse=True)


def test_large_sides_go_to_cublas_by_the_packages_rules() -> None:
    (step,) = (times.step_of(make()) for make in PRICED if make().name.startswith("Llama-3-8B, bf"))
    for precision in PRECISIONS:
        default, kernels, wgmma = (
            times.plain_times(step, H100, precision, how).likely
            for how in ("default", "kernels", "wgmma")
        )
        # Of the 160 matrices with sides of 4096 two rotations and three products of Newton-Schulz.
        assert step.library_calls(90, precision) == (precision != "highest") * 160 * 5
        if precision == "highest":
            assert default == kernels == wgmma
        else:
            assert wgmma < default < 0.75 * kernels
        assert step.library_calls(80, precision) == 0
    default, kernels = (
        times.plain_times(step, A100, "high", how) for how in ("default", "kernels")
    )
    assert default == kernels


def test_a_product_by_the_library_by_hand() -> None:
    """Out of a basis: the update is stored, and read again by the parameter's kernel; into it: so
    is the gradient by Adam's, which reads and writes both moments and writes the update."""
    array = 4 * 4096**2
    launches = {x.site: x for x in launches_of([matrix(4096, 4096)], lambda _: True)}
    for site, after, rest in (("out left", "apply", 2), ("into left", "adam", 5)):
        product, kernel = launches[site], launches[f"{site} {after}"]
        assert (product.bytes, kernel.bytes) == (3 * array, (1 + rest) * array)
        assert product.by_library and not kernel.by_library
    assert launches["2 product quintic"].bytes == 3 * array  # X, B X, the next X
    assert not launches["1 gram wide"].by_library and not launches["1 square"].by_library
    product = launches["out left"]
    for precision in ("high", "medium"):
        found = product.seconds(H100, precision, reached=True)
        assert found == pytest.approx(2 * 4096**3 / 402.15e12)
    for precision, peak in (("high", 494.7e12), ("medium", 989.4e12)):
        bound = product.seconds(H100, precision, reached=False)
        assert bound == pytest.approx(2 * 4096**3 / peak)


def test_the_state_is_what_the_optimizer_keeps() -> None:
    shapes = [(40, 60), (60, 40), (16, 1024), (30,)]
    optimizer = DyKAF(params_of(*shapes))
    steps_of(optimizer, 1)
    matrices = matrices_of([Param(shape) for shape in shapes], torch.float32)
    assert sum(p.state_bytes for p in matrices) == optimizer.state_bytes()["total"]


def test_what_fits_on_the_card() -> None:
    table = bounds.memory_table([times.step_of(make()) for make in PRICED])
    verdicts = {row[0].split(",")[0] + row[0][-14:]: row[-1] for row in table[1:]}
    assert list(verdicts.values()) == ["fits", "does not fit", "fits", "fits"]
    llama = next(row for row in table if row[0].startswith("Llama-3-8B, bf"))
    weights, grads, state = map(float, llama[1:4])
    assert weights == grads == pytest.approx(2 * 8.030261248, abs=0.01)
    # Two moments of float32, L and Q_L of each matrix: 160 of 4096 and 64 of 1024.
    floats = 2 * 8.030261248e9 + 2 * (160 * 4096**2 + 64 * 1024**2)
    assert state == pytest.approx(4e-9 * floats, abs=0.01)
