"""torchtitan's optimizers, schedule and checkpoints, on its Llama 3.

Its Trainer needs a GPU, and its models triton: where they are not there, nothing here runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks, started
from runs import assert_equal, groups_of, weights
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import dykaf

pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)

from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.models.llama3 import model_registry

from dykaf.integrations.torchtitan import DyKAFContainer

LR, WEIGHT_DECAY, STEPS = 0.01, 0.1, 6
OPTIONS = {"lr": LR, "weight_decay": WEIGHT_DECAY}


def llama() -> nn.Module:
    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:1]
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model


def gradient(param: Tensor, step: int, idx: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + idx)
    full = torch.randn(param.shape, generator=generator)
    if hasattr(param, "device_mesh"):
        return distribute_tensor(full, param.device_mesh, param.placements)
    return full


def make(model: nn.Module) -> tuple[Any, Any]:
    optimizers = DyKAFContainer.Config(options=OPTIONS).build(model_parts=[model])
    config = LRSchedulersContainer.Config(warmup_steps=3)
    return optimizers, config.build(optimizers=optimizers, training_steps=STEPS)


def train(model: nn.Module, optimizers: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        for idx, param in enumerate(model.parameters()):
            param.grad = gradient(param, step, idx)
        optimizers.step()
        schedule.step()
        optimizers.zero_grad()


def by_hand() -> nn.Module:
    """Rates rise over three steps, and fall as torchtitan's do, by a quarter each then."""
    model = llama()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), **OPTIONS)
    for step, share in enumerate([1 / 3, 2 / 3, 1.0, 1.0, 1 - 1 / 3, 1 - 2 / 3]):
        for group, ratio in zip(optimizer.param_groups, (1.0, 2.0, 2.0), strict=True):
            group["lr"] = LR * ratio * share
        for idx, param in enumerate(model.parameters()):
            param.grad = gradient(param, step, idx)
        optimizer.step()
    return model


def test_equals_a_loop_by_hand() -> None:
    model = llama()
    optimizers, schedule = make(model)
    [optimizer] = optimizers
    keys = ("lr", "weight_decay", "max_precond_dim")
    assert groups_of(optimizer, *keys[1:]) == groups_of(
        dykaf.DyKAF(dykaf.param_groups(model), **OPTIONS), *keys[1:]
    )
    assert set(optimizer.param_groups[1]["param_names"]) == {
        "tok_embeddings.weight",
        "lm_head.weight",
    }
    train(model, optimizers, schedule, range(STEPS))
    assert_equal(weights(model), weights(by_hand()))


def test_names_are_those_of_the_model_without_wrappers() -> None:
    model = llama()
    names = set(weights(model))
    model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    assert set(weights(model)) != names
    [optimizer] = DyKAFContainer.Config(options=OPTIONS).build(model_parts=[model])
    found = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(found) == sorted(names)


def sharded_part(folder: str, steps: range, is_resumed: bool) -> dict[str, Tensor]:
    """A part of a run on all ranks, from the checkpoint of the one before and to its own."""
    model = llama()
    fully_shard(model)
    optimizers, schedule = make(model)
    everything = {"model": model, "optimizer": optimizers, "lr_scheduler": schedule}
    if is_resumed:
        dcp.load(everything, checkpoint_id=folder)
    train(model, optimizers, schedule, steps)
    dcp.save(everything, checkpoint_id=f"{folder}-{steps.stop}" if is_resumed else folder)
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield from started()


def test_sharded_run_goes_on_from_its_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    ranks.run(sharded_part, folder, range(3), False)
    expected = weights(by_hand())
    for world in (2, 1):
        for found in ranks.run(sharded_part, folder, range(3, STEPS), True, world=world):
            assert_equal(found, expected)
