"""Models that torch shards, trained; one process with the same gradients gets the same bits.

Gradients themselves differ between shardings by the order of their sums, which is torch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_models import OPTIONS, skip_without_fsdp, whole_of
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import dykaf

NUM_STEPS = 8


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


class Experts(nn.Module):
    """A stack of matrices, all of them used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dim, dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return torch.einsum("bd,edf->bf", x, whole)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + hidden


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.experts = Experts(6)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x + self.experts(x))
        return logits


def shard(net: Net, mode: str) -> nn.Module:
    """As a training script would."""
    world = dist.get_world_size()
    if mode in ("ddp", "ddp-sharded"):
        return DistributedDataParallel(net)
    if mode == "replicate":
        return replicate(net)
    if mode == "experts":
        mesh = init_device_mesh("cpu", (world,))
        stack = distribute_tensor(net.experts.weight.detach(), mesh, [Shard(0)])
        net.experts.weight = nn.Parameter(stack)
        replicate(net, ignored_modules=[net.experts])
        return net
    shape = (2, world // 2) if mode in ("hsdp", "fsdp-tp") else (world,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if mode in ("tp", "fsdp-tp"):
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in net.blocks:
            parallelize_module(block, mesh["b"] if mode == "fsdp-tp" else mesh, plan)
        if mode == "tp":
            return net
        mesh = mesh["a"]
    policies: dict[str, Any] = {}
    if mode == "offload":
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if mode == "mixed precision":
        policies["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **policies)
    return fully_shard(net, mesh=mesh, **policies)


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    params = dict(net.named_parameters())
    stacks = [name for name in params if "experts" in name]
    others = [name for name in params if name not in stacks]
    return [
        {"params": [(name, params[name]) for name in others]},
        {"params": [(name, params[name]) for name in stacks], "batch_dims": 1},
    ]


class Pair:
    """A sharded model and one of one process that gets its gradients."""

    def __init__(self, mode: str, how: str = "") -> None:
        self.how = how
        self.alone = Net()
        net = Net()
        options = dict(OPTIONS)
        if mode == "ddp-sharded":
            options["process_group"] = dist.group.WORLD
        if how == "swapped":
            # accelerate makes the optimizer first, and puts the sharded parameters in by name.
            self.optimizer = dykaf.DyKAF(groups_of(net), **options)
            places = {id(p): name for name, p in net.named_parameters()}
            self.model = shard(net, mode)
            new = dict(net.named_parameters())
            for group in self.optimizer.param_groups:
                group["params"] = [new[places[id(p)]] for p in group["params"]]
        else:
            self.model = shard(net, mode)
            self.optimizer = dykaf.DyKAF(groups_of(net), **options)
        self.other = dykaf.DyKAF(groups_of(self.alone), **OPTIONS)
        self.net = net
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

    def backward(self, step: int, micro: int = 0) -> None:
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
        tokens = torch.randint(11, (7,), generator=generator)
        loss = nn.functional.cross_entropy(self.model(tokens).float(), tokens.roll(1))
        (self.scaler.scale(loss) if self.how == "scaler" else loss).backward()

    def gradients(self, step: int) -> None:
        self.optimizer.zero_grad()
        if self.how == "accumulation":
            with self.without_sync():
                self.backward(step)
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(True)
        self.backward(step, 1)

    def without_sync(self) -> Any:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        self.model.set_requires_gradient_sync(False)  # type: ignore[operator]
        return contextlib.nullcontext()

    def step(self, step: int) -> None:
        self.gradients(step)
        if self.how == "clipping":
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)
            assert whole_of(norm) > 0.05
        scale = self.scaler.get_scale() if self.how == "scaler" else 1.0
        if self.how == "scaler":
            self.scaler.unscale_(self.optimizer)
            scale = 1.0
        for ours, other in zip(self.net.parameters(), self.alone.parameters(), strict=True):
            assert ours.grad is not None
            other.grad = whole_of(ours.grad).clone() / scale
        if self.how == "scaler":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.other.step()

    def differing(self) -> list[str]:
        pairs = zip(self.net.named_parameters(), self.alone.parameters(), strict=True)
        return [
            name
            for (name, ours), other in pairs
            if not torch.equal(whole_of(ours.detach()), other.detach())
        ]


def train(mode: str, how: str) -> list[str]:
    pair = Pair(mode, how)
    before = [param.detach().clone() for param in pair.alone.parameters()]
    for step in range(NUM_STEPS):
        pair.step(step)
    changed = zip(pair.alone.parameters(), before, strict=True)
    assert all(not torch.equal(param, start) for param, start in changed)
    return pair.differing()


MODES = ["ddp", "ddp-sharded", "fsdp", "hsdp", "tp", "fsdp-tp", "experts", "offload"]


@pytest.mark.parametrize("mode", [*MODES, "mixed precision"])
def test_each_mode(together: Ranks, mode: str) -> None:
    skip_without_fsdp(mode)
    world = 4 if mode in ("hsdp", "fsdp-tp") else 2
    assert together.run(train, mode, "", world=world) == [[]] * world


@pytest.mark.parametrize("how", ["accumulation", "clipping", "scaler", "swapped"])
@pytest.mark.parametrize("mode", ["ddp-sharded", "fsdp"])
def test_what_training_scripts_do(together: Ranks, mode: str, how: str) -> None:
    skip_without_fsdp(mode)
    if (mode, how) == ("ddp-sharded", "swapped"):
        pytest.skip("DistributedDataParallel keeps the parameters")
    assert together.run(train, mode, how, world=2) == [[], []]


def scaled_overflow() -> tuple[int, bool]:
    """A loss that overflows on one rank alone."""
    pair = Pair("fsdp", "scaler")
    pair.step(0)
    before = [whole_of(param.detach()).clone() for param in pair.net.parameters()]
    pair.gradients(1)
    if dist.get_rank() == 1:
        grad = next(pair.net.parameters()).grad
        assert isinstance(grad, DTensor)
        grad.to_local().fill_(float("inf"))
    scale = pair.scaler.get_scale()
    pair.scaler.step(pair.optimizer)
    pair.scaler.update()
    same = all(
        torch.equal(whole_of(param.detach()), start)
        for param, start in zip(pair.net.parameters(), before, strict=True)
    )
    return int(scale / pair.scaler.get_scale()), same


def test_an_overflow_on_one_rank(together: Ranks) -> None:
    skip_without_fsdp("fsdp")
    assert together.run(scaled_overflow, world=2) == [(2, True)] * 2


def collectives(mode: str, copies: int) -> dict[str, int]:
    """Of a step, of `copies` times as many parameters."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    shapes = [(6, 4), (5,), (4, 8), (3, 9)] * copies
    whole = [torch.randn(shape) for shape in shapes]
    placed = [distribute_tensor(w, mesh, [Shard(0)]) if mode == "fsdp" else w for w in whole]
    params = [nn.Parameter(p) for p in placed]
    group = dist.group.WORLD if mode == "ddp-sharded" else None
    optimizer = dykaf.DyKAF(params, process_group=group)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        counter = CommDebugMode()
        with counter:
            optimizer.step()
    return {str(name): num for name, num in counter.get_comm_counts().items()}


@pytest.mark.parametrize(("mode", "expected"), [("fsdp", 2), ("ddp-sharded", 2), ("ddp", 0)])
def test_collectives_do_not_grow_with_parameters(together: Ranks, mode: str, expected: int) -> None:
    """Two exchanges of the one bucket (gradients and updates; where all have the gradients chunks
    of updates and copies of these), and a reduction of flags."""
    for copies in (1, 5):
        for found in together.run(collectives, mode, copies, world=3):
            num_reduces = sum(n for name, n in found.items() if "allreduce" in name)
            num_swaps = sum(n for name, n in found.items() if "alltoall" in name)
            assert (num_swaps, num_reduces) == (expected, min(expected, 1)), found
