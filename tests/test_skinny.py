"""skinny_rank: the factor of a long side kept at a low rank."""

from __future__ import annotations

import copy
from typing import Any

import backends
import pytest
import torch
from optim_helpers import bits, params_of, refuses, state_bits, two_sided
from skinny_reference import ReferenceSkinny
from tolerances import TRAJECTORY, gamma, orthogonality_bound, unit_roundoff
from torch import Tensor, nn

from dykaf import DyKAF, ops
from dykaf.options import step_options
from dykaf.state import HOST_KEYS, Layout

only_float64 = pytest.mark.skipif(
    "not __import__('backends').takes_float64()", reason="not of the CUDA kernels"
)

SHORT, LONG, RANK = 4, 90, 16


def widest() -> torch.dtype:
    return torch.float64 if backends.takes_float64() else torch.float32


def gradients(num: int, shape: tuple[int, int] = (SHORT, LONG), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, shape[1], dtype=torch.float64)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scales for _ in range(num)
    ]


def make(W: Tensor, **options: Any) -> DyKAF:
    W = W.to(backends.device(), widest() if W.dtype == torch.float64 else W.dtype, copy=True)
    return two_sided([nn.Parameter(W)], **{"skinny_rank": RANK, "eps": 1e-6, **options})


def param_of(optimizer: DyKAF) -> Tensor:
    return params_of(optimizer)[0]


def step(optimizer: DyKAF, G: Tensor) -> None:
    param_of(optimizer).grad = G.to(param_of(optimizer))
    optimizer.step()


def long_factor(optimizer: DyKAF) -> Tensor:
    """The long side's average, in the original coordinates and in gradient units; float64."""
    state = {k: v.cpu().double() for k, v in optimizer.state[param_of(optimizer)].items()}
    basis, core = state["basis"], state["core"]
    R = state["flat"] * torch.eye(basis.shape[-1]).to(basis) + basis.T @ core @ basis
    return R * state["rho"][1] ** 2


def rounding(steps: int, dtype: torch.dtype | None = None) -> float:
    """Of a factor over some steps with as many refreshes: products, and a QR and its use."""
    dtype = dtype or widest()
    return steps * (gamma(SHORT + LONG, dtype) + 2 * orthogonality_bound(LONG, dtype))


def initial(seed: int = 9) -> Tensor:
    return gradients(1, seed=seed)[0]


