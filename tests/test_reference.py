"""The references checked against each other: dense against matrix form, and known special cases.

Everything here is float64 and of order one. A chain of a few dozen products of at most a few
hundred terms loses about 1e-13; EXACT leaves a factor of ten. Forty optimizer steps amplify a
rounding difference by the conditioning of the bases, hence TRAJECTORY.
"""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import (
    best_kronecker,
    bug_dense,
    bug_matrix,
    diagonal_dense,
    diagonal_matrix,
    fisher_target,
    kronecker,
    kronecker_error,
    ksl_dense,
    ksl_matrix,
    lubich_oseledets,
    next_refresh,
    one_sided_dense,
    one_sided_matrix,
    outer_fisher,
    positive_qr,
    refresh_interval,
    two_sided_reference,
    van_loan,
    van_loan_inverse,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench.textbook import TextbookDyKAF

EXACT = 1e-12
TRAJECTORY = 1e-8
SHAPES = [(4, 4), (3, 5), (6, 2), (1, 4), (5, 1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_psd(d: int, seed: int) -> Tensor:
    X = randn(d, d, seed=seed)
    return X @ X.T / (X @ X.T).norm()


def random_orthogonal(d: int, seed: int) -> Tensor:
    return positive_qr(randn(d, d, seed=seed))


def gradients(m: int, n: int, num_steps: int, seed: int = 0) -> list[Tensor]:
    """A drifting signal with uneven rows and columns, plus noise: no degenerate directions."""
    rows, cols = torch.linspace(1, 3, m).double(), torch.linspace(2, 0.5, n).double()
    signal = randn(m, n, seed=seed + 1000)
    return [
        (math.cos(0.1 * t) * signal + randn(m, n, seed=seed + t)) * rows[:, None] * cols
        for t in range(num_steps)
    ]


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = max(1e-300, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("m, n", SHAPES)
def test_van_loan_of_a_kronecker_product_is_rank_one_and_round_trips(m: int, n: int) -> None:
    L, R = random_psd(m, 1), random_psd(n, 2)
    F = kronecker(L, R, 1.7)
    A = van_loan(F, m, n)
    assert_close(A, 1.7**2 * torch.outer(L.reshape(-1), R.reshape(-1)), EXACT)
    assert torch.equal(van_loan_inverse(A, m, n), F)
    X = randn(m * n, m * n, seed=3)
    assert torch.equal(van_loan_inverse(van_loan(X, m, n), m, n), X)
    G = randn(m, n, seed=4)
    assert_close(torch.kron(L, R) @ G.reshape(-1), (L @ G @ R.T).reshape(-1), EXACT)
    assert_close(van_loan(outer_fisher(G), m, n), torch.kron(G, G), EXACT)


@pytest.mark.parametrize("m, n", SHAPES)
def test_products_with_the_rearranged_target_need_only_the_gradient(m: int, n: int) -> None:
    L, R, G, beta, rho = random_psd(m, 1), random_psd(n, 2), randn(m, n, seed=3), 0.9, 1.3
    A = van_loan(fisher_target(beta, L, R, rho, G), m, n)
    assert_close(A @ R.reshape(-1), (beta * rho**2 * L + 0.1 * G @ R @ G.T).reshape(-1), EXACT)
    assert_close(A.T @ L.reshape(-1), (beta * rho**2 * R + 0.1 * G.T @ L @ G).reshape(-1), EXACT)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("dense, matrix", [(ksl_dense, ksl_matrix), (bug_dense, bug_matrix)])
def test_matrix_form_equals_dense_form(dense, matrix, m: int, n: int) -> None:
    for seed, rho, beta in itertools.product(range(3), (0.0, 0.01, 1.0, 30.0), (0.5, 0.95)):
        L, R, G = random_psd(m, seed), random_psd(n, seed + 10), randn(m, n, seed=seed + 20)
        actual, expected = matrix(L, R, rho, G, beta), dense(L, R, rho, G, beta)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, EXACT)
        assert_close(actual[0].norm(), 1.0, EXACT)
        assert_close(actual[1].norm(), 1.0, EXACT)


@pytest.mark.parametrize("m, n", SHAPES)
def test_one_sided_and_diagonal_matrix_forms_equal_dense_forms(m: int, n: int) -> None:
    L, R, G = random_psd(m, 1), random_psd(n, 2), randn(m, n, seed=3)
    for side, M in enumerate((L, R)):
        actual, expected = (f(M, 0.7, G, 0.9, side) for f in (one_sided_matrix, one_sided_dense))
        assert_close(actual[0], expected[0], EXACT)
        assert_close(actual[1], expected[1], EXACT)
    arguments = (L, R, (0.7, 1.2), G, 0.9)
    actual, expected = diagonal_matrix(*arguments), diagonal_dense(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert_close(torch.as_tensor(a), torch.as_tensor(e), EXACT)


def test_diagonal_is_shampoo() -> None:
    m, n, beta = 4, 6, 0.9
    L, R, G = random_psd(m, 1), random_psd(n, 2), randn(m, n, seed=3)
    L_new, R_new, rho = diagonal_dense(L, R, (2.0, 3.0), G, beta)
    assert_close(rho[0] ** 2 * L_new, beta * 4.0 * L + (1 - beta) * G @ G.T / n, EXACT)
    assert_close(rho[1] ** 2 * R_new, beta * 9.0 * R + (1 - beta) * G.T @ G / m, EXACT)


def test_ksl_error_is_never_above_bug_error() -> None:
    for seed in range(300):
        m, n = 1 + seed % 5, 1 + seed % 4
        L, R, G = random_psd(m, seed), random_psd(n, seed + 1), randn(m, n, seed=seed + 2)
        rho, beta = 10 ** (seed % 7 / 2 - 1.5), (0.5, 0.9, 0.99)[seed % 3]
        F = fisher_target(beta, L, R, rho, G)
        error_ksl = kronecker_error(F, *ksl_matrix(L, R, rho, G, beta))
        error_bug = kronecker_error(F, *bug_matrix(L, R, rho, G, beta))
        error_best = kronecker_error(F, *best_kronecker(F, m, n))
        assert error_ksl <= error_bug + EXACT * float(F.norm())
        assert error_best <= error_ksl + EXACT * float(F.norm())


@pytest.mark.parametrize("update", [ksl_dense, bug_dense])
def test_integrators_are_exact_when_the_target_is_a_kronecker_product(update) -> None:
    # With G = rho c (u v^T), L = u u^T, R = v v^T the target stays a Kronecker product.
    u, v = randn(3, seed=1), randn(4, seed=2)
    u, v = u / u.norm(), v / v.norm()
    L, R, G = torch.outer(u, u), torch.outer(v, v), 2.5 * torch.outer(u, v)
    F = fisher_target(0.9, L, R, 1.5, G)
    assert kronecker_error(F, *update(L, R, 1.5, G, 0.9)) <= EXACT * float(F.norm())


@pytest.mark.parametrize("matrix", [ksl_matrix, bug_matrix])
def test_factors_stay_psd_and_a_zero_gradient_only_decays(matrix) -> None:
    L, R, rho = random_psd(4, 1), random_psd(6, 2), 1.3
    for G in gradients(4, 6, 50):
        L, R, rho = matrix(L, R, rho, G, 0.9)
        assert torch.linalg.eigvalsh(L)[0] >= -EXACT and torch.linalg.eigvalsh(R)[0] >= -EXACT
    L_new, R_new, rho_new = matrix(L, R, rho, torch.zeros(4, 6).double(), 0.9)
    assert_close(L_new, L, EXACT)
    assert_close(R_new, R, EXACT)
    assert_close(rho_new, rho * math.sqrt(0.9), EXACT)


def test_best_kronecker_of_one_gradient_is_its_top_singular_triple() -> None:
    G = randn(3, 5, seed=1)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    L, R, rho = best_kronecker(outer_fisher(G), 3, 5)
    assert_close(rho, float(S[0]), EXACT)
    assert_close(L, torch.outer(U[:, 0], U[:, 0]), EXACT)
    assert_close(R, torch.outer(Vh[0], Vh[0]), EXACT)


def test_schedule() -> None:
    assert [refresh_interval(t, 10, "geometric") for t in (0, 1, 19, 20, 39, 99, 100, 500)] == [
        *(1, 1, 1, 2, 3, 9, 10, 10)
    ]
    assert refresh_interval(0, 7, "fixed") == 7
    assert next_refresh(40, 10, "geometric", None) == 44
    # t itself has the right residue: a full interval
    assert next_refresh(40, 10, "geometric", 0) == 44
    assert next_refresh(40, 10, "geometric", 3) == 43
    assert next_refresh(40, 10, "geometric", 7) == 43
    assert next_refresh(40, 1, "geometric", 5) == 41
    assert next_refresh(40, 7, "fixed", 3) == next_refresh(40, 7, "fixed", None) == 47


OPTIONS = {
    "ksl": {},
    "bug": {"integrator": "bug"},
    "diagonal": {"integrator": "diagonal"},
    "left-only": {"max_precond_dim": 4},
    "right-only": {"max_precond_dim": 4, "integrator": "diagonal"},
    "stagger": {"stagger_offsets": (3, 1)},
    "fixed": {"refresh_schedule": "fixed", "precondition_frequency": 7},
    "rescale": {"rescale_exp_avg_sq": True},
    "rank_one-moment": {"second_moment": "rank_one", "rescale_exp_avg_sq": True},
    "factored": {"second_moment": "factored", "factor_beta": 0.8, "maximize": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trajectories_with_dense_and_matrix_factor_updates_agree(name: str) -> None:
    m, n = (6, 4) if name == "right-only" else (4, 6)
    W = randn(m, n, seed=9)
    options = {"lr": 0.05, "eps": 1e-5, **OPTIONS[name]}
    dense, matrix = two_sided_reference(W, **options, dense=True), two_sided_reference(W, **options)
    for G in gradients(m, n, 41):
        dense.step(G)
        matrix.step(G)
    assert matrix.t == 40
    assert_close(matrix.W - W, dense.W - W, TRAJECTORY)
    assert_close(matrix.exp_avg_rotated, dense.exp_avg_rotated, TRAJECTORY)


@pytest.mark.parametrize("name", ["ksl", "bug", "diagonal", "rescale", "rank_one-moment"])
def test_trajectory_is_equivariant_under_rotations(name: str) -> None:
    d = 5  # square: no basis is completed by unit vectors, which would single out coordinates
    U, V, W = random_orthogonal(d, 1), random_orthogonal(d, 2), randn(d, d, seed=3)
    options = {"lr": 0.05, "eps": 1e-5, **OPTIONS[name]}
    plain, turned = two_sided_reference(W, **options), two_sided_reference(U @ W @ V.T, **options)
    for G in gradients(d, d, 41):
        plain.step(G)
        turned.step(U @ G @ V.T)
    assert_close(U.T @ turned.W @ V - W, plain.W - W, TRAJECTORY)


@pytest.mark.parametrize("name", OPTIONS)
def test_trajectory_does_not_depend_on_the_scale_of_the_gradient(name: str) -> None:
    m, n = (6, 4) if name == "right-only" else (4, 6)
    W = randn(m, n, seed=3)
    plain = two_sided_reference(W, lr=0.05, eps=1e-5, **OPTIONS[name])
    scaled = two_sided_reference(W, lr=0.05, eps=1e25, **OPTIONS[name])
    for G in gradients(m, n, 31):
        plain.step(G)
        scaled.step(1e30 * G)
    assert_close(scaled.W - W, plain.W - W, TRAJECTORY)
    assert_close(scaled.rho[0], 1e30 * plain.rho[0], TRAJECTORY)


@pytest.mark.parametrize("rescale", [False, True])
def test_refresh_in_rotated_form_equals_the_textbook_form(rescale: bool) -> None:
    optimizer = two_sided_reference(
        randn(5, 5, seed=1), refresh_schedule="fixed", precondition_frequency=6,
        rescale_exp_avg_sq=rescale,
    )  # fmt: skip
    for G in gradients(5, 5, 6):
        optimizer.step(G)
    Q, L, V = optimizer.Q_L, optimizer.L, optimizer.exp_avg_sq
    optimizer._refresh(0)
    L_rotated = Q.T @ L @ Q
    order = torch.argsort(L_rotated.diagonal(), descending=True, stable=True)
    P = positive_qr(L_rotated[:, order])
    T = P.T @ L_rotated[:, order]
    assert_close(optimizer.Q_L, Q @ P, EXACT)
    L_new = T @ P[order]  # T Pi^T P
    assert_close(optimizer.L_rotated, L_new, EXACT)
    factor = (L_new.diagonal() / L_rotated.diagonal()[order]).clamp(0.1, 10)
    moved = V[order] * (factor[:, None] if rescale else 1.0)
    C = sum(0.95**k for k in range(5)) * 0.05  # beta1 = beta2 = .95, t = 5
    least = optimizer.exp_avg_rotated.square() / C
    assert (least > moved).any()
    assert_close(optimizer.exp_avg_sq, torch.maximum(moved, least), EXACT)


def test_first_gradient_rules() -> None:
    W, G = randn(4, 6, seed=1), randn(4, 6, seed=2)
    optimizer = two_sided_reference(W, integrator="ksl", factor_beta=0.95)
    optimizer.step(torch.zeros(4, 6))
    assert not optimizer.started and optimizer.L is None
    optimizer.step(G)
    assert torch.equal(optimizer.W, W) and optimizer.t == 0
    assert not optimizer.exp_avg.any() and not optimizer.exp_avg_sq.any()
    # The prior's target is (1 - beta)/beta mean(G^2) I, decayed by beta and met by the gradient.
    beta, mean_square = 0.95, float(G.square().mean())
    prior = (1 - beta) / beta * mean_square * torch.eye(24).double()
    L, R = (torch.eye(d).double() / math.sqrt(d) for d in (4, 6))
    rho = math.sqrt(float(prior.norm()))
    assert_close(kronecker(L, R, rho), prior, EXACT)
    L, R, rho = ksl_dense(L, R, rho, G, beta)
    assert_close(optimizer.L, L, EXACT)
    assert_close(optimizer.R, R, EXACT)
    assert_close(optimizer.rho[1], rho, EXACT)
    # k = 4: the larger basis holds the row space of G, then unit vectors orthogonalised.
    complement = optimizer.Q_R[:, 4:]
    assert float((G @ complement).abs().max()) <= EXACT * float(G.norm())


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
def test_rank_one_init_matches_the_best_approximation(integrator: str) -> None:
    G = randn(3, 5, seed=2)
    optimizer = two_sided_reference(randn(3, 5, seed=1), init="rank_one", integrator=integrator)
    optimizer.step(G)
    L, R, rho = best_kronecker(outer_fisher(G), 3, 5)
    assert_close(optimizer.L, L, EXACT)  # a fixed point: the target's best approximation
    assert_close(optimizer.R, R, EXACT)
    assert_close(optimizer.rho[0], rho, EXACT)
    assert_close(optimizer.L_rotated[0, 0], 1.0, EXACT)


def test_factors_are_set_anew_after_an_underflow() -> None:
    optimizer = two_sided_reference(randn(3, 4, seed=1))
    for G in gradients(3, 4, 5):
        optimizer.step(G)
    fresh = two_sided_reference(randn(3, 4, seed=1))
    fresh.step(G)
    optimizer.next_refresh = [1000, 1000]
    optimizer.rho, bases = [0.0, 0.0], (optimizer.Q_L, optimizer.Q_R)
    L = optimizer.L
    optimizer.step(torch.zeros(3, 4))
    assert optimizer.L is L and optimizer.rho == [0.0, 0.0]
    optimizer.step(G)
    assert_close(optimizer.L, fresh.L, EXACT)
    assert_close(optimizer.rho[0], fresh.rho[0], EXACT)
    assert optimizer.Q_L is bases[0] and optimizer.Q_R is bases[1]


def test_neither_side_kept_is_adamw() -> None:
    W = randn(4, 6, seed=1)
    options = {"lr": 0.01, "betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": 0.1}
    reference = two_sided_reference(W, **options, max_precond_dim=0, second_moment="rank_one")
    parameter = torch.nn.Parameter(W.clone())
    adamw = torch.optim.AdamW([parameter], **options)
    for G in gradients(4, 6, 20):
        reference.step(G)
        parameter.grad = G.clone()
        adamw.step()
    assert_close(reference.W, parameter.detach(), EXACT)


def test_rank_one_second_moment_is_the_dense_splitting() -> None:
    optimizer = two_sided_reference(
        randn(4, 6, seed=1), second_moment="rank_one", precondition_frequency=1000,
        refresh_schedule="fixed",
    )  # fmt: skip
    U, V = torch.full((4,), 0.5).double(), torch.full((6,), 6**-0.5).double()
    s, beta2 = torch.tensor(0.0).double(), 0.95
    for step, G in enumerate(gradients(4, 6, 12)):
        if step > 0:
            increment = (1 - beta2) * (optimizer._rotate(G).square() - s * torch.outer(U, V))
            U, s, V = lubich_oseledets(U, s, V, increment)
        optimizer.step(G)
    actual = optimizer.exp_avg_sq_scale**2 * torch.outer(
        optimizer.exp_avg_sq_row, optimizer.exp_avg_sq_col
    )
    assert_close(actual, s * torch.outer(U, V), EXACT)


def regression(m: int, n: int) -> tuple[Tensor, Tensor]:
    X = randn(200, m, seed=1) * torch.logspace(0, -1.5, m).double()
    return X, X @ randn(m, n, seed=2)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_trains(name: str) -> None:
    # With gradient noise: without it the rank-one second moment is far too small for some
    # entries at the start, and its updates are thousands of times those of the full form.
    m, n = (6, 4) if name == "right-only" else (4, 6)
    X, Y = regression(m, n)
    optimizer = two_sided_reference(torch.zeros(m, n), weight_decay=0.0, **OPTIONS[name])
    for step in range(300):
        optimizer.lr = 0.05 * (1 - step / 300)
        G = X.T @ (X @ optimizer.W - Y) / 200 + 0.1 * randn(m, n, seed=step)
        optimizer.step(-G if optimizer.maximize else G)
    assert float((X @ optimizer.W - Y).square().mean() / Y.square().mean()) < 0.05


def test_textbook_optimizer_trains() -> None:
    X, Y = (t.float() for t in regression(12, 8))
    weight, bias = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((12, 8), (8,)))
    optimizer = TextbookDyKAF([weight, bias], lr=0.05, weight_decay=0.0)
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        loss = (X @ weight + bias - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]


def test_textbook_optimizer_is_the_bug_reference_on_square_matrices() -> None:
    # Square, so that neither first basis has to be completed; decay (placed differently) off.
    W = randn(5, 5, seed=1)
    options = {"lr": 0.05, "eps": 1e-5, "weight_decay": 0.0, "precondition_frequency": 4}
    paper = {"integrator": "bug", "refresh_schedule": "fixed", "factor_beta": None}
    reference = two_sided_reference(W, **options, **paper, rescale_exp_avg_sq=False)
    parameter = torch.nn.Parameter(W.clone())
    textbook = TextbookDyKAF([parameter], bounded=True, **options)
    for G in gradients(5, 5, 31):
        reference.step(G)
        parameter.grad = G.clone()
        textbook.step()
    assert_close(parameter.detach() - W, reference.W - W, TRAJECTORY)
