"""FISMO against its dense float64 reference, and what must hold whatever the gradients are.

The tests of faults, checkpoints and tensor forms run over both classes (`each_optimizer`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import backends
import pytest
import torch
from bounded_steps import QUINTIC, departure
from conftest import SHAPES, shape_id
from fismo_reference import ReferenceFISMO
from gradient_sequences import Stretch, gradients, stretches
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import randn
from test_resting_weights import embedding_and_head, moves, train_embedding
from test_trajectory import random_gradients
from tolerances import TRAJECTORY, unit_roundoff
from torch import Tensor, nn

import dykaf
from dykaf import FISMO, DyKAF, ops
from dykaf.work import check_capture

MOUSSE: dict[str, Any] = {
    "betas": (0.95, 0.95),
    "integrator": "diagonal",
    "momentum": "plain",
    "exponent": 0.125,
    "damping": 1e-5,
    "nesterov": False,
    "orthogonalize": 5,
    "refresh_schedule": "fixed",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "refresh each step": {"precondition_frequency": 1},
    "not grafted": {"graft": False},
    "little damping": {"damping": 1e-3, "exponent": 0.25},
    "no damping": {"damping": 0.0, "factor_beta": None},
    "no nesterov": {"nesterov": False, "orthogonalize": 5, "betas": (0.9, 0.99)},
    "one side": {"sides": "one"},
    "mousse": MOUSSE,
    "mousse, one side": {**MOUSSE, "sides": "one"},
    "plain momentum": {"momentum": "plain"},
    "fixed 3, maximize": {
        "refresh_schedule": "fixed",
        "precondition_frequency": 3,
        "maximize": True,
        "lr": 0.1,
    },
}


@pytest.fixture(params=["native", "aten"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native":
        yield
        return
    with ops.aten_alone():
        yield


def compare(shape: tuple[int, int], grads: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Steps both and asserts that parameter, factors and momentum agree.

    Returns:
        the weights at the begin and at the end.
    """
    W = randn(*shape, seed=1)
    param = nn.Parameter(W.clone())
    optimizer = FISMO([param], **options)
    ref = ReferenceFISMO(W, stagger_offsets=optimizer._stagger_offsets()[-1], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        ref.step(grad)
    travelled = float((ref.W - W).abs().max())
    assert travelled > 0
    assert float((param.detach() - ref.W).abs().max()) <= TRAJECTORY * travelled
    state = optimizer.state[param]
    bases = {"L": torch.eye(shape[0]).double(), "R": torch.eye(shape[1]).double()}
    for side, key in enumerate(bases):
        if key in state:
            bases[key] = state[f"Q_{key}"]
            F = bases[key] @ state[key] @ bases[key].T
            difference = F * (shape[side] / F.trace()) - ref.factors[side]
            assert float(difference.abs().max()) <= TRAJECTORY * shape[side]
    M = bases["L"] @ state["exp_avg"] @ bases["R"].T
    size = torch.stack([M.abs().max(), ref.M.abs().max()])
    if len(ref.kept) == 1:  # whose p has another unit
        M, other = M / size[0], ref.M / size[1]
    else:
        other = ref.M
    assert float((M - other).abs().max()) <= TRAJECTORY * max(1.0, float(size[1]))
    return W, param.detach()


@pytest.mark.parametrize("roots", ["exact", "tracked"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_trajectory(name: str, shape: tuple[int, int], roots: str, backend: None) -> None:
    compare(shape, random_gradients(shape, 50), roots=roots, **OPTIONS[name])


@pytest.mark.parametrize("shape", [(16, 33), (33, 16)], ids=shape_id)
@pytest.mark.parametrize("roots", ["exact", "tracked"])
def test_a_side_without_a_factor(shape: tuple[int, int], roots: str, backend: None) -> None:
    compare(shape, random_gradients(shape, 50), roots=roots, max_precond_dim=16)


@pytest.mark.parametrize("roots", ["exact", "tracked"])
def test_zero_gradients_before_and_within_a_run(roots: str) -> None:
    grads = random_gradients((6, 4), 40)
    # Where no host waits, a matrix starts one step later (tests/test_gpu.py).
    first = [] if backends.is_gpu() else [0, 1]
    for idx in (*first, 10, 11, 12, 30):
        grads[idx] = torch.zeros(6, 4, dtype=torch.float64)
    compare((6, 4), grads, roots=roots)


def test_zero_gradients_after_the_first(backend: None) -> None:
    """The momentum is zero still, and so is the update: there is no norm to restore."""
    grads = random_gradients((4, 3), 8)
    grads[1] = grads[2] = torch.zeros(4, 3, dtype=torch.float64)
    compare((4, 3), grads)


def test_factors_start_anew_when_their_scale_has_vanished(backend: None) -> None:
    """At factor_beta 0.01, rho falls by ten at each zero gradient and underflows to 0."""
    zeros = [torch.zeros(4, 3, dtype=torch.float64)] * 330
    grads = random_gradients((4, 3), 8)
    compare((4, 3), [*grads[:4], *zeros, *grads[4:]], factor_beta=0.01)


def test_factors_of_zero_whiten_nothing(backend: None) -> None:
    """As a state that was loaded may have them, until a gradient comes."""
    param = nn.Parameter(randn(4, 3))
    optimizer = FISMO([param], weight_decay=0)
    for grad in random_gradients((4, 3), 4):
        param.grad = grad
        optimizer.step()
    optimizer.state[param]["L"].zero_()
    optimizer.state[param]["R"].zero_()
    before = param.detach().clone()
    param.grad = torch.zeros(4, 3, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(param, before)


def whitened_gradient(shape: tuple[int, int], roots: str, exponent: float) -> tuple[Tensor, Any]:
    """P^-e G Q^-e of the step after 30 others, in the basis, up to a factor that hangs on no roots;
    and the state it is of."""
    param = nn.Parameter(randn(*shape))
    optimizer = FISMO(
        [param], integrator="diagonal", exponent=exponent, betas=(0.0, 0.9), nesterov=False
    )
    *before, last = random_gradients(shape, 31)
    for grad in before:
        param.grad = grad
        optimizer.step()
    optimizer.param_groups[0].update(
        roots=roots, precondition_frequency=1000, refresh_schedule="fixed"
    )
    optimizer.state[param]["next_refresh"].fill_(1000)
    param.grad = last
    optimizer.step()
    return optimizer.state[param]["exp_avg"], optimizer.state[param]


@pytest.mark.parametrize("exponent", [0.5, 0.125])
@pytest.mark.parametrize("shape", [(6, 4), (16, 16), (17, 33), (65, 33)], ids=shape_id)
def test_tracked_powers_err_by_what_the_basis_leaves_off_the_diagonal(
    shape: tuple[int, int], exponent: float
) -> None:
    """x^-e is Lipschitz on the eigenvalues of P and of its diagonal, none of which is below P's
    least, so ||P^-e - diag(P)^-e||_F <= e least^(-e-1) ||P - diag(P)||_F (Daleckii & Krein)."""
    tracked, state = whitened_gradient(shape, "tracked", exponent)
    exact, _ = whitened_gradient(shape, "exact", exponent)
    errors, powers, factors = [], [], []
    for key in ("L", "R"):
        F = state[key] / state[key].diagonal().mean()
        values, vectors = torch.linalg.eigh(F)
        lipschitz = exponent * float(values[0]) ** (-exponent - 1)
        errors.append(lipschitz * float((F - torch.diag(F.diagonal())).norm()))
        powers.append((vectors * values.pow(-exponent)) @ vectors.T)
        factors.append(F.diagonal().pow(-exponent))
    rest = factors[0].reciprocal()[:, None] * tracked  # G Q^-e of the tracked powers
    plain = rest / factors[1]  # G
    bound = (
        errors[0] * rest.norm() + torch.linalg.matrix_norm(powers[0], 2) * errors[1] * plain.norm()
    )
    difference = float((tracked - exact).norm())
    assert 1e-6 * float(exact.norm()) < difference <= float(bound)


@pytest.mark.parametrize(
    ("shape", "roots"), [((9, 9), "tracked"), ((5, 8), "exact"), ((8, 5), "exact")]
)
def test_trajectories_turn_with_the_gradients(shape: tuple[int, int], roots: str) -> None:
    """Tracked, where the first gradient has full rank: else a part of the first basis is free."""
    U, V = (torch.linalg.qr(randn(d, d, seed=7 + d)).Q for d in shape)
    params = [nn.Parameter(randn(*shape)), nn.Parameter(U @ randn(*shape) @ V.T)]
    optimizers = [FISMO([param], roots=roots) for param in params]
    for grad in random_gradients(shape, 50):
        params[0].grad, params[1].grad = grad.clone(), U @ grad @ V.T
        for optimizer in optimizers:
            optimizer.step()
    travelled = float((params[0].detach() - randn(*shape)).abs().max())
    difference = U @ params[0].detach() @ V.T - params[1].detach()
    assert float(difference.abs().max()) <= TRAJECTORY * travelled


@pytest.mark.parametrize("power", [-120, -60, -1, 3, 60, 120])
@pytest.mark.parametrize("roots", ["tracked", "exact"])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9)], ids=shape_id)
def test_a_power_of_two_on_the_gradients_changes_no_bit(
    shape: tuple[int, int], roots: str, power: int, backend: None
) -> None:
    """From 1e-37 to 1e37 in float32: gradients of a few bits, which are exact at both ends."""
    params = [nn.Parameter(randn(*shape).float()) for _ in range(2)]
    optimizers = [FISMO([param], roots=roots, precondition_frequency=3) for param in params]
    for grad in random_gradients(shape, 30):
        params[0].grad = (grad * 4).round().clamp(-32, 32).float()
        params[1].grad = params[0].grad * 2.0**power
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(params[0], params[1])
    states = [optimizer.state[param] for optimizer, param in zip(optimizers, params, strict=True)]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    assert torch.equal(states[0]["rho"] * 2.0**power, states[1]["rho"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 7), (2, 2), (5, 5), (12, 5), (5, 12), (3, 20)]),
    stretches=stretches(),
    options=st.fixed_dictionaries(
        {
            "damping": st.sampled_from([0.0, 1e-3, 0.1]),
            "factor_beta": st.sampled_from([0.0, 0.9, 0.99]),
            "exponent": st.sampled_from([0.5, 0.125, 1.0]),
            "integrator": st.sampled_from(["coupled", "diagonal"]),
            "momentum": st.sampled_from(["whitened", "plain"]),
            "sides": st.sampled_from(["both", "both", "one"]),
            "nesterov": st.booleans(),
            "graft": st.sampled_from([True, True, False]),
            "roots": st.sampled_from(["tracked", "tracked", "exact"]),
            "precondition_frequency": st.sampled_from([1, 3, 10]),
            "state_dtype": st.sampled_from(["float32", "float32", "bfloat16"]),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_updates_are_bounded_whatever_the_gradients_are(
    shape: tuple[int, int], stretches: list[Stretch], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """No singular value of X exceeds QUINTIC; so ||X||_F <= QUINTIC sqrt(min(m, n)), which grafting
    keeps. Without it the powers of each side are at most (16 u sqrt(size))^-e."""
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = FISMO([param], lr=1.0, weight_decay=0.0, **options)
    u = unit_roundoff(dtype)
    rms = 0.2 * QUINTIC
    if not options["graft"]:
        for size in shape:
            rms *= (16 * u * math.sqrt(size)) ** -options["exponent"]
    kept = torch.bfloat16 if options["state_dtype"] == "bfloat16" else dtype
    stretch = math.prod(1 + departure(size, kept) for size in shape)
    for step, grad in enumerate(gradients(stretches, shape)):
        before = param.detach().clone()
        param.grad = grad.to(dtype)
        optimizer.step()
        move = (param.detach() - before).double()
        rounding = (4 * step + 4 * sum(shape) + 40) * u
        limit = rms * stretch * (1 + rounding) + 2 * u * float(before.abs().max())
        assert float(move.square().mean().sqrt()) <= limit
        for key, value in optimizer.state[param].items():
            assert bool(value.isfinite().all()), key


def test_gradients_that_are_not_finite_may_be_let_in() -> None:
    """No decomposition of NaN stops the step, nor any after it."""
    for roots in ("tracked", "exact"):
        param = nn.Parameter(randn(6, 4))
        optimizer = FISMO([param], roots=roots, nonfinite="propagate")
        for grad in random_gradients((6, 4), 4):
            param.grad = grad
            optimizer.step()
        param.grad = torch.full((6, 4), math.nan, dtype=torch.float64)
        for _ in range(2):
            with warnings.catch_warnings(action="ignore"):
                optimizer.step()
        assert bool(param.isnan().any())


def test_options_and_checkpoints_of_the_other_class_are_refused() -> None:
    param = nn.Parameter(randn(6, 4))
    ours, other = FISMO([param]), DyKAF([nn.Parameter(randn(6, 4))])
    with pytest.raises(ValueError, match="expected the options of DyKAF, got those of FISMO"):
        other.add_param_group({"params": [nn.Parameter(randn(2, 2))], "exponent": 0.5})
    assert len(other.param_groups) == 1
    with pytest.raises(ValueError, match="expected the options of DyKAF, got those of FISMO"):
        other.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="expected the options of FISMO, got those of DyKAF"):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="integrator: expected one of 'coupled', 'diagonal'"):
        FISMO([param], integrator="ksl")
    with pytest.raises(ValueError, match=r"exponent: expected a number in \(0, 1\], got 0"):
        FISMO([param], exponent=0)


def test_the_state_has_no_second_moment_but_of_vectors() -> None:
    params = [nn.Parameter(randn(6, 4)), nn.Parameter(randn(5))]
    optimizer = FISMO(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert "exp_avg_sq" not in optimizer.state[params[0]]
    assert "exp_avg_sq" in optimizer.state[params[1]]
    assert "both sides" in str(dykaf.summary(optimizer))


def test_a_graph_holds_no_decompositions() -> None:
    param = nn.Parameter(randn(6, 4))
    optimizer = FISMO([param], roots="exact")
    param.grad = torch.ones_like(param)
    optimizer.step()
    work = [item._replace(on_gpu=True) for item in optimizer._collect()]
    with pytest.raises(RuntimeError, match="expected roots='tracked', got 'exact'"):
        check_capture(work, optimizer.state, counts_skips=True, is_shared=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"sides": "one"}, {"max_precond_dim": 64}, MOUSSE, {"damping": 0.0, "exponent": 1.0}],
    ids=["both", "one", "narrow", "mousse", "undamped"],
)
def test_rows_of_tokens_that_do_not_occur_stay(backend: None, options: dict[str, Any]) -> None:
    """Found were at most 2e-7 of what live rows move: of rows that are not exactly zero in the
    basis, what Newton-Schulz makes of rounding. Undamped, whitening enlarges it: 9e-6, and 6e-3
    where gradients keep what is rounding in them."""
    model, live = embedding_and_head(150, 64, seed=0)
    optimizer = FISMO(model.parameters(), lr=1e-3, weight_decay=0, **options)
    begin = [param.detach().clone() for param in model.parameters()]
    train_embedding(optimizer, model, live, steps=60)
    for resting, moving in moves(model, begin, live):
        assert moving > 5e-3
        assert resting <= 1e-4 * moving
