"""Factors and bases kept in bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import backends
import pytest
import torch
from optim_helpers import BOTH, bits, gradient, params_of, refuses, run, state_bits, with_stack
from torch import Tensor

from dykaf import DyKAF, narrow

pytestmark = pytest.mark.usefixtures("each_optimizer")

SHAPES = [(12, 8), (3, 130), (9,), (70, 4)]  # the second one is skinny
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "ksl": {"integrator": "ksl", "rescale_exp_avg_sq": False},
    "one side": {"max_precond_dim": 8},
    "factored": {"second_moment": "factored", "integrator": "bug"},
}


def make(dtype: torch.dtype = torch.float32, **options: Any) -> DyKAF:
    return with_stack(
        SHAPES,
        (2, 5, 6),
        dtype,
        **{**BOTH, "precondition_frequency": 3, "skinny_rank": 64, **options},
    )


def round_factors(optimizer: DyKAF) -> None:
    for state in optimizer.state.values():
        for key in set(narrow.KEYS) & set(state):
            state[key].copy_(state[key].bfloat16())


def assert_same(kept: DyKAF, rounded: DyKAF) -> None:
    """Bit for bit, but for the dtype of what is kept in bfloat16."""
    for mine, theirs in zip(params_of(kept), params_of(rounded), strict=True):
        assert bits(mine) == bits(theirs)
        for key, value in rounded.state[theirs].items():
            found = kept.state[mine][key]
            assert found.dtype == (torch.bfloat16 if key in narrow.KEYS else value.dtype), key
            assert torch.equal(found.to(value.dtype), value), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_float32_rounded_after_every_step(form: str, dtype: torch.dtype) -> None:
    if not backends.takes_float64() and dtype == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    kept = make(dtype, state_dtype="bfloat16", **FORMS[form])
    rounded = make(dtype, **FORMS[form])
    for step in range(15):
        run(kept, range(step, step + 1))
        run(rounded, range(step, step + 1))
        round_factors(rounded)
    assert_same(kept, rounded)


@pytest.mark.of_dykaf
@pytest.mark.parametrize(("limit", "num_passes"), [(1, 3), (140_000, 2), (200_000, 1)])
def test_a_step_in_passes_is_the_same(
    limit: int, num_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full the first group's factors and bases are 1664, 132168, 0 and 39328 bytes."""
    whole, parts = make(state_dtype="bfloat16"), make(state_dtype="bfloat16")
    run(whole, range(10))
    seen: list[list[slice]] = []
    passes = narrow.passes

    def spy(states: list[dict[str, Tensor]]) -> list[slice]:
        seen.append(list(passes(states)))
        return seen[-1]

    monkeypatch.setattr(narrow, "MAX_PASS_BYTES", limit)
    monkeypatch.setattr("dykaf.engine.passes", spy)
    run(parts, range(10))
    assert len(seen[0]) == num_passes
    assert [bits(p) for p in params_of(parts)] == [bits(p) for p in params_of(whole)]
    assert state_bits(parts) == state_bits(whole)


def test_memory() -> None:
    full, half = make().state_bytes(), make(state_dtype="bfloat16").state_bytes()
    assert full["total"] == 0 and half["total"] == 0
    optimizers = make(), make(state_dtype="bfloat16")
    for optimizer in optimizers:
        run(optimizer, range(1))
    full, half = (optimizer.state_bytes() for optimizer in optimizers)
    for kind in ("factors", "bases"):
        assert 2 * half[kind] == full[kind] > 0
    assert half["exp_avg"] == full["exp_avg"]


def test_a_loaded_run_goes_on_bit_for_bit() -> None:
    first, second = make(state_dtype="bfloat16"), make(state_dtype="bfloat16")
    run(first, range(5))
    with torch.no_grad():
        for mine, theirs in zip(params_of(second), params_of(first), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, range(5, 12))
    run(second, range(5, 12))
    assert [bits(p) for p in params_of(first)] == [bits(p) for p in params_of(second)]
    assert state_bits(first) == state_bits(second)


def test_state_in_full_is_refused() -> None:
    full, half = make(), make(state_dtype="bfloat16")
    run(full, range(2))
    saved = full.state_dict()
    for group in saved["param_groups"]:
        group["state_dtype"] = "bfloat16"
    message = (
        "state of param_groups[0]['params'][0]: 'L': expected torch.bfloat16 of shape (12, 12), "
        "got torch.float32 of shape (12, 12)"
    )
    with refuses(half, message):
        half.load_state_dict(saved)


def test_an_error_changes_nothing() -> None:
    optimizer = make(state_dtype="bfloat16")
    run(optimizer, range(3))
    param = params_of(optimizer)[0]
    optimizer.state[param]["exp_avg"] = torch.zeros(3, device=param.device)
    for idx, each in enumerate(params_of(optimizer)):
        each.grad = gradient(each, 3, idx)
    found = f"Float [3] on {param.device}"
    message = (
        f"states[0]['exp_avg']: expected contiguous Float [1, 3] on {param.device}, got {found}"
    )
    with refuses(optimizer, message):
        optimizer.step()


def test_diagnostics_are_those_of_the_rounded_factors() -> None:
    optimizer = make(state_dtype="bfloat16")
    run(optimizer, range(8))
    report = optimizer.diagnostics()["param_groups[0]['params'][0]"]
    Q = optimizer.state[params_of(optimizer)[0]]["Q_L"].cpu().double()
    x = torch.sin(1 + torch.arange(12, dtype=torch.float64))
    expected = float((Q.T @ (Q @ x) - x).norm() / x.norm())
    assert report["orthogonality_L"] == pytest.approx(expected, rel=1e-3)
