"""A shard's elements are those of the whole matrix, and a matrix is the same in any company."""

from __future__ import annotations

import backends
import pytest
import torch
from torch import Tensor, nn

import dykaf
from dykaf import ops
from dykaf.distributed.cut import Box, Cut, copies, cut_by_rows, place_of
from dykaf.options import step_options

BOXES = {
    "first rows": ((14, 9), (0, 0), (5, 9)),
    "later rows": ((14, 9), (5, 0), (4, 9)),
    "columns": ((14, 9), (0, 2), (14, 3)),
    "a rectangle": ((14, 9), (3, 4), (7, 5)),
    "a row": ((14, 9), (6, 1), (1, 5)),
    "a column": ((14, 9), (0, 8), (14, 1)),
    "all": ((14, 9), (0, 0), (14, 9)),
    "a vector's end": ((23,), (20,), (3,)),
    "channels": ((5, 6, 2, 3), (0, 1, 0, 0), (5, 4, 2, 3)),
    "rows and channels": ((5, 6, 2, 3), (1, 1, 0, 0), (2, 4, 2, 3)),
    "one row of the last": ((5, 6, 2, 3), (2, 0, 0, 1), (1, 1, 2, 2)),
}


def updated(param: Tensor, update: Tensor, place: ops.Place) -> Tensor:
    """One update from step 7 on, of stream 3."""
    group = dykaf.DyKAF([nn.Parameter(torch.ones(2, 2))], lr=0.1, seed=5).param_groups[0]
    state = {"step": torch.tensor(7.0, device=param.device)}
    param = param.clone()
    ops.apply_update_([param], [update.contiguous()], [state], [3], step_options(group), [place])
    return param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BOXES)
def test_a_shard_rounds_as_the_whole_does(name: str, dtype: torch.dtype) -> None:
    shape, start, size = BOXES[name]
    box = Box(start, size)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=generator).to(dtype).to(backends.device())
    update = torch.randn(shape, generator=generator).to(backends.device())
    expected = box.within(updated(whole, update, (0, 0, 0)))
    part = box.within(whole).contiguous()
    actual = updated(part, box.within(update), place_of("w", shape, box))
    assert torch.equal(actual.view(torch.int16), expected.contiguous().view(torch.int16))
    if start != (0,) * len(start) and box.numel > 4:  # bits of no other place
        elsewhere = updated(part, box.within(update), (0, 0, 0))
        assert not torch.equal(actual.view(torch.int16), elsewhere.view(torch.int16))


def test_a_shard_that_is_cut_too_often() -> None:
    with pytest.raises(ValueError, match=r"^w: expected shards that are cut in at most two dim"):
        place_of("w", (4, 4, 4), Box((0, 1, 1), (4, 2, 2)))


def test_places_count_the_elements() -> None:
    """Against the numbers of the elements themselves."""
    for shape, start, size in BOXES.values():
        box = Box(start, size)
        first, run, stride = place_of("w", shape, box)
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        expected = box.within(numbers).flatten()
        i = torch.arange(box.numel)
        actual = first + (i if run == 0 else i // run * stride + i % run)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_parts_make_up_each_matrix_once(num_ranks: int) -> None:
    """Of a stack cut by rows, of one cut across its matrices, and of copies."""
    columns = tuple(
        Box((0, min(5, 2 * rank), 0), (3, max(0, min(2, 5 - 2 * rank)), 4))
        for rank in range(num_ranks)
    )
    cuts = [cut_by_rows((3, 5, 4), 1, num_ranks), copies((3, 5, 4), 1, num_ranks)]
    cuts += [Cut((3, 5, 4), 1, columns)] if num_ranks > 2 else []
    numbers = torch.arange(60).view(3, 5, 4)
    for cut in cuts:
        for matrix in range(3):
            seen = torch.zeros(5, 4, dtype=torch.int64)
            for box, holders in cut.holders(matrix).items():
                box.within(seen).add_(1)
                for rank in holders:
                    local = cut.boxes[rank].within(numbers)
                    part = cut.local_part(local, rank, matrix)
                    assert torch.equal(part, box.within(numbers[matrix]))
            assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(700, 300), (256, 256), (300, 1100), (40, 2000), (8, 4000)])
def test_a_matrix_is_the_same_bits_in_any_company(shape: tuple[int, int]) -> None:
    """With two threads: alone, beside equals that could go side by side, beside a large one."""
    if backends.is_gpu():
        pytest.skip("of the CPU backend, which has threads")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [trained(shape, company) for company in ([], [shape] * 2, [(1200, 1200)])]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def trained(shape: tuple[int, int], company: list[tuple[int, int]]) -> Tensor:
    params = [nn.Parameter(torch.ones(some)) for some in [shape, *company]]
    optimizer = dykaf.DyKAF(params, precondition_frequency=1)
    for step in range(4):
        for place, param in enumerate(params):
            generator = torch.Generator().manual_seed(10 * place + step)
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return params[0].detach()
