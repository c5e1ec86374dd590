"""Strides, dtypes, stacks, convolutions, empty parameters: the same numbers in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_helpers import bits, gradient, parameter, params_of, randn, run, trajectory, two_sided
from torch import Tensor, nn

from dykaf import DyKAF

pytestmark = pytest.mark.usefixtures("each_optimizer")

ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SECOND_MOMENTS = ["full", "rank_one", "factored"]


def transposed(tensor: Tensor) -> Tensor:
    """The same values in column-major memory."""
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def padded(tensor: Tensor) -> Tensor:
    """The same values with gaps: every second entry of a larger tensor."""
    wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


# ---- Strides -------------------------------------------------------------------------------------

STRIDES = [
    ((6, 4), transposed, {}),
    ((6, 4), padded, {}),
    ((6, 4), padded, {"max_precond_dim": 0}),
    ((4, 3, 2, 2), channels_last, {}),
    ((4, 3, 2, 2), channels_last, {"max_precond_dim": 0}),
    ((3, 5, 4), transposed, {"batch_dims": 1}),
    ((7,), padded, {}),
]


@pytest.mark.parametrize(("shape", "change", "options"), STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["gradient", "parameter"])
def test_strides_do_not_matter(
    shape: tuple[int, ...],
    change: Callable[[Tensor], Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
    which: str,
) -> None:
    plain = parameter(*shape, dtype=dtype)
    values = plain.detach().clone()
    strided = nn.Parameter(change(values) if which == "parameter" else values)
    assert which == "gradient" or not strided.is_contiguous()
    strides = strided.stride()
    optimizers = [
        DyKAF([param], precondition_frequency=3, weight_decay=0.1, **options)
        for param in (strided, plain)
    ]
    for step in range(9):
        plain.grad = gradient(plain, step, 0)
        strided.grad = change(plain.grad.clone()) if which == "gradient" else plain.grad.clone()
        assert which == "parameter" or not strided.grad.is_contiguous()
        before = bits(strided.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert bits(strided.grad) == before
    assert trajectory(optimizers[0]) == trajectory(optimizers[1])
    assert strided.stride() == strides


@pytest.mark.parametrize("options", [{}, {"max_precond_dim": 0}])
def test_expanded_gradients(options: dict[str, Any]) -> None:
    """As sum().backward() makes them: one number under many indices."""
    expanded, plain = parameter(6, 4), parameter(6, 4)
    optimizers = [DyKAF([param], **options) for param in (expanded, plain)]
    for step in range(4):
        grad = torch.full((), 0.5 + step)
        expanded.grad = grad.expand(6, 4)
        plain.grad = torch.full((6, 4), 0.5 + step)
        for optimizer in optimizers:
            optimizer.step()
        assert float(grad) == 0.5 + step
    assert trajectory(optimizers[0]) == trajectory(optimizers[1])


@pytest.mark.parametrize("options", [{}, {"max_precond_dim": 0}])
def test_lazily_negated_gradients(options: dict[str, Any]) -> None:
    """torch keeps the sign of such a tensor (of the imaginary part of a conjugate) in a flag."""
    lazy, plain = parameter(6, 4), parameter(6, 4)
    optimizers = [DyKAF([param], **options) for param in (lazy, plain)]
    for step in range(4):
        grad = gradient(plain, step, 0)
        lazy.grad, plain.grad = torch._neg_view(grad), -grad
        assert lazy.grad.is_neg() and torch.equal(lazy.grad, plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert trajectory(optimizers[0]) == trajectory(optimizers[1])


def test_parameters_that_are_views_leave_the_rest_alone() -> None:
    """Two halves of one buffer, as in flat parameter storage."""
    buffer = randn(8, 6, dtype=torch.float32)
    start = buffer.clone()
    left, right = nn.Parameter(buffer[:, :2]), nn.Parameter(buffer[:, 2:5])
    alone = [nn.Parameter(start[:, :2].clone()), nn.Parameter(start[:, 2:5].clone())]
    views, copies = DyKAF([left, right]), DyKAF(alone)
    run(views, range(5))
    run(copies, range(5))
    assert trajectory(views) == trajectory(copies)
    assert bits(buffer[:, 5:]) == bits(start[:, 5:])
    assert bits(buffer[:, :2]) == bits(left) != bits(start[:, :2])


# ---- Convolutions and stacks ---------------------------------------------------------------------


@pytest.mark.parametrize("second_moment", SECOND_MOMENTS)
def test_convolution_weights_are_matrices(second_moment: str) -> None:
    conv, matrix = parameter(4, 3, 2, 2), nn.Parameter(parameter(4, 3, 2, 2).detach().view(4, 12))
    optimizers = [
        two_sided([param], precondition_frequency=3, second_moment=second_moment)
        for param in (conv, matrix)
    ]
    for step in range(10):
        conv.grad = gradient(conv, step, 0)
        matrix.grad = conv.grad.view(4, 12).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert bits(conv.view(4, 12)) == bits(matrix)
    states = [optimizer.state[params_of(optimizer)[0]] for optimizer in optimizers]
    assert {k: bits(v) for k, v in states[0].items()} == {k: bits(v) for k, v in states[1].items()}
    assert states[0]["R"].shape == (12, 12)


STACKS: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
    ((3, 4, 8), 1, {}),
    ((3, 8, 4), 1, {"second_moment": "rank_one", "init": "rank_one"}),
    ((3, 4, 4), 1, {"second_moment": "factored", "integrator": "diagonal"}),
    ((3, 8, 4), 1, {"max_precond_dim": 4, "integrator": "bug"}),
    ((3, 4, 2, 2, 2), 1, {"rescale_exp_avg_sq": True}),
    ((2, 3, 4, 4), 2, {}),
]


def _run_stack(
    stack: nn.Parameter, batch_dims: int, options: dict[str, Any]
) -> tuple[DyKAF, list[nn.Parameter], list[DyKAF]]:
    """14 steps of a stack and of its matrices as separate parameters. The second expert sees no
    token in the first four steps and in a later one."""
    common: dict[str, Any] = {
        "precondition_frequency": 3,
        "refresh_schedule": "fixed",
        "weight_decay": 0.5,
        **options,
    }
    flat = stack.detach().clone().reshape(-1, *stack.shape[batch_dims:])
    experts = [nn.Parameter(matrix.clone()) for matrix in flat]
    optimizer = DyKAF([stack], batch_dims=batch_dims, **common)
    separate = [DyKAF([expert], **common) for expert in experts]
    start = bits(flat[1])
    for step in range(14):
        stack.grad = gradient(stack, step, 0)
        matrices = stack.grad.view(flat.shape)
        if step < 4 or step == 8:
            matrices[1].zero_()
        optimizer.step()
        for expert, other, part in zip(experts, separate, matrices, strict=True):
            expert.grad = part.clone()
            other.step()
        if step < 5:  # the first gradient, at step 4, moves nothing either
            assert bits(stack.reshape(flat.shape)[1]) == start
    steps = optimizer.state[stack]["step"].flatten().tolist()
    assert steps[0] == 13 and steps[1] == 9
    return optimizer, experts, separate


@pytest.mark.parametrize(("shape", "batch_dims", "options"), STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_is_so_many_matrices(
    shape: tuple[int, ...], batch_dims: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Bit for bit, where every matrix starts on a cache line: BLAS rounds by alignment."""
    stack = parameter(*shape, dtype=dtype)
    optimizer, experts, separate = _run_stack(stack, batch_dims, options)
    state = optimizer.state[stack]
    for idx, (expert, other) in enumerate(zip(experts, separate, strict=True)):
        assert bits(stack.reshape(len(experts), *expert.shape)[idx]) == bits(expert)
        for key, value in other.state[expert].items():
            together = state[key].reshape(len(experts), *value.shape)
            assert bits(together[idx]) == bits(value), key


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 7, 3), (2, 1, 5)])
@pytest.mark.parametrize("second_moment", SECOND_MOMENTS)
def test_a_stack_of_odd_sizes_is_so_many_matrices(
    shape: tuple[int, ...], second_moment: str
) -> None:
    """To the rounding of float64, amplified as in test_torch_behaviour.py."""
    stack = parameter(*shape, dtype=torch.float64)
    start = stack.detach().clone()
    _, experts, _ = _run_stack(stack, 1, {"second_moment": second_moment})
    distance = float((stack.detach() - start).norm())
    for idx, expert in enumerate(experts):
        assert float((stack[idx] - expert).detach().norm()) < 1e-8 * distance


