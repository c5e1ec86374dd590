"""Saved on some ranks, loaded on others: the run goes on as if nothing had been."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_models import Model, differing, whole_of
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

NUMBERS = ("step", "update_rms", "rho", "rows", "flat", "next_refresh", "refreshes")
NUMBERS += ("schedule_step", "refresh_fallbacks", "exp_avg_sq_scale")
SAVED, END = 12, 19
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "both": {"sides": "both", "orthogonalize": 0},
    "master": {"dtype": torch.bfloat16, "low_precision": "master"},
    "stochastic": {"dtype": torch.bfloat16},
    "rank_one": {"second_moment": "rank_one", "state_dtype": "bfloat16"},
    "fismo": {"fismo": True},
}


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


class Module(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.params = nn.ParameterList(model.params)


def made(layout: str, options: dict[str, Any]) -> tuple[Model, Module]:
    model = Model(layout, **options)
    if layout == "group":
        model.optimizer.consolidate_state_dict(to=None)
    return model, Module(model)


def train_and_save(layout: str, options: dict[str, Any], flags: dict[str, Any], path: str) -> None:
    model, module = made(layout, options)
    model.train(0, SAVED)
    states = get_state_dict(module, model.optimizer, options=StateDictOptions(**flags))
    checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)


def load_and_train(
    layout: str, options: dict[str, Any], flags: dict[str, Any], path: str
) -> list[int]:
    model, module = made(layout, options)
    given = StateDictOptions(**flags)
    states = get_state_dict(module, model.optimizer, options=given)
    saved = {"model": states[0], "optimizer": states[1]}
    checkpoint.load(saved, checkpoint_id=path)
    set_state_dict(
        module,
        model.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=given,
    )
    model.train(SAVED, END)
    alone = Model("", **options)
    alone.train(0, END)
    return differing(model.wholes(), alone.wholes())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("rows", 2), ("rows", 3)),
        (("rows", 3), ("columns", 2)),
        (("rows and columns", 4), ("", 1)),
        (("", 1), ("hsdp", 4)),
        (("group", 2), ("rows", 3)),
        (("hsdp", 4), ("group", 2)),
    ],
)
def test_on_other_ranks(
    together: Ranks, tmp_path: Path, before: Any, after: Any, flat: bool
) -> None:
    flags = {"flatten_optimizer_state_dict": flat}
    arguments = ({}, flags, str(tmp_path))
    together.run(train_and_save, before[0], *arguments, world=before[1])
    found = together.run(load_and_train, after[0], *arguments, world=after[1])
    assert found == [[]] * after[1]


@pytest.mark.parametrize("form", FORMS)
def test_each_form(together: Ranks, tmp_path: Path, form: str) -> None:
    arguments = (FORMS[form], {}, str(tmp_path))
    together.run(train_and_save, "rows", *arguments, world=3)
    assert together.run(load_and_train, "rows and columns", *arguments, world=4) == [[]] * 4


def full_and_broadcast(layout: str, cpu_offload: bool) -> list[int]:
    model, module = made(layout, {})
    model.train(0, SAVED)
    flags = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    states = get_optimizer_state_dict(module, model.optimizer, options=flags)
    other, other_module = made(layout, {})
    with torch.no_grad():
        for param, value in zip(other.params, model.params, strict=True):
            param.copy_(value)
    set_optimizer_state_dict(
        other_module,
        other.optimizer,
        states if dist.get_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    model.train(SAVED, END)
    other.train(SAVED, END)
    return differing(other.wholes(), model.wholes())


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("layout", ["rows", "rows and columns"])
def test_in_full_from_one_rank(together: Ranks, layout: str, cpu_offload: bool) -> None:
    assert together.run(full_and_broadcast, layout, cpu_offload, world=4) == [[]] * 4


def saved_states(layout: str) -> list[str]:
    """What differs between the saved state and that of one process."""
    model, alone = Model(layout), Model("")
    model.train(0, SAVED)
    alone.train(0, SAVED)
    found = []
    expected = alone.optimizer.state_dict()["state"]
    if layout == "group":
        model.optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() > 0:
            with pytest.raises(RuntimeError, match="consolidate_state_dict"):
                model.optimizer.state_dict()
            return []
    saved = model.optimizer.state_dict()["state"]
    assert list(saved) == sorted(expected)
    for place, state in expected.items():
        if list(saved[place]) != list(state):
            found.append(f"{place}: {list(saved[place])}")
            continue
        for key, value in state.items():
            ours = saved[place][key]
            # A shard's own root mean square, where there is no owner to know that of all.
            is_of_shard = key == "update_rms" and "rho" not in state
            if not is_of_shard and not torch.equal(whole_of(ours), value):
                found.append(f"{place} {key}")
            if isinstance(ours, DTensor) != (layout != "group" and key not in NUMBERS):
                found.append(f"{place} {key}: {type(ours)}")
    return found


@pytest.mark.parametrize("layout", ["group", "rows", "rows and columns", "hsdp"])
def test_what_is_saved_is_what_one_process_saves(together: Ranks, layout: str) -> None:
    assert together.run(saved_states, layout, world=4) == [[]] * 4


def plain_into(layout: str, path: str) -> list[int]:
    """A file that one process saved, read on every rank, and one that the ranks save for it."""
    alone = Model("")
    alone.train(0, SAVED)
    file = Path(path) / f"plain-{dist.get_rank()}.pt"
    torch.save(alone.optimizer.state_dict(), file)
    model = Model(layout)
    with torch.no_grad():
        for param, whole in zip(model.params, alone.wholes(), strict=True):
            param.copy_(model.place(whole))
    model.optimizer.load_state_dict(torch.load(file, weights_only=True))
    model.train(SAVED, END)
    alone.train(SAVED, END)
    return differing(model.wholes(), alone.wholes())


@pytest.mark.parametrize("layout", ["group", "columns", "hsdp"])
def test_a_plain_file_loads_on_all_ranks(together: Ranks, tmp_path: Path, layout: str) -> None:
    assert together.run(plain_into, layout, str(tmp_path), world=4) == [[]] * 4


def load_and_save_again() -> list[str]:
    """After consolidate_state_dict(to=None) every state_dict() gathers by itself."""
    model, _ = made("group", {})
    model.train(0, 3)
    saved = model.optimizer.state_dict()
    model.train(3, 5)
    model.optimizer.load_state_dict(saved)
    again = model.optimizer.state_dict()
    return [
        f"{place} {key}"
        for place, state in saved["state"].items()
        for key, value in state.items()
        if not torch.equal(value, again["state"][place][key])
    ]


def test_a_group_gathers_after_a_load_too(together: Ranks) -> None:
    assert together.run(load_and_save_again, world=3) == [[]] * 3


def save_and_die(path: str) -> None:
    model, module = made("rows", {})
    model.train(0, SAVED)
    states = get_state_dict(module, model.optimizer)
    checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)
    model.train(SAVED, SAVED + 3)
    if dist.get_rank() == 1:
        os._exit(3)
    model.train(SAVED + 3, END)


def test_a_killed_run_goes_on_from_its_checkpoint(together: Ranks, tmp_path: Path) -> None:
    found = together.outcomes(save_and_die, str(tmp_path), world=2, group_timeout=10)
    assert not any(is_good for is_good, _ in found)
    assert found[1][1].endswith("exit code 3")
    arguments = ("rows", {}, {}, str(tmp_path))
    assert together.run(load_and_train, *arguments, world=3) == [[]] * 3
