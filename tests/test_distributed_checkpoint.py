"""The helpers of torch.distributed.checkpoint, in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import params_of, run, trajectory
from torch import nn

import dykaf

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
helpers = pytest.importorskip("torch.distributed.checkpoint.state_dict")

# torch does not load what is both full and flat, of its own optimizers either.
OPTIONS: dict[str, dict[str, bool]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def _optimizer(model: nn.Module, grouped: bool, **options: Any) -> dykaf.DyKAF:
    params = dykaf.param_groups(model) if grouped else model.parameters()
    return dykaf.DyKAF(params, lr=0.01, precondition_frequency=3, **options)


def _trained(grouped: bool) -> tuple[nn.Module, dykaf.DyKAF]:
    """With two skipped steps."""
    model = _model(0)
    optimizer = _optimizer(model, grouped, seed=3)
    run(optimizer, range(5))
    params_of(optimizer)[1].grad.fill_(float("nan"))
    for _ in range(2):
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _assert_continues(
    model: nn.Module, optimizer: dykaf.DyKAF, other_model: nn.Module, other: dykaf.DyKAF
) -> None:
    other_model.load_state_dict(model.state_dict())
    assert other.skipped_steps == optimizer.skipped_steps == 2
    assert other.param_groups[0]["seed"] == 3
    assert trajectory(other) == trajectory(optimizer)
    for each in (optimizer, other):
        run(each, range(5, 12))
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("form", OPTIONS)
def test_a_run_goes_on_bit_for_bit(form: str, grouped: bool) -> None:
    """With all state, the options and the count of skipped steps."""
    options = helpers.StateDictOptions(**OPTIONS[form])
    model, optimizer = _trained(grouped)
    saved = helpers.get_optimizer_state_dict(model, optimizer, options=options)
    other_model = _model(1)
    other = _optimizer(other_model, grouped)
    helpers.set_optimizer_state_dict(other_model, other, saved, options=options)
    _assert_continues(model, optimizer, other_model, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["nested", "flat"])
def test_a_run_goes_on_from_its_files(form: str, tmp_path: Path) -> None:
    options = helpers.StateDictOptions(**OPTIONS[form])
    model, optimizer = _trained(True)
    saved = helpers.get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path)
    other_model = _model(1)
    other = _optimizer(other_model, True)
    found = {"optimizer": helpers.get_optimizer_state_dict(other_model, other, options=options)}
    checkpoint.load(found, checkpoint_id=tmp_path)
    helpers.set_optimizer_state_dict(other_model, other, found["optimizer"], options=options)
    _assert_continues(model, optimizer, other_model, other)