def test_a_matrix_without_batch_dims_is_a_matrix() -> None:
    beside, plain = parameter(3, 5), parameter(3, 5)
    optimizers = [DyKAF([beside], batch_dims=1), DyKAF([plain])]
    for step in range(4):
        beside.grad = plain.grad = gradient(plain, step, 0)
        for optimizer in optimizers:
            optimizer.step()
    assert bits(beside) == bits(plain)
    assert "L" in optimizers[0].state[beside]


def test_low_precision_experts_round_independently() -> None:
    """Equal matrices with equal gradients part only through their own random numbers."""
    stack = nn.Parameter(randn(4, 3).expand(2, 4, 3).bfloat16().contiguous())
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 2}
    optimizer = DyKAF([stack], batch_dims=1, lr=0.01, **schedule)
    for step in range(6):
        stack.grad = gradient(stack[0].detach(), step, 0).expand(2, 4, 3).contiguous()
        optimizer.step()
    assert bits(stack[0]) != bits(stack[1])
    state = optimizer.state[stack]
    assert bits(state["exp_avg"][0]) == bits(state["exp_avg"][1])


# ---- Empty parameters and mixed dtypes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options"), [((0, 3), {}), ((3, 0), {}), ((0,), {}), ((0, 2, 2), {"batch_dims": 1})]
)
def test_empty_parameters_are_carried_along(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    empty, matrix, alone = parameter(*shape), parameter(2, 4, 3), parameter(2, 4, 3)
    optimizer = DyKAF([matrix, empty], **options)
    other = DyKAF([alone], **options)
    for step in range(6):
        empty.grad = torch.zeros_like(empty)
        matrix.grad = gradient(matrix, step, 0)
        alone.grad = gradient(alone, step, 0)
        optimizer.step()
        other.step()
    assert bits(matrix) == bits(alone)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert set(optimizer.diagnostics()) == {"optimizer", "param_groups[0]['params'][0]"}
    assert optimizer.state_bytes() == other.state_bytes()


def test_dtypes_mix_in_one_group() -> None:
    """Each as alone. (The master copy takes the random numbers, which hang on the place, out.)"""
    params = [parameter(5, 4, seed=idx, dtype=dtype) for idx, dtype in enumerate(ALL_DTYPES * 2)]
    options = {"low_precision": "master", "refresh_schedule": "fixed", "precondition_frequency": 3}
    optimizer = DyKAF(params, **options)
    run(optimizer, range(9))
    for idx, dtype in enumerate(ALL_DTYPES * 2):
        alone = parameter(5, 4, seed=idx, dtype=dtype)
        other = DyKAF([alone], **options)
        for step in range(9):
            alone.grad = gradient(alone, step, idx)
            other.step()
        assert bits(params[idx]) == bits(alone)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("options", [{}, {"max_precond_dim": 0}, {"second_moment": "rank_one"}])
def test_maximize_is_descent_on_the_negated_gradient(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ascending, descending = parameter(5, 4, dtype=dtype), parameter(5, 4, dtype=dtype)
    up = DyKAF([ascending], maximize=True, precondition_frequency=3, **options)
    down = DyKAF([descending], precondition_frequency=3, **options)
    for step in range(10):
        ascending.grad = gradient(ascending, step, 0)
        descending.grad = -ascending.grad
        up.step()
        down.step()
    assert trajectory(up) == trajectory(down)


# ---- Low precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_copy_is_a_float32_run(dtype: torch.dtype) -> None:
    """The same gradients to a float32 parameter: the master equals it, the parameter rounds it."""
    low = parameter(6, 4, dtype=dtype)
    wide = nn.Parameter(low.detach().float())
    optimizers = [DyKAF([low], low_precision="master"), DyKAF([wide])]
    for step in range(12):
        low.grad = gradient(low, step, 0)
        wide.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert bits(optimizers[0].state[low]["master"]) == bits(wide)
        assert bits(low) == bits(wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"max_precond_dim": 0}])
