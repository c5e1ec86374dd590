"""Which steps update which factors under factor_update_every, and what the others leave alone."""

from __future__ import annotations

import copy
from typing import Any

import backends
import pytest
import torch
from optim_helpers import bits, params_of, run, with_stack
from torch import Tensor

from dykaf import DyKAF, ops
from dykaf.options import step_options

FACTORS = ("L", "R", "rho", "basis", "core", "flat")
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "ksl": {"integrator": "ksl"},
    "bug": {"integrator": "bug"},
    "factored": {"second_moment": "factored"},
    "one side": {"max_precond_dim": 8},
}


def make(**options: Any) -> DyKAF:
    """With a skinny matrix, a vector between others, and a stack."""
    shapes = [(12, 8), (8, 9), (3, 130), (9,), (9, 8)]
    return with_stack(shapes, (5, 6, 4), torch.float32, **options)


def start(optimizer: DyKAF) -> None:
    """The first gradient; then no basis is refreshed, so that only updates change the factors."""
    run(optimizer, range(1))
    for state in optimizer.state.values():
        if "rho" in state:
            state["next_refresh"].fill_(1000)


def factors(optimizer: DyKAF) -> list[dict[str, Any]]:
    """Of each matrix that has any."""
    found = []
    for param in params_of(optimizer):
        state = optimizer.state[param]
        if "rho" in state:
            count = state["step"].numel()
            parts = {key: state[key].reshape(count, -1) for key in FACTORS if key in state}
            found += [{key: bits(part[i]) for key, part in parts.items()} for i in range(count)]
    return found


def places(optimizer: DyKAF) -> list[int]:
    """Of each matrix; a stack's matrices take places that follow each other."""
    return [
        place + i
        for param, (_, _, place) in zip(
            params_of(optimizer), optimizer._stagger_offsets(), strict=True
        )
        if "rho" in (state := optimizer.state[param])
        for i in range(state["step"].numel())
    ]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_k_th_step_updates_the_factors(form: str, every: int, stagger: bool) -> None:
    optimizer = make(factor_update_every=every, refresh_stagger=stagger, **FORMS[form])
    start(optimizer)
    offsets = places(optimizer) if stagger else [0] * len(factors(optimizer))
    assert len({offset % every for offset in offsets}) == (every if stagger else 1)
    for step in range(1, 12):
        before = factors(optimizer)
        run(optimizer, range(step, step + 1))
        for old, new, offset in zip(before, factors(optimizer), offsets, strict=True):
            updated = step in [k * every - offset for k in range(100)]
            for key in old:
                assert (old[key] != new[key]) == updated, key
    for param in params_of(optimizer):
        state = optimizer.state[param]
        assert (state["step"] >= 11).all()
        if "rows" in state:
            (offset,) = offsets[2:3]
            updates = sum((step + offset) % every == 0 for step in range(1, 12))
            assert state["rows"].tolist() == [3, 3 + 3 * updates]


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_gradient_counts_as_many_steps_as_an_update(form: str) -> None:
    optimizer = make(factor_update_every=3, refresh_stagger=False, **FORMS[form])

    def clear(step: int) -> None:
        for param in params_of(optimizer):
            param.grad.zero_()

    def scales() -> list[Tensor]:
        return [state["rho"].clone() for state in optimizer.state.values() if "rho" in state]

    start(optimizer)
    run(optimizer, range(1, 3))
    before = scales()
    run(optimizer, range(3, 4), clear)
    decayed = scales()
    run(optimizer, range(4, 6), clear)
    for old, new, later in zip(before, decayed, scales(), strict=True):
        assert new.flatten().tolist() == pytest.approx((old * 0.9**1.5).flatten().tolist())
        assert torch.equal(new, later)


def test_steps_are_counted_from_the_first_gradient_of_each_matrix() -> None:
    optimizer = make(factor_update_every=3, refresh_stagger=False)
    late = params_of(optimizer)[0]
    # On a GPU the host sees one step later that a gradient was not zero.
    first = 1 if backends.is_gpu() else 2

    def withhold(step: int) -> None:
        if step < first:
            late.grad.zero_()

    run(optimizer, range(3), withhold)
    for state in optimizer.state.values():
        if "rho" in state:
            state["next_refresh"].fill_(1000)
    run(optimizer, range(3, 4))
    before = factors(optimizer)
    run(optimizer, range(4, 5))
    assert factors(optimizer) == before
    run(optimizer, range(5, 6))
    changed = [old != new for old, new in zip(before, factors(optimizer), strict=True)]
    assert changed == [True] + [False] * 8


def test_the_single_operation_always_updates() -> None:
    optimizer = make(factor_update_every=5, refresh_stagger=False)
    run(optimizer, range(2))
    param = params_of(optimizer)[0]
    state = optimizer.state[param]
    before = factors(optimizer)[0]
    ops.factor_update_([param.grad.clone()], [state], step_options(optimizer.param_groups[0]))
    assert all(factors(optimizer)[0][key] != before[key] for key in before)


@pytest.mark.parametrize("beta", [0.0, 0.81, 0.9, 0.999])
def test_the_decay_is_that_of_as_many_steps(beta: float) -> None:
    def decay(**options: Any) -> float:
        return step_options(DyKAF([torch.zeros(1)], **options).param_groups[0])["factor_beta"]

    assert decay(factor_beta=beta) == beta
    assert decay(factor_beta=beta, factor_update_every=3) == pytest.approx(beta * beta * beta)
    betas = (0.9, beta)
    assert decay(factor_beta=None, betas=betas) == beta
    assert decay(factor_beta=None, betas=betas, factor_update_every=2) == pytest.approx(beta * beta)


@pytest.mark.parametrize("every", [600, 7000, 2**62 - 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_decay_of_next_to_nothing_is_none(form: str, every: int) -> None:
    """0.9^600 is below float32's range, 0.9^7000 subnormal in float64."""
    optimizer = make(factor_update_every=every, **FORMS[form])
    forgetful = make(factor_update_every=every, factor_beta=0.0, **FORMS[form])
    run(optimizer, range(1))
    run(forgetful, range(1))
    for found, expected in zip(factors(optimizer), factors(forgetful), strict=True):
        assert found == expected or "basis" in found
    run(optimizer, range(1, 4))
    for param in params_of(optimizer):
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())


def test_state_from_before_the_option_goes_on() -> None:
    optimizer, other = make(), make()
    run(optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["factor_update_every"]
    with torch.no_grad():
        for mine, theirs in zip(params_of(other), params_of(optimizer), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(saved)
    assert all(group["factor_update_every"] == 1 for group in other.param_groups)
    run(optimizer, range(5, 9))
    run(other, range(5, 9))
    assert factors(other) == factors(optimizer)
    for mine, theirs in zip(params_of(other), params_of(optimizer), strict=True):
        assert bits(mine) == bits(theirs)
