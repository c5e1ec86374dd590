"""What must hold whatever the numbers: norms, positivity, orthogonality, equivariance, bits."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from conftest import Matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import two_sided
from tolerances import TRAJECTORY, factor_bounds, unit_roundoff
from torch import Tensor

import dykaf
from dykaf import ops


def run(
    param: Tensor, grads: list[Tensor], **options: Any
) -> tuple[dykaf.DyKAF, dict[str, Tensor], Tensor]:
    param = torch.nn.Parameter(param.clone())
    optimizer = two_sided([param], **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return optimizer, optimizer.state[param], param.detach()


@pytest.mark.parametrize("integrator", ["ksl", "bug", "diagonal"])
@pytest.mark.parametrize(("precondition_frequency", "steps"), [(1, 2_500), (10, 10_000)])
def test_thousands_of_steps_keep_factors_and_bases_sound(
    integrator: str, precondition_frequency: int, steps: int
) -> None:
    matrices = Matrices(torch.float32)
    m, n = 24, 16
    left = matrices.randn(m, m)
    param = torch.nn.Parameter(matrices.randn(m, n))
    optimizer = two_sided(
        [param], integrator=integrator, precondition_frequency=precondition_frequency
    )
    for _ in range(steps):
        param.grad = left @ matrices.randn(m, n)
        optimizer.step()
    state = optimizer.state[param]
    u = unit_roundoff(torch.float32)
    for key, size in (("L", m), ("R", n)):
        F, Q = state[key].double(), state[f"Q_{key}"].double()
        # A step, which makes the norm 1, and a refresh each perturb F by a few u of its norm.
        assert float(F.norm()) == pytest.approx(1, abs=8 * u)
        assert torch.equal(F, F.T)
        assert float(torch.linalg.eigvalsh(F)[0]) >= -8 * u
        # Between corrections at most 32 refreshes add errors of size u sqrt(n) per column, at
        # random: sqrt(32 n) u sqrt(n) in the Frobenius norm. Without corrections: 6 times that
        # after 1,000 refreshes, 9 times after 2,500.
        error = float((Q.T @ Q - torch.eye(size, dtype=torch.float64)).norm())
        assert error <= 2 * 32**0.5 * size * u
    assert float(param.detach().abs().max()) < 1e3


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-90, 120),  # below, small entries become subnormal and lose bits
    beta=st.floats(0.05, 0.995),
)
def test_scaling_gradient_and_rho_by_a_power_of_two_is_exact(
    m: int, n: int, seed: int, exponent: int, beta: float
) -> None:
    matrices = Matrices(torch.float32, seed)
    scale = 2.0**exponent
    G = matrices.randn(m, n)
    for integrator in ("ksl", "bug", "diagonal"):
        options = matrices.options(integrator=integrator, factor_beta=beta)
        plain = matrices.state(m, n)
        scaled = {key: value.clone() for key, value in plain.items()}
        scaled["rho"].mul_(scale)
        ops.factor_update_([G], [plain], options)
        ops.factor_update_([G * scale], [scaled], options)
        assert torch.equal(plain["L"], scaled["L"])
        assert torch.equal(plain["R"], scaled["R"])
        assert torch.equal(plain["rho"] * scale, scaled["rho"])


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 10),
    n=st.integers(1, 10),
    seed=st.integers(0, 2**31),
    beta=st.floats(0.05, 0.995),
    size=st.floats(-3, 3),
)
def test_ksl_is_never_farther_from_the_target_than_bug(
    m: int, n: int, seed: int, beta: float, size: float
) -> None:
    matrices = Matrices(torch.float64, seed)
    state, G = matrices.state(m, n), matrices.randn(m, n) * 10**size
    L, R, rho = state["L"].clone(), state["R"].clone(), float(state["rho"][0])
    F = reference.fisher_target(beta, L, R, rho, G)
    errors = {}
    for integrator in ("ksl", "bug"):
        twin = {key: value.clone() for key, value in state.items()}
        options = matrices.options(integrator=integrator, factor_beta=beta)
        ops.factor_update_([G], [twin], options)
        errors[integrator] = reference.kronecker_error(
            F, twin["L"], twin["R"], float(twin["rho"][0])
        )
    bound = factor_bounds("ksl", L, R, rho, G, beta, torch.float64)
    rounding = (bound.L + bound.R + 2 * bound.rho_L) * float(F.norm())
    assert errors["ksl"] <= errors["bug"] + rounding


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 10), n=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_the_factor_update_is_equivariant_under_rotations(m: int, n: int, seed: int) -> None:
    matrices = Matrices(torch.float64, seed)
    state, G = matrices.state(m, n), matrices.randn(m, n)
    P, S = matrices.orthogonal(m), matrices.orthogonal(n)
    for integrator in ("ksl", "bug"):
        options = matrices.options(integrator=integrator)
        plain = {key: value.clone() for key, value in state.items()}
        turned = {key: value.clone() for key, value in state.items()}
        turned["L"] = (P @ state["L"] @ P.T).contiguous()
        turned["R"] = (S @ state["R"] @ S.T).contiguous()
        bound = factor_bounds(integrator, state["L"], state["R"], 0.7, G, 0.95, torch.float64)
        ops.factor_update_([G], [plain], options)
        ops.factor_update_([P @ G @ S.T], [turned], options)
        # Both round, and so do the rotations before and after.
        assert float((P @ plain["L"] @ P.T - turned["L"]).norm()) <= 4 * bound.L
        assert float((S @ plain["R"] @ S.T - turned["R"]).norm()) <= 4 * bound.R


def test_trajectories_do_not_depend_on_the_scale_of_the_gradient() -> None:
    """With eps scaled alike, a power of two changes no bit of the parameters in float64."""
    matrices = Matrices(torch.float64)
    W = matrices.randn(8, 5)
    grads = [matrices.randn(8, 5) for _ in range(25)]
    _, state, expected = run(W, grads, eps=2.0**-30)
    _, scaled, actual = run(W, [grad * 2.0**40 for grad in grads], eps=2.0**10)
    assert torch.equal(actual, expected)
    assert torch.equal(scaled["L"], state["L"])


@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
def test_the_same_inputs_give_the_same_bits(second_moment: str) -> None:
    matrices = Matrices(torch.float32)
    W = matrices.randn(130, 70)
    grads = [matrices.randn(130, 70) for _ in range(12)]
    _, first, first_param = run(W, grads, second_moment=second_moment)
    _, second, second_param = run(W, grads, second_moment=second_moment)
    assert torch.equal(first_param, second_param)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_a_matrix_has_the_same_bits_alone_and_in_company() -> None:
    """The workspace is laid out by the largest matrix of the call."""
    shapes = [(6, 4), (5, 7), (33, 9)]
    results = []
    for company in (shapes[:1], shapes):
        matrices = Matrices(torch.float32)
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in company]
        optimizer = two_sided(params, refresh_schedule="fixed", precondition_frequency=3)
        for _ in range(20):
            params[0].grad = matrices.randn(*shapes[0])
            for param in params[1:]:
                param.grad = torch.full_like(param, 0.5)
            optimizer.step()
        results.append([params[0].detach(), *optimizer.state[params[0]].values()])
    for alone, beside in zip(*results, strict=True):
        assert torch.equal(alone, beside)


@pytest.fixture
def restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_loops_give_the_same_bits_for_any_number_of_threads(
    second_moment: str, dtype: torch.dtype
) -> None:
    """Adam, the second moments, the parameter update and max|G|; large enough to be split."""
    matrices = Matrices(torch.float32)
    shape = (300, 700)
    start = matrices.state(*shape, second_moment=second_moment)
    param, g = matrices.randn(*shape).to(dtype), matrices.randn(*shape)
    options = matrices.options(second_moment=second_moment)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = {key: value.clone() for key, value in start.items()}
        W = param.clone()
        (update,) = ops.adam_update_([g], [state], options)
        ops.apply_update_([W], [update], [state], [5], options)
        results.append([*state.values(), update, W, ops.grad_max([g], [300])])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.usefixtures("restore_threads")
def test_adamw_and_factor_reductions_give_the_same_bits_for_any_number_of_threads() -> None:
    """The factor update's own reductions and blends: with a 1 x n gradient every product is exact,
    so that no BLAS sums in its own order."""
    matrices = Matrices(torch.float32)
    n = 400
    start = matrices.state(1, n)
    G = torch.zeros(1, n)
    G[0, 17] = 0.5
    vector, grad = matrices.randn(100_000), matrices.randn(100_000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = {key: value.clone() for key, value in start.items()}
        ops.factor_update_([G], [state], matrices.options())
        _, adamw_state, W = run(vector, [grad, grad])
        results.append([*state.values(), *adamw_state.values(), W])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("integrator", ["ksl", "diagonal"])
def test_matrices_side_by_side_are_those_of_one_after_the_other(integrator: str) -> None:
    """More matrices than threads, of unequal size, with a vector, and one that is fresh while the
    others run. BLAS and LAPACK on several threads may round otherwise, as in a trajectory."""
    shapes = [(40, 30), (7, 90), (90, 7), (64, 64), (33,), (20, 20), (2, 130), (50, 60), (3, 3)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        matrices = Matrices(torch.float64)
        params = [torch.nn.Parameter(matrices.randn(*shape)) for shape in shapes]
        start = [param.detach().clone() for param in params]
        optimizer = two_sided(params, integrator=integrator, precondition_frequency=3)
        for step in range(9):
            for param in params:
                param.grad = matrices.randn(*param.shape)
            if step < 2:
                params[5].grad = None
            optimizer.step()
        assert int(optimizer.state[params[0]]["refreshes"].sum()) > 4
        results.append([param.detach() - W for param, W in zip(params, start, strict=True)])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert float((actual - expected).norm()) <= TRAJECTORY * float(expected.norm())
