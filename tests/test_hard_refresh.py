"""Refreshes whose power iteration has dependent columns, on every backend."""

from __future__ import annotations

import math

import backends
import pytest
import torch
from conftest import Matrices
from tolerances import distance, gamma, orthogonality_bound
from torch import Tensor

from dykaf import ops

SIZE = 40
EIGENVALUES = {
    "two decades": torch.logspace(0, -2, SIZE),
    "five decades": torch.logspace(0, -5, SIZE),
    "twelve decades": torch.logspace(0, -12, SIZE),
    "rank 5": torch.cat([torch.logspace(0, -1, 5), torch.zeros(SIZE - 5)]),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(SIZE - 1)]),
    "one high": torch.cat([torch.ones(1), torch.full((SIZE - 1,), 1e-4)]),
}


@pytest.fixture(autouse=True)
def through_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.on_hardware():
        monkeypatch.setattr(ops, "refresh_basis_", backends.through_gpu(ops.refresh_basis_))


def off_diagonal(F: Tensor) -> float:
    return float((F - torch.diag(F.diagonal())).norm())


def refresh(matrices: Matrices, F: Tensor) -> tuple[Tensor, Tensor]:
    """One refresh of the left side from the factor F.

    It must succeed and leave Q_L orthogonal and Q_L L Q_L^T as it was. Returns L before and after.
    """
    state = matrices.state(len(F), 3)
    state["L"].copy_((F + F.T) / (F + F.T).norm())
    before, Q_before = state["L"].double().clone(), state["Q_L"].double().clone()
    ops.refresh_basis_([state], "left", matrices.options())
    after, Q = state["L"].double(), state["Q_L"].double()
    assert state["refresh_fallbacks"] == 0
    bound = orthogonality_bound(len(F), matrices.dtype)
    assert distance(Q.T @ Q, torch.eye(len(F), dtype=torch.float64)) <= 4 * bound
    rotation = gamma(2 * len(F), matrices.dtype) * math.sqrt(len(F))
    expected = Q_before @ before @ Q_before.T
    assert distance(Q @ after @ Q.T, expected) <= 8 * bound + 2 * rotation
    return before, after


@pytest.mark.parametrize("spectrum", EIGENVALUES)
@pytest.mark.parametrize("angle", [1e-3, 0.1, 1.0, math.inf], ids=lambda angle: f"angle {angle}")
def test_a_stale_basis(matrices: Matrices, spectrum: str, angle: float) -> None:
    """The factor's eigenvectors lie about `angle` from the basis; inf: anywhere."""
    skew = torch.randn(SIZE, SIZE, generator=matrices.generator, dtype=torch.float64)
    skew = (skew - skew.T) / math.sqrt(SIZE)
    turned = matrices.orthogonal(SIZE).double()
    U = turned if math.isinf(angle) else torch.matrix_exp(angle * skew)
    before, after = refresh(matrices, (U * EIGENVALUES[spectrum].double()) @ U.T)
    # A step of orthogonal iteration; rounding alone is left where there was little before.
    assert off_diagonal(after) < max(0.7 * off_diagonal(before), gamma(SIZE, matrices.dtype))


@pytest.mark.parametrize("num_zero", [1, SIZE - 1])
def test_directions_without_a_gradient(matrices: Matrices, num_zero: int) -> None:
    """Rows and columns of zeros: these directions stay as they are."""
    F = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    F[num_zero:, num_zero:] = matrices.factor(SIZE - num_zero).double()
    _, after = refresh(matrices, F)
    rank = SIZE - num_zero
    assert float(after[rank:].norm()) <= gamma(SIZE, matrices.dtype)


def test_a_direction_of_rounding_does_not_turn(matrices: Matrices) -> None:
    """Its entries are what a sum of gradients leaves beside a row without one."""
    F = matrices.factor(SIZE).double()
    tiny = torch.ones(SIZE, dtype=torch.float64)
    tiny[0] = 4 * torch.finfo(matrices.dtype).eps
    F = tiny[:, None] * F * tiny
    state = matrices.state(SIZE, 3)
    state["L"].copy_((F + F.T) / (F + F.T).norm())
    old = state["Q_L"].clone()
    ops.refresh_basis_([state], "left", matrices.options())
    assert state["refresh_fallbacks"] == 0
    assert torch.equal(state["Q_L"][:, -1], old[:, 0])  # the least eigenvalue comes last
    assert not torch.equal(state["Q_L"][:, 0], old[:, 1])


def test_columns_of_every_dependence(matrices: Matrices) -> None:
    """From clearly independent to dependent to rounding, with all that lies between."""
    U = matrices.orthogonal(SIZE).double()
    for decades in torch.linspace(2, 8, 61, dtype=torch.float64):
        spectrum = torch.logspace(0, -float(decades), SIZE).double()
        before, after = refresh(matrices, (U * spectrum) @ U.T)
        assert off_diagonal(after) < off_diagonal(before)


@pytest.mark.skipif(not backends.is_gpu(), reason="Householder's decomposition does not fail")
def test_where_damping_does_not_help_the_old_basis_stays(matrices: Matrices) -> None:
    """An indefinite matrix, made so that damping of 0.01 makes its first columns dependent."""
    state = matrices.state(4, 3)
    state["L"].zero_()
    ratio = 0.01 / math.sqrt(2 - 0.01**2)  # 1 + 0.01 hypot(1, b) = b
    b = (1 + ratio) / (1 - ratio)
    state["L"][:2, :2] = torch.tensor([[1, b], [b, 1]]) / math.sqrt(2 * (1 + b**2))
    old = {key: value.clone() for key, value in state.items()}
    ops.refresh_basis_([state], "left", matrices.options())
    assert state["refresh_fallbacks"] == 1
    for key in ("L", "Q_L", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], old[key]), key


def test_a_large_stale_basis(matrices: Matrices) -> None:
    """Large enough for the first pass of the orthonormalisation to leave an error of order one."""
    U = matrices.orthogonal(300).double()
    before, after = refresh(matrices, (U * torch.logspace(0, -12, 300).double()) @ U.T)
    assert off_diagonal(after) < 0.7 * off_diagonal(before)