@only_float64
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("rescale", "nesterov"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("frequency", [1, 5, 1000])
def test_trajectory(tall: bool, rescale: bool, nesterov: bool, frequency: int) -> None:
    """Against the dense textbook form, also where the rows are full before a refresh is due."""
    W = initial()
    options = {"precondition_frequency": frequency, "rescale_exp_avg_sq": rescale}
    options["nesterov"] = nesterov
    optimizer = make(W.T if tall else W, **options)
    left, right = optimizer._stagger_offsets()[0]
    options["stagger_offsets"] = (right, left) if tall else (left, right)
    ref = ReferenceSkinny(W, RANK, eps=1e-6, long_first=tall, **options)
    travelled = 0.0
    # With a long period intervals grow to 8 steps, and 4 gradients fill the rows.
    for G in gradients(80 if frequency == 1000 else 40):
        before = ref.W
        ref.step(G)
        step(optimizer, G.T if tall else G)
        travelled += float((ref.W - before).norm())
        found = param_of(optimizer).detach()
        error = float(((found.T if tall else found) - ref.W).norm())
        assert error <= TRAJECTORY * travelled
    state = optimizer.state[param_of(optimizer)]
    assert state["rows"][0] == RANK and state["rows"][1] + SHORT <= 2 * RANK
    if not tall:
        assert float((long_factor(optimizer) - ref.R).norm()) <= TRAJECTORY * float(ref.R.norm())
    average = state["R" if tall else "L"] * state["rho"][1 if tall else 0] ** 2
    Q = state["Q_R" if tall else "Q_L"]
    assert float((Q @ average @ Q.T - ref.L).norm()) <= TRAJECTORY * float(ref.L.norm())


def step_errors(ref: ReferenceSkinny, G: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Entrywise bounds on the errors of the next step in `dtype` from the state in `ref`.

    From there on `ref` is exact: sums of k products err by gamma(k) of their absolute terms. What
    Q and V lack of orthogonality counts where `ref` goes through original coordinates.
    """
    u = unit_roundoff(dtype)
    short, long = G.shape
    Q, V, inner = ref.Q, ref.V, ref.V.shape[1]
    lack_Q = (Q.T @ Q - torch.eye(short)).abs()
    lack_V = float((V.T @ V - torch.eye(inner)).norm())
    X, M = Q.T @ G, Q.T @ ref.exp_avg
    X_error = gamma(short + 1, dtype) * Q.T.abs() @ G.abs()
    noise = 16 * u * short**0.5 * G.abs().max()  # below it entries count as zero
    X_error += torch.where(X.abs() <= noise + X_error, X.abs(), 0.0)
    M_error = 0.05 * X_error + 3 * u * (M.abs() + X.abs()) + lack_Q @ M.abs()
    M = 0.95 * M + 0.05 * X
    # The numerator N, of exp_avg and the gradient; either is multiplied by V.
    correction = 1 / (1 - 0.95 ** (ref.t + 1))
    of_M, of_X = (0.95 * correction, 0.05) if ref.nesterov else (correction, 0.0)
    N, terms = of_M * M + of_X * X, of_M * M.abs() + of_X * X.abs()
    N_error = of_M * M_error + of_X * X_error + 4 * u * terms
    XV, NV = X @ V, N @ V
    XV_error = gamma(long, dtype) * X.abs() @ V.abs() + X_error @ V.abs()
    NV_error = gamma(long, dtype) * terms @ V.abs() + N_error @ V.abs()
    squares = X.square().sum(1)
    rest_error = 2 * (X.abs() * X_error).sum(1) + 2 * (XV.abs() * XV_error).sum(1)
    rest_error = (rest_error + (gamma(long + 8, dtype) + lack_V) * squares) / (long - inner)
    rest = (X - XV @ V.T).square().sum(1) / (long - inner)
    v, v_rest = 0.95 * ref.v + 0.05 * XV.square(), 0.95 * ref.v_rest + 0.05 * rest
    v_error = 0.1 * XV.abs() * XV_error + 6 * u * v
    v_rest_error = 0.05 * rest_error + 8 * u * v_rest

    def weight(v: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        root = (v / (1 - 0.95 ** (ref.t + 1))).sqrt() + ref.eps
        return 1 / root, (error / v / 2 + 10 * u) / root

    within, within_error = weight(v, v_error)
    beyond, beyond_error = (x[:, None] for x in weight(v_rest, v_rest_error))
    coefficients = NV_error * (within + beyond) + NV.abs() * (within_error + beyond_error)
    coefficients += gamma(inner + 2, dtype) * NV.abs() * (within + beyond)
    D_error = coefficients @ V.T.abs() + N_error * beyond + N.abs() * beyond_error
    D = NV * within @ V.T + (N - NV @ V.T) * beyond
    update_error = Q.abs() @ D_error + gamma(short + 2, dtype) * Q.abs() @ D.abs()
    gram = G.norm() * (X_error.norm() + float(lack_Q.norm()) * G.norm())
    return {
        "exp_avg": Q.abs() @ M_error,
        "v": v_error,
        "v_rest": v_rest_error,
        "W": ref.lr * update_error + 4 * u * ref.W.abs(),
        "L": (2 * gram + gamma(long, dtype) * G.norm() ** 2) / long + 8 * u * ref.L.norm(),
        "R": 2 * gram / short + 8 * u * ref.R.norm(),
    }


# Tails of every kind of tile, multiples of four or not, one row, and several pieces of a side.
STEP_SHAPES = [(1, 40, 7), (4, 90, 16), (3, 515, 9), (16, 512, 48), (17, 290, 51), (33, 529, 99)]


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("scale", "nesterov"), [(1.0, False), (2.0**-30, False), (1.0, True)])
@pytest.mark.parametrize(("short", "long", "rank"), STEP_SHAPES)
def test_a_step(short: int, long: int, rank: int, scale: float, nesterov: bool, tall: bool) -> None:
    """From a state in the middle of a run, against the dense form in float64."""
    options = {"eps": 1e-3 * scale, "nesterov": nesterov}
    W, *grads = (x.T if tall else x for x in gradients(5, (short, long)))
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 2}
    optimizer = make(W.float(), skinny_rank=rank, **schedule, **options)
    for G in grads:
        step(optimizer, scale * G)
    param, state = param_of(optimizer), optimizer.state[param_of(optimizer)]
    assert state["refreshes"].min() > 0 and state["rows"][1] > state["rows"][0]
    optimizer.param_groups[0]["precondition_frequency"] = 1000
    state["next_refresh"].fill_(1000)
    G = scale * gradients(1, (short, long), seed=5)[0].float().double()
    ref = ReferenceSkinny.from_state(param, state, **options)
    bounds, W_before, V_before = step_errors(ref, G, torch.float32), ref.W, ref.V
    ref.step(G)
    step(optimizer, G.T if tall else G)
    after = ReferenceSkinny.from_state(param, state, **options)
    for name, bound in bounds.items():
        error = getattr(after, name) - getattr(ref, name)
        if bound.dim() == 0:
            assert error.norm() <= bound, name
        else:
            assert (error.abs() <= bound).all(), name
    assert torch.equal(after.V, V_before)
    # The bound says something.
    assert bounds["W"].norm() < 0.05 * (ref.W - W_before).norm()


def test_it_is_the_dense_form_while_the_rank_suffices() -> None:
    """The factor itself, for any gradients, until more directions came than are kept."""
    W = initial()
    skinny = make(W, skinny_rank=40, precondition_frequency=1)
    dense = make(W, skinny_rank=0, precondition_frequency=1)
    for G in gradients(10):
        step(skinny, G)
        step(dense, G)
        state = dense.state[param_of(dense)]
        R, Q, rho = (state[key].cpu().double() for key in ("R", "Q_R", "rho"))
        # Each in the norm that it is kept in: unit trace here, unit length there.
        expected = Q @ R @ Q.T * rho[1] ** 2
        error = float((long_factor(skinny) - expected).norm())
        assert error <= rounding(10) * float(expected.norm())
    assert skinny.state[param_of(skinny)]["refreshes"][1] > 3


def test_updates_are_the_dense_ones_for_gradients_of_one_row_space() -> None:
    """Nothing lies outside of the basis then: the way in which the rest is averaged has no part.

    The rest is floored at 4 epsilon of the gradient's square and the momentum's part there is of
    its rounding, so updates differ by up to the root of epsilon. (In float32 eps must keep the
    dense form from making updates of rounding.)
    """
    W = initial()
    rows = gradients(1, seed=5)[0]
    options = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    options["eps"] = 1e-2 if backends.is_gpu() else 1e-6
    skinny = make(W, **options)
    dense = make(W, skinny_rank=0, **options)
    travelled = 0.0
    for mix in gradients(40, shape=(SHORT, SHORT)):
        before = param_of(dense).detach().clone()
        step(skinny, mix @ rows)
        step(dense, mix @ rows)
        travelled += float((param_of(dense).detach() - before).norm())
        error = float((param_of(skinny) - param_of(dense)).detach().norm())
        assert error <= torch.finfo(widest()).eps ** 0.5 * travelled


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_size_of_gradients_does_not_matter(scale: float) -> None:
    """With eps = 0, powers of two leave every bit of the updates; squares stay far from limits."""
    W = initial().float()
    plain, scaled = (make(W, eps=0.0) for _ in range(2))
    for G in gradients(25):
        step(plain, G)
        step(scaled, G * scale)
        assert torch.equal(param_of(plain), param_of(scaled))


@pytest.mark.parametrize("scale", [1e-44, 1e38])
@pytest.mark.parametrize("num_rows", [1, SHORT])
def test_extreme_gradients_give_finite_updates(scale: float, num_rows: int) -> None:
    optimizer = make(initial().float(), eps=1e-30)
    for G in gradients(15):
        G[num_rows:] = 0
        step(optimizer, (G / G.abs().max()) * scale)
        assert param_of(optimizer).isfinite().all()
        state = optimizer.state[param_of(optimizer)]
        assert all(state[key].isfinite().all() for key in ("L", "Q_L", "basis", "core", "flat"))


def test_zero_gradients_decay_the_averages_alone() -> None:
    """The first one that is not zero starts; later ones add rows that weigh nothing."""
    optimizer = make(initial())
    step(optimizer, torch.zeros(SHORT, LONG))
    assert not optimizer.state[param_of(optimizer)]["rows"].any()
    for G in gradients(6):
        step(optimizer, G)
    before = long_factor(optimizer)
    for _ in range(30):  # with refreshes
        step(optimizer, torch.zeros(SHORT, LONG))
    after = long_factor(optimizer)
    error = float((after - 0.9**30 * before).norm())
    assert error <= rounding(30) * 0.9**30 * float(before.norm())


def test_averages_that_have_vanished_start_again() -> None:
    optimizer = make(initial())
    for G in gradients(6):
        step(optimizer, G)
    state = optimizer.state[param_of(optimizer)]
    state["rho"].zero_()  # as after thousands of zero gradients
    step(optimizer, torch.zeros(SHORT, LONG))
    assert not state["rho"].any()
    assert state["core"].isfinite().all() and state["L"].isfinite().all()
    G = initial()
    step(optimizer, G)
    expected = 0.1 * G.T @ G / SHORT
    assert float((long_factor(optimizer) - expected).norm()) <= rounding(1) * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tall", [False, True])
def test_a_stack_is_its_matrices(dtype: torch.dtype, tall: bool) -> None:
    def matrices(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.T if tall else part for part in parts])

    stack = matrices([initial(1), initial(2), initial(3)]).to(dtype)
    options = {"refresh_schedule": "fixed", "precondition_frequency": 3, "low_precision": "master"}
    whole = make(stack, batch_dims=1, **options)
    parts = [make(matrix, **options) for matrix in stack]
    for i in range(15):
        G = matrices([gradients(15, seed=seed)[i] for seed in range(3)])
        step(whole, G)
        for part, matrix in zip(parts, G, strict=True):
            step(part, matrix)
    for i, part in enumerate(parts):
        assert torch.equal(param_of(whole)[i], param_of(part))


def test_a_loaded_run_goes_on_bit_for_bit() -> None:
    first = make(initial().float())
    for G in gradients(7):
        step(first, G)
    second = make(param_of(first).detach())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for G in gradients(20, seed=1):
        step(first, G)
        step(second, G)
    assert bits(param_of(first)) == bits(param_of(second))
    assert state_bits(first) == state_bits(second)


@pytest.mark.parametrize("nan_at", [(1, 2), (SHORT - 1, LONG - 1)])
def test_a_step_that_is_not_finite_is_skipped(nan_at: tuple[int, int]) -> None:
    """Apart from the host's counts on a GPU; no refresh is due."""
    optimizer = make(initial().float(), refresh_schedule="fixed")
    for G in gradients(3):
        step(optimizer, G)
    before = state_bits(optimizer)[0]
    G = initial()
    G[nan_at] = float("nan")
    step(optimizer, G)
    after = state_bits(optimizer)[0]
    for key in after:
        assert (backends.is_gpu() and key in HOST_KEYS) or after[key] == before[key], key
    assert optimizer.skipped_steps == 1


def test_skipped_steps_leave_the_factor_where_the_host_counts_their_rows() -> None:
    """Until the rows are full, and there is a refresh; three directions are few enough to stay."""
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 1000}
    optimizer = make(initial().float(), **schedule)
    rows = gradients(1, shape=(3, LONG), seed=5)[0]
    grads = [mix @ rows for mix in gradients(8, shape=(SHORT, 3))]
    for G in grads[:4]:
        step(optimizer, G)
    before, W = long_factor(optimizer), param_of(optimizer).detach().clone()
    for _ in range(2 * RANK // SHORT + 1):
        step(optimizer, torch.full((SHORT, LONG), float("inf")))
    state = optimizer.state[param_of(optimizer)]
    assert bool(state["refreshes"].any()) == backends.is_gpu()
    change = float((long_factor(optimizer) - before).norm())
    assert change <= rounding(1, torch.float32) * float(before.norm())
    assert torch.equal(param_of(optimizer), W) and float(state["step"]) == 3
    for G in grads[4:]:
        step(optimizer, G)
    twin = make(initial().float(), **schedule)
    for G in grads:
        step(twin, G)
    error = float((long_factor(optimizer) - long_factor(twin)).norm())
    assert error <= rounding(5, torch.float32) * float(before.norm())


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((4, 90), {}, True),
        ((90, 4), {}, True),
        ((16, 256), {}, True),
        ((4, 63), {}, False),  # not 16 times as long
        ((17, 512), {}, False),  # more rows than the rank
        ((1, 31), {}, False),  # shorter than twice the rank
        ((1, 32), {}, True),
        ((4, 90), {"skinny_rank": 0}, False),
        ((4, 90), {"integrator": "ksl"}, False),
        ((4, 90), {"max_precond_dim": 89}, False),
    ],
)
def test_which_matrices_are_skinny(
    shape: tuple[int, int], options: dict[str, Any], expected: bool
) -> None:
    optimizer = make(torch.zeros(shape), **options)
    assert bool(Layout.of(param_of(optimizer), optimizer.param_groups[0]).skinny_rank) == expected


