"""Error bounds of the operations, from the rounding of each of their sums and products.

u is the unit roundoff of the dtype and gamma(k) = k u / (1 - k u) bounds the relative error of a
sum of k products in any order (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1). Reductions run in double and add nothing to float32 results. All inputs are exact.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

# Float64 trajectories against the reference, relative to the distance travelled. Each of up to 50
# steps rounds by up to gamma(65) ~ 1e-14; refreshes amplify by the ratio of neighbouring
# eigenvalues' size to their gap, 1e4 for the closest pairs in random factors of these shapes.
TRAJECTORY = 1e-9


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(k: int, dtype: torch.dtype) -> float:
    ku = k * unit_roundoff(dtype)
    return ku / (1 - ku)


def rotate_bound(
    left: Tensor | None, X: Tensor, right: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Entrywise bound on the error of left X right, one sum of length m and one of length n."""
    bound, length = X.abs(), 0
    if left is not None:
        bound, length = left.abs() @ bound, length + X.shape[0]
    if right is not None:
        bound, length = bound @ right.abs(), length + X.shape[1]
    return gamma(length + 1, dtype) * bound


@dataclass
class AdamBounds:
    exp_avg: Tensor
    exp_avg_sq: Tensor
    update: Tensor


def adam_bounds(
    exp_avg: Tensor,
    g: Tensor,
    exp_avg_sq: Tensor,
    update: Tensor,
    denominator: Tensor,
    betas: tuple[float, float],
    correction1: float,
    dtype: torch.dtype,
) -> AdamBounds:
    """Bounds for one Adam step from exact state.

    exp_avg: two rounded coefficients, two products, one sum: 3 u per term, absolutely (the terms
    may cancel). exp_avg_sq: all terms positive, 5 u. The denominator: half of this, and a root, a
    coefficient, a product, eps and a sum: 8 u; the quotient and its coefficient 3 u more. The
    compact second moments round their two vectors and roots as well: 6 u.

    Args:
        exp_avg, exp_avg_sq: before and after the step.
        denominator: sqrt(v) / sqrt(1 - beta2^t) + eps.
    """
    u = 1.01 * unit_roundoff(dtype)
    terms = betas[0] * exp_avg.abs() + (1 - betas[0]) * g.abs()
    return AdamBounds(
        exp_avg=3 * u * terms,
        exp_avg_sq=5 * u * exp_avg_sq,
        update=3 * u * terms / correction1 / denominator + 17 * u * update.abs(),
    )


@dataclass
class FactorBounds:
    """Frobenius norms of the errors of L and R, relative error of rho (per side)."""

    L: float
    R: float
    rho_L: float
    rho_R: float


def _product_error(H: Tensor, M: Tensor, dtype: torch.dtype) -> float:
    """||error of H M H^T||_F: two sums as long as the side of M."""
    magnitude = H.abs() @ M.abs() @ H.abs().T
    return gamma(2 * M.shape[0] + 2, dtype) * float(magnitude.norm())


def _factor_error(
    a: float, F: Tensor, b: float, P: Tensor, product_error: float, u: float
) -> float:
    """Frobenius norm of the error of K / ||K||, K = a F + b P.

    Coefficients, products, sum and the factors' own departure from unit norm: 8 u of the terms. An
    error e of K turns its direction and its norm by e / ||K|| each.
    """
    K = a * F + b * P
    rounding = 8 * u * (a * float(F.norm()) + b * float(P.norm()))
    return 2 * (b * product_error + rounding) / float(K.norm())


def factor_bounds(
    integrator: str, L: Tensor, R: Tensor, rho: float, G: Tensor, beta: float, dtype: torch.dtype
) -> FactorBounds:
    """Bounds for one splitting step from exact state, "ksl" or "bug"; float64 arguments."""
    u = unit_roundoff(dtype)
    tau = max(float(G.abs().max()), rho)
    H, a, b = G / tau, beta * (rho / tau) ** 2, 1 - beta
    P_L = H @ R @ H.T
    error_L = _factor_error(a, L, b, P_L, _product_error(H, R, dtype), u)
    K = a * L + b * P_L
    if integrator == "ksl":
        U = K / K.norm()
        P_R = H.T @ U @ H
        c = a * float((U * L).sum())
        # The error of U enters c by a and the product by ||H||_2^2.
        carried = error_L * (a / b + float(torch.linalg.matrix_norm(H, 2)) ** 2) if b > 0 else 0.0
        error_R = _factor_error(c, R, b, P_R, _product_error(H.T, U, dtype) + carried, u)
        return FactorBounds(error_L, error_R, error_R, error_R)
    P_R = H.T @ L @ H
    error_R = _factor_error(a, R, b, P_R, _product_error(H.T, L, dtype), u)
    J = a * R + b * P_R
    U, V = K / K.norm(), J / J.norm()
    s = a * float((U * L).sum() * (V * R).sum()) + b * float((U * (H @ V @ H.T)).sum())
    size = a + b * float(H.norm()) ** 2  # bounds the target's norm
    error_s = size * (error_L + error_R + gamma(4 * sum(G.shape), dtype))
    return FactorBounds(error_L, error_R, error_s / s, error_s / s)


