"""Gradients that are not finite, under each policy, in every dtype and place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from optim_helpers import bits, frozen, gradient, parameter, params_of, refuses, run, trajectory
from torch import Tensor

from dykaf import DyKAF, ops

pytestmark = pytest.mark.usefixtures("each_optimizer")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VALUES = [float("nan"), float("inf"), float("-inf")]
SIZES = [1, 7, 2047, 2048, 2049]  # around the length of the vectors and chunks of the loops
NAME = "param_groups[0]['params'][0]"


def message(name: str) -> str:
    return (
        f"gradient of {name}: expected finite values, got NaN or infinity "
        "(nonfinite='raise'); nothing has changed"
    )


def spoiled(size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gradients with one bad value: at the first, a middle and the last place."""
    for value in VALUES:
        for place in sorted({0, size // 2, size - 1}):
            grad = torch.ones(size, dtype=dtype)
            grad[place] = value
            yield grad


def make(size: int, dtype: torch.dtype, matrix: bool, nonfinite: str) -> DyKAF:
    """A vector, or one row with a factor on the short side; and a parameter beside it."""
    shape = (1, size) if matrix else (size,)
    params = [parameter(*shape, dtype=dtype), parameter(3, 2, dtype=dtype)]
    return DyKAF(params, max_precond_dim=8, nonfinite=nonfinite)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("matrix", [False, True])
def test_skip_leaves_everything_and_counts(size: int, dtype: torch.dtype, matrix: bool) -> None:
    optimizer = make(size, dtype, matrix, "skip")
    param = params_of(optimizer)[0]
    run(optimizer, range(2))
    before = trajectory(optimizer)
    count = 0
    for grad in spoiled(size, dtype):
        param.grad = grad.view_as(param)
        grad_before = bits(param.grad)
        optimizer.step()
        count += 1
        assert optimizer.skipped_steps == count
        assert bits(param.grad) == grad_before
    assert trajectory(optimizer)[:2] == before[:2]
    assert optimizer.diagnostics()["optimizer"]["skipped_steps"] == count
    run(optimizer, range(2, 5))

    undisturbed = make(size, dtype, matrix, "skip")
    run(undisturbed, range(5))
    assert trajectory(optimizer)[:2] == trajectory(undisturbed)[:2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("matrix", [False, True])
def test_raise_names_the_parameter(size: int, dtype: torch.dtype, matrix: bool) -> None:
    optimizer = make(size, dtype, matrix, "raise")
    param = params_of(optimizer)[0]
    run(optimizer, range(2))
    for grad in spoiled(size, dtype):
        param.grad = grad.view_as(param)
        with refuses(optimizer, message(NAME), RuntimeError):
            optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("shape", [(4, 3), (5,), (9, 2)])
def test_propagate_checks_nothing(dtype: torch.dtype, value: float, shape: tuple[int, ...]) -> None:
    """The parameter shows it, the one beside it goes on as ever."""
    optimizer = DyKAF(
        [parameter(*shape, dtype=dtype), parameter(3, 2, dtype=dtype)],
        max_precond_dim=8,
        nonfinite="propagate",
    )
    param, beside = params_of(optimizer)
    run(optimizer, range(3))
    for idx, each in enumerate((param, beside)):
        each.grad = gradient(each, 3, idx)
    param.grad.view(-1)[-1] = value
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not bool(param.isfinite().all())
    assert bool(beside.isfinite().all())
    assert float(optimizer.state[beside]["step"]) == 3


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_a_bad_first_gradient_leaves_no_state(nonfinite: str, shape: tuple[int, ...]) -> None:
    optimizer = DyKAF([parameter(*shape), parameter(3, 3)], nonfinite=nonfinite)
    for param in params_of(optimizer):
        param.grad = torch.full_like(param, float("nan"))
    if nonfinite == "skip":
        optimizer.step()
    else:
        with refuses(optimizer, message(NAME), RuntimeError):
            optimizer.step()
    assert not any(optimizer.state.values())
    undisturbed = DyKAF([parameter(*shape), parameter(3, 3)], nonfinite=nonfinite)
    run(optimizer, range(4))
    run(undisturbed, range(4))
    assert trajectory(optimizer)[:2] == trajectory(undisturbed)[:2]


def test_raise_names_the_first_of_several_groups() -> None:
    optimizer = DyKAF(
        [
            {"params": [("embedding", parameter(4, 3))]},
            {"params": [("bias", parameter(3)), ("stack", parameter(3, 2, 2))], "batch_dims": 1},
        ],
        nonfinite="raise",
    )
    run(optimizer, range(2))
    _, bias, stack = params_of(optimizer)
    stack.grad[1, 0, 1] = float("-inf")
    with refuses(optimizer, message("stack"), RuntimeError):
        optimizer.step()
    bias.grad[2] = float("nan")
    with refuses(optimizer, message("bias"), RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("policies", [("skip", "propagate"), ("propagate", "skip")])
def test_policies_are_those_of_the_bad_gradients_group(policies: tuple[str, str]) -> None:
    """skip drops the whole step, of all groups, once; propagate in another group does not."""
    optimizer = DyKAF(
        [
            {"params": [parameter(4, 3, seed=idx)], "nonfinite": policy}
            for idx, policy in enumerate(policies)
        ]
    )
    run(optimizer, range(2))
    before = trajectory(optimizer)
    skipping = params_of(optimizer)[policies.index("skip")]
    propagating = params_of(optimizer)[policies.index("propagate")]
    skipping.grad[0, 0] = float("nan")
    optimizer.step()
    assert trajectory(optimizer)[:2] == before[:2]
    assert optimizer.skipped_steps == 1
    skipping.grad[0, 0] = 0.0
    propagating.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert bool(skipping.isfinite().all())
    assert not bool(propagating.isfinite().all())


def test_raise_wins_over_skip() -> None:
    """Both groups have bad gradients: nothing changes, nothing is counted."""
    optimizer = DyKAF(
        [
            {"params": [parameter(4, 3)], "nonfinite": "skip"},
            {"params": [parameter(3)], "nonfinite": "raise"},
        ]
    )
    run(optimizer, range(2))
    for param in params_of(optimizer):
        param.grad = torch.full_like(param, float("inf"))
    with refuses(optimizer, message("param_groups[1]['params'][0]"), RuntimeError):
        optimizer.step()


def test_bad_values_that_no_element_of_the_gradient_holds() -> None:
    """A strided gradient between NaNs, and a missing one: only the elements count."""
    param, missing = parameter(4, 3), parameter(3)
    optimizer = DyKAF([param, missing], nonfinite="raise")
    wide = torch.full((4, 6), float("nan"))
    wide[:, ::2] = gradient(param, 0, 0)
    param.grad = wide[:, ::2]
    optimizer.step()
    assert float(optimizer.state[param]["rho"][0]) > 0
    before = frozen(optimizer)
    param.grad = None
    optimizer.step()
    assert frozen(optimizer)["state"] == before["state"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_grad_max_is_exact(dtype: torch.dtype, size: int) -> None:
    """The largest and the smallest numbers of a dtype are numbers, too."""
    info = torch.finfo(dtype)
    for largest in (info.max, 1.0, info.tiny, info.smallest_normal / 4):
        for place in {0, size // 2, size - 1}:
            grad = torch.zeros(size, dtype=dtype)
            grad[place] = -largest
            expected = float(-grad[place].double())
            assert expected > 0
            assert ops.grad_max([grad], [1]).tolist() == [expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_max_of_parts(dtype: torch.dtype) -> None:
    stack = torch.tensor([[1, -3], [2, float("nan")], [0, 0], [float("inf"), 1]], dtype=dtype)
    maxima = ops.grad_max([stack, torch.tensor([-0.5], dtype=dtype)], [4, 1])
    assert maxima.dtype == torch.float64
    assert maxima[[0, 2, 4]].tolist() == [3.0, 0.0, 0.5]
    assert bool(maxima[[1, 3]].isnan().all())
    assert ops.grad_max([], []).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3), (9, 2), (5,)])
def test_large_finite_gradients_are_used(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Neither skipped nor lost: the scaled arithmetic of the factors stays finite. (The second
    moment of a float32 gradient beyond 1e19 overflows, as in every Adam: the update is zero. A
    rotation can make an entry sqrt(m n) times larger, so a margin of 32 is left.)"""
    optimizer = DyKAF([parameter(*shape, dtype=dtype)], max_precond_dim=8, nonfinite="raise")
    param = params_of(optimizer)[0]
    sign = torch.where(gradient(param, 0, 0) < 0, -1, 1).to(dtype)
    for _ in range(3):
        param.grad = sign * (torch.finfo(dtype).max / 32)
        optimizer.step()
    state = optimizer.state[param]
    assert bool(param.isfinite().all())
    for key in ("L", "R", "Q_L", "Q_R", "rho", "exp_avg"):
        assert key not in state or bool(state[key].isfinite().all())
    assert float(state["step"]) == (3 if len(shape) == 1 else 2)