def test_the_state_is_small() -> None:
    optimizer = make(torch.zeros(8, 4096), skinny_rank=64)
    step(optimizer, torch.ones(8, 4096))
    rows = 128
    expected = 8 * 4096 + 8 * 65 + rows * 4096 + rows * rows + 1 + 2 * 64
    scalars = 4 * 2 + 8 * (2 + 2 + 2 + 2 + 1 + 1)
    assert optimizer.state_bytes()["total"] == 4 * expected + scalars


def test_single_operations_refuse_it() -> None:
    optimizer = make(initial())
    step(optimizer, initial())
    state = optimizer.state[param_of(optimizer)]
    options = step_options(optimizer.param_groups[0])
    G = initial().to(param_of(optimizer))
    for op in (
        lambda: ops.rotate([G], [state], True, options),
        lambda: ops.factor_update_([G], [state], options),
        lambda: ops.adam_update_([G], [state], options),
    ):
        with pytest.raises(ValueError, match=r"states\[0\]\['basis'\]: expected nothing"):
            op()


def test_dense_state_is_refused() -> None:
    dense = make(initial(), skinny_rank=0)
    step(dense, initial())
    saved = dense.state_dict()
    saved["param_groups"][0]["skinny_rank"] = RANK
    optimizer = make(initial())
    message = (
        f"state of param_groups[0]['params'][0]: 'exp_avg_sq': expected {widest()} of shape "
        f"(4, 17), got {widest()} of shape (4, 90)"
    )
    with refuses(optimizer, message):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("rows", [(-1, 4), (17, 20), (8, 4), (4, 29)])
