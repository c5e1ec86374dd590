"""First bases and their refreshes against the float64 reference, to the bounds of tolerances.py."""

from __future__ import annotations

import math

import backends
import pytest
import reference
import torch
from conftest import Matrices, all_shapes, doubles, factor_shapes
from optim_helpers import BOTH
from tolerances import distance, gamma, orthogonality_bound, unit_roundoff, worst_excess
from torch import Tensor

from dykaf import ops

pytestmark = pytest.mark.usefixtures("through_the_backend")


def rotated_back(state: dict[str, Tensor], key: str) -> Tensor:
    Q = state[f"Q_{key}"].double()
    return Q @ state[key].double() @ Q.T


@all_shapes
def test_the_rank_one_init_has_the_units_of_the_averages(
    matrices: Matrices, shape: tuple[int, int]
) -> None:
    """Of a gradient of rank one it is G G^T / n and G^T G / m themselves."""
    m, n = shape
    G = torch.outer(matrices.randn(m), matrices.randn(n))
    state = matrices.zero_state(m, n)
    options = matrices.options(init="rank_one", integrator="diagonal")
    ops.initialize_([G], [state], [(0, 0)], options)
    G = G.double()
    error = 8 * gamma(4 * (m + n), matrices.dtype) * math.sqrt(max(m, n))
    for side, (key, expected) in enumerate((("L", G @ G.T / n), ("R", G.T @ G / m))):
        found = float(state["rho"][side]) ** 2 * rotated_back(state, key)
        assert distance(found, expected) <= error * float(expected.norm())


