"""skinny_rank: the factor of a long side kept at a low rank."""

from __future__ import annotations

import copy
from typing import Any

import backends
import pytest
import torch
from optim_helpers import bits, params_of, refuses, state_bits
from skinny_reference import ReferenceSkinny
from tolerances import TRAJECTORY
from torch import Tensor, nn

from dykaf import DyKAF, ops
from dykaf.options import step_options
from dykaf.state import Layout

pytestmark = pytest.mark.skipif(backends.is_gpu(), reason="skinny matrices are kept on the CPU")

SHORT, LONG, RANK = 4, 90, 16


def gradients(num: int, shape: tuple[int, int] = (SHORT, LONG), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, shape[1], dtype=torch.float64)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scales for _ in range(num)
    ]


def make(W: Tensor, **options: Any) -> DyKAF:
    return DyKAF([nn.Parameter(W.clone())], **{"skinny_rank": RANK, "eps": 1e-6, **options})


def param_of(optimizer: DyKAF) -> Tensor:
    return params_of(optimizer)[0]


def step(optimizer: DyKAF, G: Tensor) -> None:
    param_of(optimizer).grad = G.to(param_of(optimizer).dtype)
    optimizer.step()


def long_factor(optimizer: DyKAF) -> Tensor:
    """The long side's average, in the original coordinates and in gradient units."""
    state = optimizer.state[param_of(optimizer)]
    basis, core = state["basis"], state["core"]
    R = state["flat"] * torch.eye(basis.shape[-1]).to(basis) + basis.T @ core @ basis
    return R * state["rho"][1] ** 2


def initial(seed: int = 9) -> Tensor:
    return gradients(1, seed=seed)[0]


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frequency", [1, 5, 1000])
def test_trajectory(tall: bool, rescale: bool, frequency: int) -> None:
    """Against the dense textbook form, also where the rows are full before a refresh is due."""
    W = initial()
    options = {"precondition_frequency": frequency, "rescale_exp_avg_sq": rescale}
    ref = ReferenceSkinny(W, RANK, eps=1e-6, **options)
    optimizer = make(W.T if tall else W, refresh_stagger=False, **options)
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


def test_it_is_the_dense_form_while_the_rank_suffices() -> None:
    """The factor itself, for any gradients, until more directions came than are kept."""
    W = initial()
    skinny = make(W, refresh_stagger=False, skinny_rank=40)
    dense = make(W, refresh_stagger=False, skinny_rank=0)
    for G in gradients(10):  # 10 gradients of rank 4
        step(skinny, G)
        step(dense, G)
        state = dense.state[param_of(dense)]
        R = state["Q_R"] @ state["R"] @ state["Q_R"].T
        # Each in the norm that it is kept in: unit trace here, unit length there.
        expected = R * state["rho"][1] ** 2
        assert float((long_factor(skinny) - expected).norm()) <= 1e-12 * float(expected.norm())
    assert skinny.state[param_of(skinny)]["refreshes"][1] > 3


def test_updates_are_the_dense_ones_for_gradients_of_one_row_space() -> None:
    """Nothing lies outside of the basis then: the way in which the rest is averaged has no part.

    The rest is floored at 4 epsilon of the gradient's square and the momentum's part there is of
    its rounding, so updates differ by up to the root of epsilon.
    """
    W = initial()
    rows = gradients(1, seed=5)[0]
    skinny = make(W, refresh_stagger=False)
    dense = make(W, refresh_stagger=False, skinny_rank=0)
    travelled = 0.0
    for mix in gradients(40, shape=(SHORT, SHORT)):
        before = param_of(dense).detach().clone()
        step(skinny, mix @ rows)
        step(dense, mix @ rows)
        travelled += float((param_of(dense).detach() - before).norm())
        error = float((param_of(skinny) - param_of(dense)).detach().norm())
        assert error <= torch.finfo(torch.float64).eps ** 0.5 * travelled


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
    assert float((after - 0.9**30 * before).norm()) <= 1e-12 * 0.9**30 * float(before.norm())


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
    assert float((long_factor(optimizer) - 0.1 * G.T @ G / SHORT).norm()) <= 1e-12 * float(
        (G.T @ G).norm()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_stack_is_its_matrices(dtype: torch.dtype) -> None:
    stack = torch.stack([initial(1), initial(2), initial(3)]).to(dtype)
    options = {"refresh_stagger": False, "low_precision": "master"}
    whole = make(stack, batch_dims=1, **options)
    parts = [make(matrix, **options) for matrix in stack]
    for i in range(15):
        G = torch.stack([gradients(15, seed=seed)[i] for seed in range(3)])
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


def test_a_step_that_is_not_finite_is_skipped() -> None:
    optimizer = make(initial().float())
    for G in gradients(5):
        step(optimizer, G)
    before = state_bits(optimizer)
    G = initial()
    G[1, 2] = float("nan")
    step(optimizer, G)
    assert state_bits(optimizer) == before and optimizer.skipped_steps == 1


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
        ((4, 90), {"metric_power": 0.5}, False),
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
    step(optimizer, torch.ones(8, 4096, dtype=torch.float64))
    rows = 128
    expected = 8 * 4096 + 8 * 65 + rows * 4096 + rows * rows + 1 + 2 * 64
    scalars = 4 * 2 + 8 * (2 + 2 + 2 + 2 + 1 + 1)
    assert optimizer.state_bytes()["total"] == 4 * expected + scalars


def test_single_operations_refuse_it() -> None:
    optimizer = make(initial())
    step(optimizer, initial())
    state = optimizer.state[param_of(optimizer)]
    options = step_options(optimizer.param_groups[0])
    for op in (
        lambda: ops.rotate([initial()], [state], True, options),
        lambda: ops.factor_update_([initial()], [state], options),
        lambda: ops.adam_update_([initial()], [state], options),
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
        "state of param_groups[0]['params'][0]: 'exp_avg_sq': expected torch.float64 of shape "
        "(4, 17), got torch.float64 of shape (4, 90)"
    )
    with refuses(optimizer, message):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("rows", [(-1, 4), (17, 20), (8, 4), (4, 29)])
def test_counts_that_do_not_fit_are_refused_before_anything_changes(rows: tuple[int, int]) -> None:
    optimizer = make(initial())
    for G in gradients(3):
        step(optimizer, G)
    optimizer.state[param_of(optimizer)]["rows"].copy_(torch.tensor(rows))
    param_of(optimizer).grad = initial()
    message = (
        "states[0]['rows']: expected counts of rows with room for another gradient in 32, "
        f"got {rows[0]} and {rows[1]}"
    )
    with refuses(optimizer, message):
        optimizer.step()


def test_a_refresh_of_both_sides_takes_a_place_in_the_period() -> None:
    layout = Layout.of(param_of(make(initial())), make(initial()).param_groups[0])
    assert layout.refresh_costs == (SHORT**3, RANK**2 * LONG)