def test_stochastic_rounding_picks_a_neighbour_without_bias(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """One update of equal entries by less than a spacing: each becomes one of the two neighbours
    of the exact value, and the mean is right. The mean of N independent roundings with spacing s
    has a standard deviation of at most s / (2 sqrt N); six of them never happen by chance."""
    side = 64
    low = nn.Parameter(torch.ones(side, side, dtype=dtype))
    wide = nn.Parameter(torch.ones(side, side, dtype=torch.float32))
    lr = 1e-4  # of a spacing of 2^-8 (bfloat16) or 2^-11 (float16) below 1
    optimizers = [DyKAF([param], lr=lr, weight_decay=0.0, **options) for param in (low, wide)]
    for step in range(2):
        for param in (low, wide):
            param.grad = gradient(wide, step, 0).abs().to(dtype).to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
        if bool((low.detach() != 1).any()):
            break
    spacing = torch.finfo(dtype).eps
    error = low.detach().double() - wide.detach().double()
    assert float(error.abs().max()) <= spacing
    assert float(error.mean().abs()) < 6 * spacing / 2 / side
    assert 0 < int((low != 1).sum()) < side * side


def test_seed_and_place_name_the_random_numbers() -> None:
    def final(seed: int, place: int) -> Any:
        params = [parameter(6, 4, dtype=torch.bfloat16) for _ in range(2)]
        schedule = {"refresh_schedule": "fixed", "precondition_frequency": 2}
        optimizer = DyKAF(params, seed=seed, lr=0.01, **schedule)
        for step in range(5):
            for param in params:
                param.grad = gradient(param, step, 0)
            optimizer.step()
        return bits(params[place])

    assert final(1, 0) == final(1, 0)
    assert len({final(1, 0), final(2, 0), final(1, 1), final(2**64 - 1, 0)}) == 4


def test_random_numbers_go_by_the_place_in_the_whole_optimizer() -> None:
    """Not in the group, and not among those that have a gradient at the step."""

    def final(groups: list[int], without: tuple[int, ...] = ()) -> list[Any]:
        params = [parameter(7, dtype=torch.bfloat16) for _ in range(sum(groups))]
        parts = iter(params)
        optimizer = DyKAF([{"params": [next(parts) for _ in range(size)]} for size in groups])
        for step in range(3):
            for idx, param in enumerate(params):
                param.grad = None if idx in without else gradient(param, step, 0)
            optimizer.step()
        return [bits(param) for param in params]

    together = final([3])
    assert len(set(together)) == 3
    assert final([1, 2]) == final([2, 1]) == final([1, 1, 1]) == together
    assert final([3], without=(0, 1))[2] == together[2]
