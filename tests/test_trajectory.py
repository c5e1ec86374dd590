"""The whole optimizer, in rotated form, against the unrotated textbook form."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
from conftest import SHAPES, shape_id
from optim_helpers import BOTH
from reference import ReferenceDyKAF
from tolerances import TRAJECTORY
from torch import Tensor

import dykaf

KSL: dict[str, Any] = {
    **BOTH,
    "integrator": "ksl",
    "factor_beta": None,
    "rescale_exp_avg_sq": False,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "refreshed often": {"precondition_frequency": 5},
    "both sides": BOTH,
    "ksl": KSL,
    "bug": {**KSL, "integrator": "bug"},
    "both sides, one beta": {**BOTH, "factor_beta": None},
    "diagonal, no rescaling": {**BOTH, "rescale_exp_avg_sq": False},
    "ksl rank_one moment": {**KSL, "second_moment": "rank_one"},
    "ksl factored moment": {**KSL, "second_moment": "factored"},
    "ksl rescale": {**BOTH, "integrator": "ksl", "betas": (0.9, 0.98)},
    "rank_one moment": {**BOTH, "second_moment": "rank_one"},
    "factored moment": {**BOTH, "second_moment": "factored"},
    "ksl refresh each step": {**KSL, "precondition_frequency": 1},
    "ksl one side": {**KSL, "max_precond_dim": 16},
    "refresh each step": {**BOTH, "precondition_frequency": 1},
    "fixed 3": {**BOTH, "refresh_schedule": "fixed", "precondition_frequency": 3},
    "fixed 7": {**BOTH, "refresh_schedule": "fixed", "precondition_frequency": 7},
    "maximize": {"maximize": True, "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6},
    "one side": {**BOTH, "max_precond_dim": 16},
    "no matrix": {"max_precond_dim": 0},
    "one side, plain": {**BOTH, "sides": "one"},
    "nesterov": {**BOTH, "nesterov": True},
    "nesterov, factored moment": {**BOTH, "nesterov": True, "second_moment": "factored"},
    "orthogonalize 3": {**BOTH, "orthogonalize": 3, "nesterov": True},
    "orthogonalize 5, ksl": {**KSL, "orthogonalize": 5},
    "no side": {"sides": "none"},
    "no side, plain": {"sides": "none", "nesterov": False, "orthogonalize": 0},
    "no side, factored moment": {"sides": "none", "second_moment": "factored"},
    "no side, rank_one moment": {"sides": "none", "second_moment": "rank_one"},
    "momentum": {"sides": "none", "second_moment": "none", "orthogonalize": 5},
    "momentum, plain": {"sides": "none", "second_moment": "none", "nesterov": False},
}


def compare(
    shape: tuple[int, int], grads: list[Tensor], phase: int = 0, **options: Any
) -> tuple[dykaf.DyKAF, ReferenceDyKAF]:
    """Steps both with `grads` and asserts that parameter, factors and momentum agree.

    `phase` places other parameters before this one, so that its refreshes fall on other steps.
    """
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    param = torch.nn.Parameter(W.clone())
    others = [torch.zeros(64, 64, dtype=torch.float64) for _ in range(phase)]
    optimizer = dykaf.DyKAF([*others, param], **options)
    ref = ReferenceDyKAF(W, **options, stagger_offsets=optimizer._stagger_offsets()[-1])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        ref.step(grad)
    travelled = float((ref.W - W).abs().max())
    assert travelled > 0
    assert float((param.detach() - ref.W).abs().max()) <= TRAJECTORY * travelled
    state = optimizer.state[param]
    for key in ("L", "R"):
        if key in state:
            Q = state[f"Q_{key}"]
            difference = Q @ state[key] @ Q.T - getattr(ref, key)
            assert float(difference.abs().max()) <= TRAJECTORY
    if "rho" in state:
        assert state["rho"].tolist() == pytest.approx(list(ref.rho), rel=TRAJECTORY)
    return optimizer, ref


def random_gradients(shape: tuple[int, int], num: int, seed: int = 0) -> list[Tensor]:
    """With a fixed mean and a fixed covariance, so that bases have something to find."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, *shape, generator=generator, dtype=torch.float64)
    return list(left @ (noise + mean))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_trajectory_with_refreshes(name: str, shape: tuple[int, int]) -> None:
    compare(shape, random_gradients(shape, 50), **OPTIONS[name])


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_trajectory_with_refreshes_at_other_phases(phase: int) -> None:
    options = {**BOTH, "precondition_frequency": 4}
    optimizer, ref = compare((9, 6), random_gradients((9, 6), 50), phase=phase, **options)
    refreshes = optimizer.state[optimizer.param_groups[0]["params"][-1]]["refreshes"]
    assert refreshes.tolist() == ref.refreshes
    assert optimizer._stagger_offsets()[-1] != (0, 0)


@pytest.mark.parametrize("integrator", ["ksl", "bug", "diagonal"])
def test_trajectory_from_the_rank_one_init(integrator: str) -> None:
    """The first refresh comes when the factors have full rank: before, part of a refreshed basis
    is free (null directions)."""
    options = {**BOTH, "init": "rank_one", "refresh_schedule": "fixed"}
    options["precondition_frequency"] = 20
    compare(
        (5, 7),
        random_gradients((5, 7), 40),
        integrator=integrator,
        **options,
    )


@pytest.mark.parametrize("max_precond_dim", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=shape_id)
def test_both_sides_of_max_precond_dim(shape: tuple[int, int], max_precond_dim: int) -> None:
    """A side equal to the limit keeps its factor."""
    grads = random_gradients(shape, 50)
    optimizer, _ = compare(shape, grads, **{**BOTH, "max_precond_dim": max_precond_dim})
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert ("L" in state) == (shape[0] <= max_precond_dim)
    assert ("R" in state) == (shape[1] <= max_precond_dim)


def test_zero_gradients_before_and_within_a_run() -> None:
    shape = (6, 4)
    grads = random_gradients(shape, 40)
    # Where no host waits, a matrix starts one step later (tests/test_gpu.py).
    first = [] if backends.is_gpu() else [0, 1]
    for idx in (*first, 10, 11, 12, 30):
        grads[idx] = torch.zeros(shape, dtype=torch.float64)
    optimizer, ref = compare(shape, grads)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert int(state["step"]) == ref.t == 39 - len(first)


def test_factors_start_anew_when_their_scale_has_vanished() -> None:
    """At factor_beta 0.01, rho falls by ten at each zero gradient and underflows to 0."""
    shape = (4, 3)
    zeros = [torch.zeros(shape, dtype=torch.float64)] * 330
    grads = random_gradients(shape, 8)
    compare(shape, [*grads[:4], *zeros, *grads[4:]], factor_beta=0.01)


@pytest.mark.parametrize("integrator", ["ksl", "bug", "diagonal"])
def test_rank_deficient_gradients_under_the_identity_prior(integrator: str) -> None:
    """One direction of each side never sees a gradient: a single null direction, for the basis of
    a larger null space would be free. eps hides its rounding noise, which Adam would amplify."""
    shape = (4, 4)
    generator = torch.Generator().manual_seed(3)
    range_basis = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    domain_basis = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    grads = [
        range_basis @ torch.randn(3, 3, generator=generator, dtype=torch.float64) @ domain_basis
        for _ in range(30)
    ]
    compare(shape, grads, integrator=integrator, eps=1e-5)