def average_bound(
    M: Tensor, rho: float, G: Tensor, size: float, beta: float, dtype: torch.dtype
) -> float:
    """The same for one factor of "diagonal" and one-sided updates: increment G G^T / size."""
    u = unit_roundoff(dtype)
    tau = max(float(G.abs().max()), rho)
    H, a, b = G / tau, beta * (rho / tau) ** 2, (1 - beta) / size
    magnitude = float((H.abs() @ H.abs().T).norm())
    return _factor_error(a, M, b, H @ H.T, gamma(G.shape[1] + 2, dtype) * magnitude, u)


def orthogonality_bound(n: int, dtype: torch.dtype) -> float:
    """||Q^T Q - I||_F of a Householder QR of an n x n matrix.

    n reflectors, each orthogonal to 8 u, act on n columns; their errors add like a random walk in
    each column: 8 u sqrt(n) sqrt(n), and as much again for a Q of the input's own rounding.
    """
    return 16 * n * unit_roundoff(dtype)


def newton_schulz_growth(X: Tensor, steps: int) -> float:
    """By how much a small error of X grows in Newton-Schulz steps, in the Frobenius norm.

    They map the singular values by f. The derivative scales what an error has between the i-th and
    the j-th singular vectors by (f_i - f_j) / (s_i - s_j) and (f_i + f_j) / (s_i + s_j), f' for
    i = j, and what it has beyond them by f_i / s_i (Noferini 2017). f' is 3.4445^steps at 0.
    """
    s = torch.linalg.svdvals(X)
    f, derivative = s, torch.ones_like(s)
    for _ in range(steps):
        derivative = derivative * (3.4445 - 3 * 4.7750 * f**2 + 5 * 2.0315 * f**4)
        f = 3.4445 * f - 4.7750 * f**3 + 2.0315 * f**5
    rows, columns = torch.triu_indices(len(s), len(s), 1)
    differences = (f[rows] - f[columns]) / (s[rows] - s[columns])
    sums = (f[rows] + f[columns]) / (s[rows] + s[columns])
    growths = torch.cat([derivative, differences, sums, f / s])
    return float(growths.nan_to_num(0).abs().max())


def newton_schulz_bound(U: Tensor, steps: int, dtype: torch.dtype, least_rms: float = 0.0) -> float:
    """||error of ops.orthogonalize_||_F for a float64 U, which `dtype` holds.

    X = U / ||U|| rounds by 4 u. Its division by ||X X^T||^(1/2), with `least_rms` > 0, rounds by
    more and takes over half the relative error of the norm. In a step A and A^2 are sums as long as
    the short side's rows and columns, and enter b A + c A^2, whose product with X is one more;
    coefficients and sums are 4 u of each term. A GPU's 3xTF32 leaves out 16 u of each product. What
    each step adds grows in those that follow; terms of second order are a tenth at most.
    """
    u = unit_roundoff(dtype)
    short, long = sorted(U.shape)
    X = U / U.norm()
    X = X if U.shape[0] <= U.shape[1] else X.T
    start = 4 * u
    if least_rms > 0:
        norm = float((X @ X.T).norm())
        start += 4 * u + 0.5 * gamma(long + 16, dtype) * float((X.abs() @ X.abs().T).norm()) / norm
        X = X / norm**0.5
    total = start * float(X.norm()) * newton_schulz_growth(X, steps)
    for step in range(steps):
        A = X @ X.T
        B = -4.7750 * A + 2.0315 * A @ A
        error_A = gamma(long + 16, dtype) * float((X.abs() @ X.abs().T).norm())
        error_B = 2.0315 * gamma(short + 16, dtype) * float((A.abs() @ A.abs()).norm())
        error_B += 4 * u * (4.7750 * float(A.norm()) + 2.0315 * float((A @ A).norm()))
        error_B += (4.7750 + 2 * 2.0315 * float(torch.linalg.matrix_norm(A, 2))) * error_A
        error = gamma(short + 16, dtype) * float((B.abs() @ X.abs()).norm())
        error += 4 * u * (3.4445 * float(X.norm()) + float((B @ X).norm()))
        error += error_B * float(torch.linalg.matrix_norm(X, 2))
        X = 3.4445 * X + B @ X
        total += error * newton_schulz_growth(X, steps - step - 1)
    scale = 0.2 * max(U.shape) ** 0.5
    if least_rms > 0:
        scale *= min(1, float(U.square().mean().sqrt()) / least_rms)
    return 1.1 * scale * (total + 2 * u * float(X.norm()))


# Largest relative error seen, ||actual - expected||_F / ||expected||_F, by test and dtype; pytest
# --deviations prints it.
DEVIATIONS: dict[tuple[str, str], float] = {}


def _record(error: Tensor, expected: Tensor) -> None:
    test, _, case = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].partition("[")
    dtype = next((name for name in ("float32", "float64") if name in case), "")
    norm = float(expected.norm())
    if norm > 0:
        relative = float(error.norm()) / norm
        DEVIATIONS[test, dtype] = max(relative, DEVIATIONS.get((test, dtype), 0.0))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the error."""
    error = actual.double() - expected
    _record(error, expected)
    return float(error.norm())


def worst_excess(actual: Tensor, expected: Tensor, bound: Tensor) -> float:
    """max |actual - expected| / bound, where nothing may exceed 1; equal entries need no bound."""
    error = (actual.double() - expected).abs()
    _record(error, expected)
    ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
    return float(ratio.max())