@all_shapes
@pytest.mark.parametrize("init", ["identity", "rank_one"])
@pytest.mark.parametrize("integrator", ["ksl", "bug", "diagonal"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_initialize(
    matrices: Matrices, shape: tuple[int, int], init: str, integrator: str, scale: float
) -> None:
    m, n = shape
    G = (matrices.randn(m, n).double() * scale).to(matrices.dtype)
    state = matrices.zero_state(m, n)
    options = matrices.options(init=init, integrator=integrator)
    ops.initialize_([G], [state], [(0, 0)], options)
    ref = reference.ReferenceDyKAF(torch.zeros(m, n), **BOTH, init=init, integrator=integrator)
    ref._first_gradient(G.double() / scale)

    # Gradient products as in factor_update, a rotation each way and, with "rank_one", an SVD whose
    # vectors turn by its rounding over the gap of the largest singular values.
    singular = torch.linalg.svdvals(G.double() / scale)
    gap = float(singular[0] - singular[1]) / float(singular[0]) if min(m, n) > 1 else 1.0
    error = 8 * gamma(4 * (m + n), matrices.dtype) * math.sqrt(max(m, n))
    error /= gap if init == "rank_one" else 1
    for side, (key, size) in enumerate((("L", m), ("R", n))):
        assert distance(rotated_back(state, key), getattr(ref, key)) <= error
        assert float(state["rho"][side]) / scale == pytest.approx(ref.rho[side], rel=error)
        Q = state[f"Q_{key}"].double()
        identity = torch.eye(size, dtype=torch.float64)
        assert distance(Q.T @ Q, identity) <= orthogonality_bound(size, matrices.dtype)
        rank = 1 if init == "rank_one" and integrator != "diagonal" else min(m, n)
        # In the basis: diagonal descending, the gradient's part decoupled from the prior's.
        F = state[key].double()
        assert distance(F[:rank, :rank], torch.diag(F.diagonal()[:rank])) <= error
        assert float(F[:rank, rank:].norm()) <= error
        assert (F.diagonal()[: rank - 1] - F.diagonal()[1:rank] >= -error).all()
        completion = reference.positive_qr(
            torch.cat([Q[:, :rank], identity[:, : size - rank]], dim=1)
        )
        triangle = Q.T @ completion
        # The completion is fixed up to the conditioning of [v | e]: compare what it leaves.
        expected = torch.linalg.qr(torch.cat([Q[:, :rank], identity[:, : size - rank]], 1)).R
        smallest = float(expected.diagonal().abs().min()) if size else 1.0
        assert distance(triangle, identity) <= orthogonality_bound(size, matrices.dtype) / smallest
    assert float(state["step"]) == 0 and not state["exp_avg"].any()
    assert state["next_refresh"].tolist() == [1, 1]


@factor_shapes
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rescale", [False, True])
def test_refresh_basis(
    matrices: Matrices, shape: tuple[int, int], side: str, rescale: bool
) -> None:
    """Q_old^T Q_new = P must be orthogonal with P^T F Pi upper triangular; all else follows P."""
    m, n = shape
    key, size, axis = ("L", m, 0) if side == "left" else ("R", n, 1)
    state = matrices.state(m, n)
    old = doubles(state)
    ops.refresh_basis_([state], side, matrices.options(rescale_exp_avg_sq=rescale))
    new = doubles(state)
    bound = orthogonality_bound(size, matrices.dtype)
    rotation = gamma(2 * size, matrices.dtype) * math.sqrt(size)

    P = old[f"Q_{key}"].T @ new[f"Q_{key}"]
    identity = torch.eye(size, dtype=torch.float64)
    assert distance(P.T @ P, identity) <= 4 * bound
    order = torch.argsort(old[key].diagonal(), descending=True, stable=True)
    triangle = P.T @ old[key][:, order]
    assert float(triangle.tril(-1).norm()) <= 4 * bound + rotation
    assert (triangle.diagonal() >= -bound).all()
    assert distance(new[key], P.T @ old[key] @ P) <= 4 * bound + 2 * rotation
    assert torch.equal(new[key], new[key].T)
    expected = P.T @ old["exp_avg"] if side == "left" else old["exp_avg"] @ P
    assert distance(new["exp_avg"], expected) <= (4 * bound + rotation) * float(expected.norm())

    moved = old["exp_avg_sq"].index_select(axis, order)
    if rescale:
        growth = (new[key].diagonal() / old[key].diagonal()[order]).clamp(0.1, 10)
        moved = moved * (growth[:, None] if side == "left" else growth)
    # Of the state's step 3 and betas of .95, E10: the momentum's square needs that much. C loses
    # some digits of float64 as 1 - q^t over 1 - q.
    least = new["exp_avg"].square() / reference.momentum_bound((0.95, 0.95), 3)
    assert size < 16 or ((least > moved).any() and (moved > least).any())
    error = 3 * unit_roundoff(matrices.dtype) + 64 * unit_roundoff(torch.float64)
    expected = torch.maximum(moved, least)
    assert worst_excess(new["exp_avg_sq"], expected, error * expected) <= 1
    other = 1 - axis
    assert new["refreshes"][axis] == 1 and new["refreshes"][other] == 0
    untouched = ("R", "Q_R") if side == "left" else ("L", "Q_L")
    for name in untouched:
        assert torch.equal(new[name], old[name])


@pytest.mark.parametrize("second_moment", ["rank_one", "factored"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rescale", [False, True])
def test_refresh_moves_the_compact_second_moment_as_the_full_one(
    matrices: Matrices, second_moment: str, side: str, rescale: bool
) -> None:
    m, n = 7, 5
    state = matrices.state(m, n, second_moment=second_moment)
    if second_moment == "factored":
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        col.mul_(row.mean() / col.mean())  # both are means of the same matrix
    options = matrices.options(second_moment=second_moment, rescale_exp_avg_sq=rescale)

    def dense() -> Tensor:
        V = torch.outer(state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double())
        if second_moment == "rank_one":
            return V * float(state["exp_avg_sq_scale"]) ** 2
        return V / float(state["exp_avg_sq_row"].double().mean())

    key, axis = ("L", 0) if side == "left" else ("R", 1)
    old, before = doubles(state), dense()
    ops.refresh_basis_([state], side, options)
    order = torch.argsort(old[key].diagonal(), descending=True, stable=True)
    expected = before.index_select(axis, order)
    if rescale:
        growth = (state[key].double().diagonal() / old[key].diagonal()[order]).clamp(0.1, 10)
        expected = expected * (growth[:, None] if side == "left" else growth)
    u = unit_roundoff(matrices.dtype)
    assert worst_excess(dense(), expected, (8 + m + n) * u * expected) <= 1
    if second_moment == "factored":
        means = [float(state[f"exp_avg_sq_{name}"].double().mean()) for name in ("row", "col")]
        assert means[0] == pytest.approx(means[1], rel=(8 + m + n) * u)


def test_initialize_waits_for_a_gradient_that_is_not_zero(matrices: Matrices) -> None:
    state = matrices.zero_state(4, 3)
    zero = torch.zeros(4, 3, dtype=matrices.dtype)
    ops.initialize_([zero], [state], [(0, 0)], matrices.options())
    if backends.is_gpu():  # which the host will not wait for again
        assert state["next_refresh"].tolist() == [-2, -2]
        state["next_refresh"].zero_()
    assert not any(bool(value.any()) for value in state.values())


def test_a_failed_refresh_keeps_the_old_basis_and_counts(matrices: Matrices) -> None:
    state = matrices.state(4, 3)
    state["L"][1, 2] = math.nan
    old = {key: value.clone() for key, value in state.items()}
    ops.refresh_basis_([state], "left", matrices.options())
    assert state["refresh_fallbacks"] == 1
    for key in ("Q_L", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], old[key]), key


def test_a_failed_first_basis_is_the_identity_and_counts(matrices: Matrices) -> None:
    state = matrices.zero_state(3, 5)
    G = torch.full((3, 5), math.nan, dtype=matrices.dtype)
    ops.initialize_([G], [state], [(0, 0)], matrices.options())
    assert state["refresh_fallbacks"] == 1
    assert torch.equal(state["Q_R"], torch.eye(5, dtype=matrices.dtype))
