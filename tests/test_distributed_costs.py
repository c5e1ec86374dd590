"""python -m bench.distributed_costs: its counts by hand, and beside what ranks really exchange."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from bench import distributed_costs as costs
from bench.distributed_models import CASES, MODELS, Case, Param
from ranks import Ranks
from sharded_models import sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import dykaf

DOCS = Path(__file__).parent.parent / "docs"
FSDP_2 = Case("", "", (1, 2, 1))


def by_hand(number_of_4x6: int, case: Case) -> costs.Costs:
    return costs.count(case, [Param((4, 6))] * number_of_4x6)


def test_two_matrices_on_two_ranks_by_rows() -> None:
    """Each rank owns one, has half of both: half a matrix of gradients and of updates each way."""
    counted = by_hand(2, FSDP_2)
    assert counted.owners == [0, 1]
    assert counted.traffic.sent == {(0, "grads"): [48, 48], (0, "updates"): [52, 52]}
    assert counted.traffic.received == counted.traffic.sent
    assert counted.traffic.slowest == 48 + 52
    assert counted.collectives == 3
    assert counted.gathered == 2 * 48
    # Two moments of 24 numbers, L and Q_L of 16; step, update_rms, rho (float64), and int64 next_
    # refresh, refreshes, schedule_step, refresh_fallbacks.
    assert counted.state == [4 * (2 * 24 + 2 * 16) + 4 + 4 + 16 + 16 + 16 + 8 + 8] * 2
    assert counted.adamw_state == [8 * 24] * 2


def test_the_work_of_two_matrices_by_hand() -> None:
    """The elements, in and out of a basis and its factor, three Newton-Schulz steps; refreshes."""
    counted = by_hand(2, FSDP_2)
    step = 24 + 4 * 4 * 24 + 3 * (2 * 4 * 4 * 6 + 4**3)
    refresh = 6 * 4**3 + 4 * 4 * 6
    assert counted.mean == step + refresh / 50
    assert counted.busiest == step + 2 * refresh / 50  # in two slots of 50, of a rank each
    assert counted.peak == step + refresh
    assert counted.largest == (step + refresh / 50, 4, 6)
    assert not costs.is_limit(counted)
    assert costs.milliseconds(counted.peak) == pytest.approx(1e3 * 2 * (step + refresh) / 150e12)


def test_one_matrix_more_ranks_than_work() -> None:
    counted = by_hand(1, Case("GPT", "FSDP", (1, 4, 1)))
    assert counted.largest[0] == 4 * counted.mean
    (line,) = costs.limit_lines([counted])
    assert "GPT, 4 ranks (FSDP): a 4 x 6 matrix alone takes 4.0 times" in line
    assert "faster than 1 with even loads would. 4 blocks" in line
    assert "4 x 4 numbers" in line


def test_a_replicated_shard_is_sent_once_and_its_update_in_chunks() -> None:
    """Ranks 0 and 2 have the upper rows, 1 and 3 the lower ones; rank 0 owns the matrix.

    A chunk is half of a part: 6 numbers and the step, 28 bytes.
    """
    counted = by_hand(1, Case("", "", (2, 2, 1)))
    assert counted.owners == [0]
    assert counted.traffic.sent == {
        (0, "grads"): [0, 48, 0, 0],
        (0, "updates"): [84, 0, 0, 0],
        (0, "copies"): [28, 28, 28, 28],
    }
    assert counted.traffic.received == {
        (0, "grads"): [48, 0, 0, 0],
        (0, "updates"): [0, 28, 28, 28],
        (0, "copies"): [28, 28, 28, 28],
    }
    assert counted.traffic.sent_by_rank == [112, 76, 28, 28]
    assert counted.traffic.slowest == 48 + 84 + 28
    assert counted.gathered == 48
    assert counted.adamw_state == [8 * 12] * 4


def test_experts_stay() -> None:
    counted = costs.count(FSDP_2, [Param((4, 4, 6), num_batch=1)])
    assert counted.owners == [0, 0, 1, 1]
    assert counted.traffic.sent == {}
    assert counted.collectives == 1
    assert counted.gathered == 2 * 4 * 24


def test_bfloat16_gradients_and_float32_updates() -> None:
    counted = by_hand(2, FSDP_2._replace(dtype=torch.bfloat16))
    assert counted.traffic.sent == {(0, "grads"): [24, 24], (0, "updates"): [52, 52]}


def test_buckets_are_full_after_32_mib_of_an_owner() -> None:
    """Of three matrices of 16 MiB the third is in the next bucket."""
    counted = costs.count(FSDP_2, [Param((2048, 2048))] * 6)
    assert sorted(counted.owners) == [0, 0, 0, 1, 1, 1]
    assert {bucket for bucket, _ in counted.traffic.sent} == {0, 1}
    assert counted.collectives == 5
    assert counted.traffic.sent[0, "grads"] == [2 * 2**23] * 2
    assert counted.traffic.sent[1, "updates"] == [2**23 + 4] * 2


def test_experts_that_stay_fill_no_bucket() -> None:
    stack, matrices = Param((2, 2048, 2048), num_batch=1), [Param((2048, 2048))] * 4
    counted = costs.count(FSDP_2, [stack, *matrices])
    assert sorted(counted.owners) == [0, 0, 0, 1, 1, 1]
    assert counted.collectives == 3


@pytest.mark.parametrize(
    ("model", "number"),
    [
        ("GPT-2 small", 124_439_808),
        ("Llama-3-8B", 8_030_261_248),
        ("Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_models_have_their_published_numbers_of_parameters(model: str, number: int) -> None:
    assert sum(math.prod(param.shape) for param in MODELS[model]()) == number


PARAMS = [
    *(Param(s, tensor_dim=1) for s in ((12, 20), (20, 12), (33, 17), (3, 5), (2, 80), (90, 4))),
    Param((6, 8, 10), num_batch=1, tensor_dim=1),
    *(Param(s, is_adamw=True, tensor_dim=t) for s, t in (((50, 6), 1), ((7,), None))),
]
MESHES = {"group": (4, 1, 1), "rows": (1, 4, 1), "hsdp": (2, 2, 1), "tensor": (1, 2, 2)}


def really_exchanged(mesh: tuple[int, int, int]) -> tuple[dict[str, int], int, str]:
    """What a rank sends in a step, by collective, its bytes of state and what the plan says."""
    params, device_mesh = [], init_device_mesh("cpu", mesh)
    is_plain = mesh[1:] == (1, 1)
    for param in PARAMS:
        whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
        tensor = Replicate() if param.tensor_dim is None else Shard(param.tensor_dim)
        placed = whole if is_plain else sharded(whole, device_mesh, [Replicate(), Shard(0), tensor])
        params.append(nn.Parameter(placed))
        params[-1].grad = params[-1].detach().clone()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for param, tensor in zip(PARAMS, params, strict=True):
        group = groups.setdefault((param.num_batch, param.is_adamw), {"params": []})
        group["params"].append(tensor)
        group["batch_dims"] = param.num_batch
        group.update({"max_precond_dim": 0} if param.is_adamw else {})
    optimizer = dykaf.DyKAF(
        list(groups.values()), process_group=dist.group.WORLD if is_plain else None
    )
    optimizer.step()
    sent: Counter[str] = Counter()
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def counted(out: Any, data: Any, out_sizes: Any, sizes: Any, **more: Any) -> Any:
        assert sizes[dist.get_rank()] == 0
        sent[f"all-to-all {sum('all-to' in key for key in sent)}"] = data.nbytes
        return exchange(out, data, out_sizes, sizes, **more)

    def counted_reduce(*args: Any, **more: Any) -> Any:
        sent[f"all-reduce {sum('reduce' in key for key in sent)}"] = 0
        return reduce(*args, **more)

    with (
        mock.patch.object(dist, "all_to_all_single", counted),
        mock.patch.object(dist, "all_reduce", counted_reduce),
    ):
        optimizer.step()
    return dict(sent), optimizer.state_bytes()["total"], dykaf.describe_plan(optimizer)


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


PHASES = ("grads", "updates", "copies")


@pytest.mark.parametrize("layout", MESHES)
def test_the_counts_are_what_ranks_exchange(together: Ranks, layout: str) -> None:
    found = together.run(really_exchanged, MESHES[layout], world=4)
    counted = costs.count(Case("", "", MESHES[layout]), PARAMS)
    for rank, (sent, state, plan) in enumerate(found):
        assert len(sent) == counted.collectives
        in_turn = sorted(counted.traffic.sent, key=lambda key: (key[0], PHASES.index(key[1])))
        expected = [counted.traffic.sent[key][rank] for key in in_turn]
        assert [sent[key] for key in sorted(sent) if "all-to" in key] == expected
        assert state == counted.state[rank]
        assert f"computes {counted.busiest / counted.mean:.2f} times the mean in a step" in plan
        assert f"{counted.peak / counted.mean:.2f} in the slowest one" in plan


@pytest.mark.parametrize("case", [case for case in CASES if case.num_ranks < 1000], ids=str)
def test_what_is_sent_is_received_and_all_of_it(case: Case) -> None:
    """Every element's gradient goes to its owner once, its update to all that hold it."""
    params = MODELS[case.model]()
    counted = costs.count(case, params)
    total = Counter[str]()
    for (bucket, phase), sizes in counted.traffic.sent.items():
        assert sum(sizes) == sum(counted.traffic.received[bucket, phase])
        total[phase] += sum(sizes)
    travelling = [p for p in params if case.is_plain or not (p.is_adamw or p.num_batch)]
    numel = sum(math.prod(param.shape) for param in travelling)
    num_copies = case.mesh[0]
    # Only the owner's own part stays: of a matrix one part in this number.
    parts = case.num_ranks // num_copies
    expected = {"grads": case.dtype.itemsize * numel * (parts - 1) // parts}
    # All chunks but the owner's, then each to the other copies; a number before each.
    expected["updates"] = 4 * numel * (case.num_ranks - 1) // case.num_ranks
    expected["updates"] += 4 * len(travelling) * (case.num_ranks - 1)
    chunks = 4 * numel + 4 * len(travelling) * case.num_ranks
    expected["copies"] = (num_copies - 1) * chunks
    assert +total == +Counter(expected)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_the_document_has_the_table_as_printed(case: Case) -> None:
    *_, row = costs.lines([costs.count(case, MODELS[case.model]())], with_padding=False)
    texts = [path.read_text() for path in DOCS.glob("distributed*.md")]
    assert any(row in text for text in texts), row