def test_counts_that_do_not_fit_are_refused_before_anything_changes(rows: tuple[int, int]) -> None:
    optimizer = make(initial())
    for G in gradients(3):
        step(optimizer, G)
    optimizer.state[param_of(optimizer)]["rows"].copy_(torch.tensor(rows))
    param_of(optimizer).grad = initial().to(param_of(optimizer))
    message = (
        "states[0]['rows']: expected counts of rows with room for another gradient in 32, "
        f"got {rows[0]} and {rows[1]}"
    )
    with refuses(optimizer, message):
        optimizer.step()


def test_a_refresh_of_both_sides_takes_a_place_in_the_period() -> None:
    layout = Layout.of(param_of(make(initial())), make(initial()).param_groups[0])
    assert layout.refresh_costs == (SHORT**3, RANK**2 * LONG)


def test_a_factor_that_would_vanish_stays() -> None:
    """A zero gradient where nothing of the past counts."""
    optimizer = make(
        initial(), factor_beta=0.0, refresh_schedule="fixed", precondition_frequency=1000
    )
    step(optimizer, gradients(1)[0])
    step(optimizer, gradients(2)[1])
    before = optimizer.state[param_of(optimizer)]["L"].clone()
    assert float(before.norm()) > 0.9
    step(optimizer, torch.zeros(SHORT, LONG))
    assert torch.equal(optimizer.state[param_of(optimizer)]["L"], before)


def test_the_long_basis_stays_orthonormal() -> None:
    """Where refreshes decompose new rows alone: between two corrections rounding adds up."""
    rank = 16
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 1}
    optimizer = make(torch.zeros(4, 256), skinny_rank=rank, **schedule)
    generator = torch.Generator().manual_seed(2)
    space = torch.linalg.qr(torch.randn(256, rank, generator=generator))[0].T
    worst = 0.0
    for idx in range(20 if backends.is_gpu() else 1000):
        step(optimizer, torch.randn(4, rank, generator=generator) @ space)
        state = optimizer.state[param_of(optimizer)]
        V = state["basis"][: int(state["rows"][0])].double()
        if idx > rank:
            worst = max(worst, float((V @ V.T - torch.eye(rank).to(V)).abs().max()))
    # A decomposition leaves some 16 units of rounding, each of 32 refreshes until a correction one.
    # Without corrections it is 70 by then, and grows.
    assert 0 < worst < (16 + 32) * torch.finfo(torch.float32).eps / 2
