"""Each operation against the float64 reference, to the bounds of tolerances.py."""

from __future__ import annotations

import math

import backends
import pytest
import reference
import torch
from conftest import LARGE_SHAPES, SHAPES, Matrices, all_shapes, doubles, factor_shapes
from tolerances import (
    adam_bounds,
    average_bound,
    distance,
    factor_bounds,
    rotate_bound,
    unit_roundoff,
    worst_excess,
)
from torch import Tensor

from dykaf import ops

pytestmark = pytest.mark.usefixtures("through_the_backend")

SCALES = [1e-37, 1e-9, 1e18, 1e37]
GRAD_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("size", [1, 7, 2047, 2048, 2049, 100_000])
def test_grad_max_is_exact_at_any_place(size: int) -> None:
    grads, expected = [], []
    for place in {0, size // 2, size - 1}:
        for dtype in GRAD_DTYPES[1 if backends.is_gpu() else 0 :]:
            grad = torch.linspace(-1, 1, size, dtype=torch.float64).to(dtype)
            grad[place] = -3.25
            grads.append(grad)
            expected.append(3.25)
    assert ops.grad_max(grads, [1] * len(grads)).tolist() == expected


def test_grad_max_of_the_parts_of_a_stack() -> None:
    grad = torch.tensor([[1.0, -2.0], [math.nan, 0.0], [3.0, -math.inf], [0.0, 0.0]])
    maxima = ops.grad_max([grad, grad[:1]], [4, 1])
    assert maxima[[0, 3, 4]].tolist() == [2.0, 0.0, 2.0]
    assert maxima[[1, 2]].isnan().all()


@all_shapes
@pytest.mark.parametrize("into_basis", [True, False])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_rotate(matrices: Matrices, shape: tuple[int, int], into_basis: bool, sides: str) -> None:
    m, n = shape
    state, X = matrices.state(m, n), matrices.randn(m, n)
    for key in {"left": ("R", "Q_R"), "right": ("L", "Q_L"), "both": ()}[sides]:
        del state[key]
    (actual,) = ops.rotate([X], [state], into_basis, matrices.options())
    left = state["Q_L"].double() if "Q_L" in state else None
    right = state["Q_R"].double() if "Q_R" in state else None
    if into_basis:
        left = None if left is None else left.T
    else:
        right = None if right is None else right.T
    expected = X.double()
    expected = expected if left is None else left @ expected
    expected = expected if right is None else expected @ right
    assert worst_excess(actual, expected, rotate_bound(left, X.double(), right, X.dtype)) <= 1


@all_shapes
@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
def test_adam_update(matrices: Matrices, shape: tuple[int, int], second_moment: str) -> None:
    m, n = shape
    betas, eps = (0.9, 0.95), 1e-8
    state, g = matrices.state(m, n, second_moment=second_moment), matrices.randn(m, n)
    old, u = doubles(state), unit_roundoff(matrices.dtype)
    options = matrices.options(second_moment=second_moment, betas=betas, eps=eps)
    (update,) = ops.adam_update_([g], [state], options)

    ref = reference.ReferenceDyKAF(
        torch.zeros(m, n), betas=betas, eps=eps, second_moment=second_moment
    )
    for key in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
        if key in old:
            setattr(ref, key, old[key])
    if second_moment == "rank_one":
        ref.exp_avg_sq_scale = float(old["exp_avg_sq_scale"])
    root = ref._update_second_moment(g.double())
    t = 4
    exp_avg = betas[0] * old["exp_avg"] + (1 - betas[0]) * g.double()
    denominator = root / math.sqrt(1 - betas[1] ** t) + eps
    expected = exp_avg / (1 - betas[0] ** t) / denominator
    if second_moment != "full":
        most = math.sqrt(reference.momentum_bound(betas, t) * (1 - betas[1] ** t))
        most /= 1 - betas[0] ** t
        assert min(m, n) < 4 or (expected.abs() > most).any()
        expected = expected.clamp(-most, most)
    bounds = adam_bounds(
        old["exp_avg"],
        g.double(),
        root.square(),
        expected,
        denominator,
        betas,
        1 - betas[0] ** t,
        matrices.dtype,
    )
    assert worst_excess(update, expected, bounds.update) <= 1
    assert worst_excess(state["exp_avg"], exp_avg, bounds.exp_avg) <= 1
    assert float(state["step"]) == t
    assert float(state["update_rms"]) == pytest.approx(
        float(update.double().square().mean().sqrt()), rel=1e-6
    )
    if second_moment == "full":
        assert worst_excess(state["exp_avg_sq"], ref.exp_avg_sq, bounds.exp_avg_sq) <= 1
    else:
        # Both vectors come from double sums and round once; their old values once before.
        for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
            expected_vector = getattr(ref, key)
            assert worst_excess(state[key], expected_vector, 8 * u * expected_vector) <= 1
    if second_moment == "rank_one":
        scale = ref.exp_avg_sq_scale
        assert float(state["exp_avg_sq_scale"]) == pytest.approx(scale, rel=8 * u)


@all_shapes
def test_apply_update(matrices: Matrices, shape: tuple[int, int]) -> None:
    m, n = shape
    state, param, update = matrices.state(m, n), matrices.randn(m, n), matrices.randn(m, n)
    old = param.double().clone()
    options = matrices.options(lr=0.1, weight_decay=0.3)
    ops.apply_update_([param], [update], [state], [0], options)
    expected = old * (1 - 0.1 * 0.3) - 0.1 * update.double()
    terms = old.abs() + 0.1 * update.double().abs()
    # Two coefficients, two products and one sum round.
    assert worst_excess(param, expected, 3.01 * unit_roundoff(matrices.dtype) * terms) <= 1


@pytest.mark.parametrize(
    ("shape", "scale"),
    [(shape, 1.0) for shape in SHAPES + LARGE_SHAPES]
    + [(shape, scale) for shape in ((1, 1), (33, 17)) for scale in SCALES],
)
@pytest.mark.parametrize("integrator", ["ksl", "bug"])
def test_factor_update(
    matrices: Matrices, shape: tuple[int, int], integrator: str, scale: float
) -> None:
    m, n = shape
    state = matrices.state(m, n)
    state["rho"].fill_(0.7 * scale)
    G = (matrices.randn(m, n).double() * scale).to(matrices.dtype)
    check_factor_update(state, G, integrator, 0.95, matrices)


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
@pytest.mark.parametrize("ratio", [1e-12, 1e12])
def test_factor_update_when_gradient_and_factors_differ_in_size(
    matrices: Matrices, integrator: str, ratio: float
) -> None:
    state = matrices.state(16, 12)
    check_factor_update(state, matrices.randn(16, 12) * ratio, integrator, 0.95, matrices)


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
@pytest.mark.parametrize("rank", [1, 3])
def test_factor_update_with_a_rank_deficient_gradient(
    matrices: Matrices, integrator: str, rank: int
) -> None:
    G = matrices.randn(17, rank) @ matrices.randn(rank, 9)
    check_factor_update(matrices.state(17, 9), G, integrator, 0.8, matrices)


def check_factor_update(
    state: dict[str, Tensor], G: Tensor, integrator: str, beta: float, matrices: Matrices
) -> None:
    old = doubles(state)
    options = matrices.options(integrator=integrator, factor_beta=beta)
    ops.factor_update_([G], [state], options)
    # Float64 holds the squares of float32's range, not those of its own.
    scale = float(G.double().abs().max())
    integrate = {"ksl": reference.ksl_matrix, "bug": reference.bug_matrix}[integrator]
    L, R, rho = integrate(
        old["L"], old["R"], float(old["rho"][0]) / scale, G.double() / scale, beta
    )
    bounds = factor_bounds(
        integrator, old["L"], old["R"], float(old["rho"][0]), G.double(), beta, matrices.dtype
    )
    assert distance(state["L"], L) <= bounds.L
    assert distance(state["R"], R) <= bounds.R
    assert state["rho"].tolist() == pytest.approx([rho * scale] * 2, rel=bounds.rho_L)
    assert torch.equal(state["L"], state["L"].T)
    assert torch.equal(state["R"], state["R"].T)


@factor_shapes
def test_diagonal_factor_update(matrices: Matrices, shape: tuple[int, int]) -> None:
    m, n = shape
    state, G = matrices.state(m, n), matrices.randn(m, n)
    state["rho"][1] = 1.3
    old = doubles(state)
    options = matrices.options(integrator="diagonal", factor_beta=0.95)
    ops.factor_update_([G], [state], options)
    L, R, rho = reference.diagonal_matrix(old["L"], old["R"], old["rho"].tolist(), G.double(), 0.95)
    for key, factor, grad, side in (("L", L, G.double(), 0), ("R", R, G.double().T, 1)):
        bound = average_bound(
            old[key], float(old["rho"][side]), grad, grad.shape[1], 0.95, matrices.dtype
        )
        assert distance(state[key], factor) <= bound
        assert float(state["rho"][side]) == pytest.approx(float(rho[side]), rel=bound)


@factor_shapes
@pytest.mark.parametrize("side", [0, 1])
def test_one_sided_factor_update(matrices: Matrices, shape: tuple[int, int], side: int) -> None:
    m, n = shape
    state, G = matrices.state(m, n), matrices.randn(m, n)
    kept, dropped = (("L", "R"), ("R", "L"))[side]
    del state[dropped], state[f"Q_{dropped}"]
    old = doubles(state)
    ops.factor_update_([G], [state], matrices.options(factor_beta=0.95))
    factor, rho = reference.one_sided_matrix(
        old[kept], float(old["rho"][0]), G.double(), 0.95, side
    )
    grad = G.double() if side == 0 else G.double().T
    bound = average_bound(
        old[kept],
        float(old["rho"][0]),
        grad,
        math.sqrt(grad.shape[1]),
        0.95,
        matrices.dtype,
    )
    assert distance(state[kept], factor) <= bound
    assert state["rho"].tolist() == pytest.approx([rho] * 2, rel=bound)


@pytest.mark.parametrize("integrator", ["ksl", "bug", "diagonal"])
def test_a_zero_gradient_decays_rho_alone(matrices: Matrices, integrator: str) -> None:
    state = matrices.state(5, 4)
    old = doubles(state)
    options = matrices.options(integrator=integrator, factor_beta=0.81)
    ops.factor_update_([torch.zeros(5, 4, dtype=matrices.dtype)], [state], options)
    assert torch.equal(state["L"].double(), old["L"])
    assert torch.equal(state["R"].double(), old["R"])
    assert state["rho"].tolist() == pytest.approx([0.7 * 0.9] * 2, rel=1e-15)


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
def test_a_vanishing_product_keeps_the_factors(matrices: Matrices, integrator: str) -> None:
    """With factor_beta 0 and a gradient orthogonal to the last one, K = G R G^T is 0."""
    options = matrices.options(integrator=integrator, factor_beta=0.0)
    state = matrices.state(4, 3)
    first, second = torch.zeros(2, 4, 3, dtype=matrices.dtype)
    first[0, 0] = second[1, 1] = 1
    ops.factor_update_([first], [state], options)
    old = doubles(state)
    for key in ("L", "R"):  # on a GPU 1 is the sum of its parts, rounded
        error = unit_roundoff(torch.float32) if backends.is_gpu() else 0
        assert abs(float(old[key][0, 0]) - 1) <= error
    ops.factor_update_([second], [state], options)
    for key in ("L", "R", "rho"):
        assert torch.equal(state[key].double(), old[key]), key


@all_shapes
@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
def test_step_is_the_composition_of_the_operations_bit_for_bit(
    matrices: Matrices, shape: tuple[int, int], second_moment: str
) -> None:
    m, n = shape
    state = matrices.state(m, n, second_moment=second_moment)
    state["next_refresh"].copy_(torch.tensor([4, 5]))  # the left side is due at step 4
    param, G = matrices.randn(m, n), matrices.randn(m, n)
    options = matrices.options(second_moment=second_moment, integrator="ksl")
    twin = {key: value.clone() for key, value in state.items()}
    twin_param = param.clone()

    ops.step_([param], [G], ops.grad_max([G], [1]), [state], [0], [(0, 0)], options)

    (rotated,) = ops.rotate([G], [twin], True, options)
    (update,) = ops.adam_update_([rotated], [twin], options)
    (direction,) = ops.rotate([update], [twin], False, options)
    ops.apply_update_([twin_param], [direction], [twin], [0], options)
    ops.factor_update_([rotated], [twin], options)
    ops.refresh_basis_([twin], "left", options)
    twin["next_refresh"][0] = 5  # 4 + max(1, 4 // 10)
    twin["schedule_step"].fill_(4)

    assert torch.equal(param, twin_param)
    for key in state:
        # tau is taken from G in step_ and from the rotated gradient here: a power of two each, so
        # that only rho, whose sum is scaled by it, may round differently.
        # On a GPU update_rms is a sum in another order there, in double.
        if key == "rho":
            assert state[key].tolist() == pytest.approx(twin[key].tolist(), rel=1e-14)
        elif key == "update_rms" and backends.is_gpu():
            u = unit_roundoff(torch.float32)
            assert float(state[key]) == pytest.approx(float(twin[key]), rel=2 * u)
        else:
            assert torch.equal(state[key], twin[key]), key


@pytest.mark.parametrize("place", [0, 1], ids=["first", "between"])
def test_in_a_list_of_several_dtypes_each_matrix_is_as_alone(place: int) -> None:
    """On a GPU several backends serve such a list. The gradient in float64 is so large that next to
    its maximum those of the others would be nothing."""
    kinds = [Matrices(torch.float32, seed) for seed in (1, 2)]
    kinds.insert(place, Matrices(torch.float64, 3))
    shapes = [(6, 4), (5, 7), (4, 9)]
    states = [kind.state(*shape) for kind, shape in zip(kinds, shapes, strict=True)]
    fresh = [kind.zero_state(*shape) for kind, shape in zip(kinds, shapes, strict=True)]
    grads = [kind.randn(*shape) for kind, shape in zip(kinds, shapes, strict=True)]
    grads[place].mul_(1e30)
    options = kinds[0].options()

    def results(chosen: list[int]) -> list[dict[str, Tensor]]:
        G = [grads[i] for i in chosen]
        started = [{key: value.clone() for key, value in fresh[i].items()} for i in chosen]
        running = [{key: value.clone() for key, value in states[i].items()} for i in chosen]
        ops.initialize_(G, started, [(0, 0)] * len(chosen), options)
        updates = ops.adam_update_(G, running, options)
        ops.factor_update_(G, running, options)
        return [
            {"update": D, **new, **{f"first {key}": value for key, value in first.items()}}
            for D, new, first in zip(updates, running, started, strict=True)
        ]

    for i, found in enumerate(results([0, 1, 2])):
        (alone,) = results([i])
        for key in alone:
            assert torch.equal(found[key], alone[key]), (i, key)
        assert not torch.equal(found["L"], states[i]["L"])
