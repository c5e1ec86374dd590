"""bfloat16 and float16 parameters: stochastic rounding and float32 master copies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import Matrices
from torch import Tensor

import dykaf
from dykaf import ops

LOW = [torch.bfloat16, torch.float16]
low_dtypes = pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])


def rounded(
    values: Tensor, dtype: torch.dtype, seed: int = 0, stream: int = 0, step: int = 3
) -> Tensor:
    """0 - lr * update with lr = 1: the rounding of -update alone."""
    matrices = Matrices(torch.float32)
    size = values.numel()
    state = matrices.state(1, size, max_precond_dim=1)
    state["step"].fill_(step)
    param = torch.zeros(1, size, dtype=dtype)
    options = matrices.options(lr=1.0, weight_decay=0.0, seed=seed)
    ops.apply_update_([param], [-values.reshape(1, size)], [state], [stream], options)
    return param.reshape(-1)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The two numbers of `dtype` around a positive value that is not one of them."""
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    bits = nearest.view(torch.int16)
    other = bits + (1 if float(nearest) < value else -1)
    pair = sorted([float(nearest), float(other.to(torch.int16).view(dtype))])
    return pair[0], pair[1]


@low_dtypes
@pytest.mark.parametrize(
    "value", [1.0037, 1.9999, 3.1e-5, 7.3e-6, 5.5e-8, 1234.567, -0.33, -2.2e-5]
)
def test_rounds_to_a_neighbour_with_the_right_frequency(dtype: torch.dtype, value: float) -> None:
    """Also in float16's subnormal range, below 2^-14 = 6.1e-5."""
    num = 200_000
    value = float(torch.tensor(value, dtype=torch.float32))
    low, high = neighbours(abs(value), dtype)
    actual = rounded(torch.full((num,), value), dtype).double() * math.copysign(1, value)
    assert set(actual.tolist()) == {low, high}
    probability = (abs(value) - low) / (high - low)
    share = float((actual == high).double().mean())
    deviation = math.sqrt(probability * (1 - probability) / num)
    # 13 (float16), 16 (bfloat16) or 24 random bits quantise the probability.
    assert abs(share - probability) <= 5 * deviation + 2**-13


@low_dtypes
def test_representable_values_do_not_change(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    assert torch.equal(rounded(values.float(), dtype), values)


@low_dtypes
def test_non_finite_and_overflowing_values(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([math.nan, math.inf, -math.inf, largest, -largest])
    actual = rounded(values, dtype)
    assert actual[0].isnan()
    assert actual[1:].tolist() == [math.inf, -math.inf, largest, -largest]
    if dtype == torch.float16:
        beyond = rounded(torch.full((1000,), 65519.9), dtype)
        assert set(beyond.tolist()) == {65504.0, math.inf}
        assert rounded(torch.tensor([1e6, -1e6]), dtype).tolist() == [math.inf, -math.inf]


@low_dtypes
def test_random_bits_depend_on_seed_stream_step_and_element_alone(dtype: torch.dtype) -> None:
    values = torch.full((5000,), 1.0037)
    base = rounded(values, dtype)
    assert torch.equal(base, rounded(values, dtype))
    assert torch.equal(base[:100], rounded(values[:100], dtype))
    for changed in ({"seed": 1}, {"stream": 1}, {"step": 4}):
        other = rounded(values, dtype, **changed)
        share = float((other == base).double().mean())
        low, high = neighbours(1.0037, dtype)
        p = (1.0037 - low) / (high - low)
        agreement = p * p + (1 - p) * (1 - p)
        assert abs(share - agreement) <= 5 * math.sqrt(agreement * (1 - agreement) / 5000)


def train(dtype: torch.dtype, num_steps: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Small equal steps that rounding to nearest would lose altogether."""
    matrices = Matrices(torch.float32)
    param = torch.nn.Parameter(torch.full((40, 30), 4.0, dtype=dtype))
    optimizer = dykaf.DyKAF([param], weight_decay=0.0, eps=1e-3, **options)
    for _ in range(num_steps):
        param.grad = (1 + 0.1 * matrices.randn(40, 30)).to(dtype)
        optimizer.step()
    return param.detach().double(), optimizer.state[param]


@low_dtypes
def test_low_precision_follows_the_float32_trajectory(dtype: torch.dtype) -> None:
    """lr 1e-4 is 1/156 of bfloat16's spacing at 4 and 1/20 of float16's."""
    options = {"lr": 1e-4, "max_precond_dim": 0}
    expected = float(train(torch.float32, 200, **options)[0].mean())
    travelled = 4 - expected
    assert travelled > 0.015
    stochastic, _ = train(dtype, 200, **options)
    # 200 roundings of variance at most spacing^2 / 4 for each of 1200 elements.
    spacing = 4 * torch.finfo(dtype).eps
    assert abs(float(stochastic.mean()) - expected) <= 5 * spacing * math.sqrt(200 / 4 / 1200)
    master_param, state = train(dtype, 200, low_precision="master", **options)
    # The gradients alone are rounded, by less than 2^-8 of their size.
    assert abs(float(state["master"].mean()) - expected) <= travelled * 2**-7
    assert torch.equal(master_param, state["master"].to(dtype).double())


@low_dtypes
@pytest.mark.parametrize("low_precision", ["stochastic", "master"])
def test_factors_and_moments_are_float32(dtype: torch.dtype, low_precision: str) -> None:
    """The state equals that of a float32 parameter with the same rounded gradients, bit for bit."""
    matrices = Matrices(torch.float32)
    grads = [matrices.randn(9, 7).to(dtype) for _ in range(12)]
    states = []
    for param_dtype in (dtype, torch.float32):
        param = torch.nn.Parameter(torch.ones(9, 7, dtype=param_dtype))
        optimizer = dykaf.DyKAF([param], low_precision=low_precision)
        for grad in grads:
            param.grad = grad.to(param_dtype)
            optimizer.step()
        states.append(optimizer.state[param])
    low, full = states
    for key in full:
        assert low[key].dtype == full[key].dtype
        assert torch.equal(low[key], full[key]), key
