"""diagnostics() and state_bytes() against formulas worked out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import frozen, gradient, parameter, params_of, randn, run, two_sided
from reference import two_sided_reference

from dykaf.diagnostics import _probe, condition, orthogonality_error, staleness

NAME = "param_groups[0]['params'][0]"
FACTORED = {
    "backend",
    "step",
    "update_rms",
    "rho",
    "refreshes",
    "refresh_fallbacks",
    "condition_L",
    "staleness_L",
    "orthogonality_L",
    "condition_R",
    "staleness_R",
    "orthogonality_R",
}


def test_condition() -> None:
    assert condition(torch.diag(torch.tensor([1.0, 4.0, 0.5]))) == 8.0
    assert condition(torch.tensor([[3.0, 100.0], [100.0, 2.0]])) == 1.5  # of the diagonal alone
    assert condition(torch.tensor([[7.0]])) == 1.0
    assert condition(torch.diag(torch.tensor([1.0, 0.0]))) == float("inf")
    assert condition(torch.diag(torch.tensor([1.0, -1e-9]))) == float("inf")


def test_staleness() -> None:
    assert staleness(torch.diag(torch.tensor([3.0, 1.0]))) == 0.0
    # Off the diagonal 2 * 0.25, in all 2 * 0.25 + 1 + 1.
    assert staleness(torch.tensor([[1.0, 0.5], [0.5, 1.0]])) == 0.2
    assert staleness(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 1.0
    assert staleness(torch.zeros(2, 2)) == 0.0
    # Squares below the range of float32.
    assert staleness(1e-30 * torch.tensor([[1.0, 0.5], [0.5, 1.0]])) == pytest.approx(0.2, rel=1e-6)


def test_orthogonality_error() -> None:
    assert orthogonality_error(torch.eye(4)) == 0.0
    assert orthogonality_error(torch.eye(3)[[2, 0, 1]]) == 0.0
    assert orthogonality_error(2 * torch.eye(3)) == pytest.approx(3.0, rel=1e-6)
    Q = torch.linalg.qr(randn(8, 8)).Q
    assert orthogonality_error(Q) < 1e-14
    # Q (I + E): the first order of the error is (E + E^T) x. x has no entry near zero, so that
    # every column counts.
    for column in range(8):
        stretched = Q.clone()
        stretched[:, column] *= 1 + 1e-6
        assert 1e-8 < orthogonality_error(stretched) < 2.1e-6


def test_a_run_against_the_reference() -> None:
    param = parameter(6, 4, dtype=torch.float64)
    options: dict[str, Any] = {"refresh_schedule": "fixed", "precondition_frequency": 4}
    options["integrator"] = "ksl"
    optimizer = two_sided([param], **options)
    reference = two_sided_reference(param.detach(), **options)
    for step in range(15):
        run(optimizer, range(step, step + 1))
        reference.step(gradient(param, step, 0))
    report = optimizer.diagnostics()[NAME]
    assert set(report) == FACTORED
    assert report["step"] == reference.t == 14
    assert report["update_rms"] == pytest.approx(reference.update_rms, rel=1e-6)
    assert report["rho"] == pytest.approx(reference.rho[0], rel=1e-9)
    assert report["refreshes"] == sum(reference.refreshes) > 0
    assert report["refresh_fallbacks"] == 0
    for side, factor in (("L", reference.L_rotated), ("R", reference.R_rotated)):
        assert factor is not None
        diagonal = factor.diagonal()
        off_diagonal = factor - torch.diag(diagonal)
        assert report[f"condition_{side}"] == pytest.approx(
            float(diagonal.max() / diagonal.min()), rel=1e-6
        )
        share = float(off_diagonal.norm() ** 2 / factor.norm() ** 2)
        assert report[f"staleness_{side}"] == pytest.approx(share, rel=1e-6)
        assert share > 1e-6
        assert report[f"orthogonality_{side}"] < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_precond_dim": 0},
        {"second_moment": "rank_one"},
        {"second_moment": "factored"},
    ],
)
def test_update_rms_is_seen_in_the_parameter(options: dict[str, Any]) -> None:
    """A rotation keeps norms: without decay it is the root mean square of the change over lr."""
    param = parameter(6, 4, dtype=torch.float64)
    optimizer = two_sided([param], lr=0.01, weight_decay=0.0, **options)
    run(optimizer, range(5))
    before = param.detach().clone()
    run(optimizer, range(5, 6))
    change = float((param.detach() - before).square().mean().sqrt()) / 0.01
    report = optimizer.diagnostics()[NAME]
    assert report["update_rms"] == pytest.approx(change, rel=1e-6)  # stored as float32
    assert 0.1 < change < 10


def test_a_spoiled_basis_is_seen() -> None:
    param = parameter(6, 4)
    optimizer = two_sided([param])
    run(optimizer, range(8))
    healthy = optimizer.diagnostics()[NAME]
    assert healthy["orthogonality_L"] < 1e-5 and healthy["orthogonality_R"] < 1e-5
    Q = optimizer.state[param]["Q_R"]
    Q += 1e-3 * randn(4, 4, dtype=torch.float32)
    spoiled = optimizer.diagnostics()[NAME]
    x = torch.sin(1 + torch.arange(4, dtype=torch.float64))
    error = Q.double().T @ Q.double() @ x - x
    expected = float(error.norm() / x.norm())
    assert spoiled["orthogonality_R"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4
    assert spoiled["orthogonality_L"] == healthy["orthogonality_L"]


def test_a_turned_basis_is_stale() -> None:
    param = parameter(6, 4, dtype=torch.float64)
    optimizer = two_sided([param], precondition_frequency=1, integrator="ksl", factor_beta=0.95)
    run(optimizer, range(30))
    state = optimizer.state[param]
    before = optimizer.diagnostics()[NAME]["staleness_L"]
    angle = torch.tensor(0.7).double()
    turn = torch.eye(6, dtype=torch.float64)
    turn[0, 0] = turn[-1, -1] = angle.cos()
    turn[0, -1], turn[-1, 0] = angle.sin(), -angle.sin()
    state["L"].copy_(turn.T @ state["L"] @ turn)
    state["Q_L"].copy_(state["Q_L"] @ turn)
    report = optimizer.diagnostics()[NAME]
    assert report["staleness_L"] > 10 * before
    assert report["orthogonality_L"] < 1e-13


def test_rho_of_the_diagonal_integrator() -> None:
    """L and R have a scale each there; their product is the square of what is reported."""
    param = parameter(6, 4)
    optimizer = two_sided([param], integrator="diagonal")
    run(optimizer, range(6))
    rho = optimizer.state[param]["rho"]
    assert float(rho[0]) != float(rho[1])
    expected = (float(rho[0]) * float(rho[1])) ** 0.5
    assert optimizer.diagnostics()[NAME]["rho"] == pytest.approx(expected, rel=1e-12)


def test_one_side_and_none() -> None:
    optimizer = two_sided([parameter(3, 9), parameter(9, 9), parameter(5)], max_precond_dim=4)
    run(optimizer, range(4))
    report = optimizer.diagnostics()
    names = [f"param_groups[0]['params'][{idx}]" for idx in range(3)]
    assert set(report) == {"optimizer", *names}
    assert set(report[names[0]]) == {key for key in FACTORED if not key.endswith("_R")}
    for idx, name in list(enumerate(names))[1:]:
        state = optimizer.state[params_of(optimizer)[idx]]
        assert report[name] == {
            "backend": "cpu",
            "step": 4.0,
            "update_rms": float(state["update_rms"]),
        }


def test_a_stack_reports_its_worst() -> None:
    """Each entry is the largest over the matrices; one without a gradient has no say."""
    stack = parameter(3, 5, 4)
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    optimizer = two_sided([stack], batch_dims=1, integrator="ksl", **schedule)
    for step in range(8):
        stack.grad = gradient(stack, step, 0)
        stack.grad[0] *= 100
        stack.grad[1].zero_()
        optimizer.step()
    state = optimizer.state[stack]
    state["refresh_fallbacks"][2] = 5
    report = optimizer.diagnostics()[NAME]
    assert report["step"] == 7 and report["refresh_fallbacks"] == 5
    assert report["update_rms"] == float(state["update_rms"].max())
    assert report["rho"] == pytest.approx(float(state["rho"].max()), rel=1e-12)
    assert report["refreshes"] == float(state["refreshes"].sum(-1).max())
    for side in ("L", "R"):
        each = [state[side][idx] for idx in (0, 2)]
        assert report[f"condition_{side}"] == max(condition(factor) for factor in each)
        assert report[f"staleness_{side}"] == max(staleness(factor) for factor in each)
        errors = [orthogonality_error(state[f"Q_{side}"][idx]) for idx in (0, 2)]
        assert report[f"orthogonality_{side}"] == max(errors)


def test_before_the_first_gradient() -> None:
    param = parameter(6, 4)
    optimizer = two_sided([param, parameter(3)])
    assert optimizer.diagnostics() == {"optimizer": {"skipped_steps": 0}}
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.diagnostics()[NAME] == {"backend": "cpu", "step": 0.0, "update_rms": 0.0}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_modes_of_torch_do_not_matter(state_dtype: str) -> None:
    """autocast would round the products of the orthogonality error to 8 bits."""
    optimizer = two_sided([parameter(40, 30), parameter(5)], state_dtype=state_dtype)
    run(optimizer, range(6))
    expected = optimizer.diagnostics()
    with torch.autocast("cpu", torch.bfloat16):
        assert optimizer.diagnostics() == expected
    torch.set_default_device("meta")
    try:
        assert optimizer.diagnostics() == expected
    finally:
        torch.set_default_device(None)


def test_asking_changes_nothing() -> None:
    optimizer = two_sided([parameter(6, 4), parameter(3)])
    run(optimizer, range(3))
    before = frozen(optimizer)
    optimizer.diagnostics()
    optimizer.state_bytes()
    assert frozen(optimizer) == before


# ---- Bytes ---------------------------------------------------------------------------------------

# Per matrix: step, update_rms (4 each), rho (2 x 8), next_refresh, refreshes (2 x 8 each),
# schedule_step, refresh_fallbacks (8 each).
MATRIX_SCALARS = 4 + 4 + 16 + 16 + 16 + 8 + 8
VECTOR_SCALARS = 4 + 4


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "expected"),
    [
        (
            (6, 4),
            torch.float32,
            {},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * 24,
                "factors": 4 * (36 + 16),
                "bases": 4 * (36 + 16),
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.float64,
            {},
            {
                "exp_avg": 8 * 24,
                "exp_avg_sq": 8 * 24,
                "factors": 8 * (36 + 16),
                "bases": 8 * (36 + 16),
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.float32,
            {"second_moment": "factored"},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * (6 + 4),
                "factors": 4 * (36 + 16),
                "bases": 4 * (36 + 16),
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.float32,
            {"second_moment": "rank_one"},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * (6 + 4) + 8,
                "factors": 4 * (36 + 16),
                "bases": 4 * (36 + 16),
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.float32,
            {"max_precond_dim": 5},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * 24,
                "factors": 4 * 16,
                "bases": 4 * 16,
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (4, 6),
            torch.float32,
            {"max_precond_dim": 4},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * 24,
                "factors": 4 * 16,
                "bases": 4 * 16,
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (4, 4),
            torch.float32,
            {"max_precond_dim": 4},
            {
                "exp_avg": 4 * 16,
                "exp_avg_sq": 4 * 16,
                "factors": 4 * 32,
                "bases": 4 * 32,
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.bfloat16,
            {"low_precision": "master"},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * 24,
                "factors": 4 * (36 + 16),
                "bases": 4 * (36 + 16),
                "master": 4 * 24,
                "scalars": MATRIX_SCALARS,
            },
        ),
        (
            (6, 4),
            torch.bfloat16,
            {"max_precond_dim": 0, "second_moment": "factored"},
            {
                "exp_avg": 4 * 24,
                "exp_avg_sq": 4 * 24,
                "scalars": VECTOR_SCALARS,
            },
        ),
        (
            (5, 6, 4),
            torch.float16,
            {"batch_dims": 1},
            {
                "exp_avg": 5 * 4 * 24,
                "exp_avg_sq": 5 * 4 * 24,
                "factors": 5 * 4 * (36 + 16),
                "bases": 5 * 4 * (36 + 16),
                "scalars": 5 * MATRIX_SCALARS,
            },
        ),
        (
            (7,),
            torch.float32,
            {},
            {
                "exp_avg": 28,
                "exp_avg_sq": 28,
                "scalars": VECTOR_SCALARS,
            },
        ),
    ],
)
def test_state_bytes_by_hand(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], expected: dict[str, int]
) -> None:
    optimizer = two_sided([parameter(*shape, dtype=dtype)], **options)
    kinds = dict.fromkeys(("exp_avg", "exp_avg_sq", "factors", "bases", "master", "scalars"), 0)
    assert optimizer.state_bytes() == {**kinds, "total": 0}
    run(optimizer, range(1))
    total = sum(expected.values())
    assert optimizer.state_bytes() == {**kinds, **expected, "total": total}
    run(optimizer, range(1, 6))
    assert optimizer.state_bytes()["total"] == total


def test_state_bytes_sum_over_parameters() -> None:
    optimizer = two_sided([{"params": [parameter(6, 4)]}, {"params": [parameter(7)]}])
    run(optimizer, range(1))
    assert optimizer.state_bytes()["exp_avg"] == 4 * 24 + 4 * 7
    assert optimizer.state_bytes()["scalars"] == MATRIX_SCALARS + VECTOR_SCALARS


def test_the_probe_is_where_the_basis_is() -> None:
    probe = _probe(torch.empty(3, 3, dtype=torch.float32, device="meta"))
    assert (probe.device.type, probe.dtype, tuple(probe.shape)) == ("meta", torch.float32, (3,))
