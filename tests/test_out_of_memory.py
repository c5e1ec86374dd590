"""A step whose allocations fail, one after the other: all is as before, or as after.

Of the CUDA backend over the host executor, where the CPU's memory stands for the device's, and of
torch's own operations, where it holds of each parameter.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
from torch import Tensor

import dykaf
from dykaf import _C, ops

# One in this many is made to fail; 1 takes minutes.
EVERY = int(os.environ.get("FAIL_ALLOCATION_EVERY", "5"))

pytestmark = pytest.mark.skipif(
    not hasattr(_C, "fail_allocation"), reason="needs the package of the host executor"
)

SHAPES = ((6, 9), (5,), (3, 64))
FORMS = {
    "default": {},
    "skinny": {"skinny_rank": 4},
    "one side": {"max_precond_dim": 8},
    "bug, rank_one": {"integrator": "bug", "init": "rank_one"},
    "factored": {"second_moment": "factored", "skinny_rank": 0},
    "bfloat16": {"state_dtype": "bfloat16"},
    "passes": {"state_dtype": "bfloat16", "second_moment": "rank_one"},
}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator) for shape in SHAPES]


def make(options: dict[str, Any], num_steps: int) -> dykaf.DyKAF:
    params = [torch.nn.Parameter(grad.clone()) for grad in gradients(100)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 1e-2}]
    optimizer = dykaf.DyKAF(groups, precondition_frequency=2, **options)
    for step in range(num_steps):
        set_gradients(optimizer, step)
        optimizer.step()
    return optimizer


def params_of(optimizer: dykaf.DyKAF) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_gradients(optimizer: dykaf.DyKAF, step: int) -> None:
    for param, grad in zip(params_of(optimizer), gradients(step), strict=True):
        param.grad = grad


def snapshot(optimizer: dykaf.DyKAF) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    params = params_of(optimizer)
    states = [
        {key: value.clone() for key, value in optimizer.state.get(param, {}).items()}
        for param in params
    ]
    return [param.detach().clone() for param in params], states


def equal(one: dict[str, Tensor], other: dict[str, Tensor], but: Callable[[str], bool]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(but(key) or torch.equal(one[key], other[key]) for key in one)


def of_refreshes(key: str) -> bool:
    """What may differ where a refresh could not be done."""
    return key in (
        *("L", "R", "Q_L", "Q_R", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
        *("exp_avg_sq_scale", "basis", "core", "flat", "rows", "refresh_fallbacks"),
    )


def step_without(optimizer: dykaf.DyKAF, allocation: int) -> tuple[str, str]:
    """A step in which one allocation fails; returns what it raised and its first warning."""
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _C.fail_allocation(allocation)
        try:
            optimizer.step()
        except RuntimeError as raised:
            error = str(raised)
        finally:
            _C.fail_allocation(None)
    return error, str(caught[0].message) if caught else ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_each_allocation_of_a_step_fails(
    form: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "passes":
        monkeypatch.setattr("dykaf.narrow.MAX_PASS_BYTES", 500)
    after = make(FORMS[form], num_steps + 1)
    params_after, states_after = snapshot(after)
    num_raised = num_stayed = num_allocations = 0
    start = make(FORMS[form], num_steps)
    while True:
        optimizer = copy.deepcopy(start)
        set_gradients(optimizer, num_steps)
        params_before, states_before = snapshot(optimizer)
        error, warning = step_without(optimizer, num_allocations)
        params, states = snapshot(optimizer)
        # What counts skipped steps comes after the step, and fails by itself.
        is_done = all(map(torch.equal, params, params_after)) and all(map(bool, states))
        if error and not is_done:
            num_raised += 1
            assert all(map(torch.equal, params, params_before)), num_allocations
            assert all(
                equal(*pair, but=lambda _: False)
                for pair in zip(states, states_before, strict=True)
            ), num_allocations
            num_allocations += EVERY
            continue
        assert is_done, num_allocations
        if warning or any(
            not equal(*pair, but=lambda _: False) for pair in zip(states, states_after, strict=True)
        ):
            num_stayed += 1
            counted = sum(
                int(state.get("refresh_fallbacks", torch.zeros(1)).sum()) for state in states
            )
            assert "the old basis stays" in warning, num_allocations
            assert counted > 0
            for pair in zip(states, states_after, strict=True):
                assert equal(*pair, but=of_refreshes), num_allocations
            # It goes on.
            set_gradients(optimizer, num_steps + 1)
            optimizer.step()
            assert all(bool(param.isfinite().all()) for param in params_of(optimizer))
        elif not error and num_allocations > 0:
            break  # as many as there are
        num_allocations += EVERY
    assert num_raised > 5 and backends.is_gpu()
    assert num_stayed > 0 or num_steps == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_each_allocation_of_torchs_own_operations_fails(form: str, num_steps: int) -> None:
    """A parameter is as before, and named, or as after; where it was the first step, all are."""
    num_raised = num_named = num_stayed = num_allocations = 0
    with ops.aten_alone():
        params_after, states_after = snapshot(make(FORMS[form], num_steps + 1))
        start = make(FORMS[form], num_steps)
        while True:
            optimizer = copy.deepcopy(start)
            set_gradients(optimizer, num_steps)
            params_before, states_before = snapshot(optimizer)
            error, stayed = step_without(optimizer, num_allocations)
            params, states = snapshot(optimizer)
            num_old = 0
            for idx, (param, state) in enumerate(zip(params, states, strict=True)):
                name = f"param_groups[{min(idx, 1)}]['params'][{max(idx - 1, 0)}]"
                is_done = bool(state) and equal(state, states_after[idx], but=lambda _: False)
                if torch.equal(param, params_after[idx]) and is_done:
                    continue
                if name in stayed:
                    assert torch.equal(param, params_after[idx]), num_allocations
                    assert equal(state, states_after[idx], but=of_refreshes), num_allocations
                    continue
                num_old += 1
                assert error and torch.equal(param, params_before[idx]), num_allocations
                assert equal(state, states_before[idx], but=lambda _: False), num_allocations
                assert name in error or "could not update" not in error, num_allocations
            assert "could not update" in error or num_old in (0, len(params)), num_allocations
            num_raised += bool(num_old)
            num_named += "could not update" in error
            num_stayed += bool(stayed)
            if not error and not stayed and num_allocations > 0:
                break  # as many as there are
            num_allocations += EVERY
    assert num_raised > 3
    assert (num_named > 3 and num_stayed > 3) or num_steps == 0
