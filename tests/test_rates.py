"""Groups that differ in rates alone are one job of a step; each parameter has its own rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import backends
import pytest
import torch
from torch import Tensor, nn

import dykaf

SHAPES = [(6, 4), (2, 80), (3, 5, 4), (5,), (6, 4), (6, 4)]
RATES: list[dict[str, Any]] = [
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 3e-3, "weight_decay": 0.0},
    {"lr": 0.0, "weight_decay": 0.5},
]


def params_and_groups(dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(backends.device(), dtype))
        for shape in SHAPES
    ]
    groups = [{"params": params[i::3], **rates, **options} for i, rates in enumerate(RATES)]
    return list(params), groups


def step(optimizers: Sequence[dykaf.DyKAF], params: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_kept", [True, False])
def test_each_group_has_its_rates(dtype: torch.dtype, is_kept: bool) -> None:
    """As optimizers of one group each, to the bit; the rates change from step to step."""
    together, groups = params_and_groups(dtype)
    apart, other_groups = params_and_groups(dtype)
    options: dict[str, Any] = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    one = dykaf.DyKAF(groups, **options)
    many = [dykaf.DyKAF([group], **options) for group in other_groups]
    for seed in range(8):
        for group, optimizer in zip(one.param_groups, many, strict=True):
            for changed in (group, optimizer.param_groups[0]):
                changed["lr"] *= 0.9
                changed["weight_decay"] *= 0.8
        if not is_kept:
            one._kept = None
        step([one], together, seed)
        step(many, apart, seed)
        assert [p.tolist() for p in together] == [p.tolist() for p in apart]


@pytest.mark.parametrize(
    ("changed", "num_jobs"),
    [({}, 1), ({"betas": (0.9, 0.9)}, 2), ({"maximize": True}, 2), ({"nonfinite": "raise"}, 2)],
)
def test_other_options_part_them(
    changed: dict[str, Any], num_jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    init = dykaf.ops.Jobs.__init__

    def counting(self: dykaf.ops.Jobs, jobs: Sequence[Any]) -> None:
        counts.append(len(jobs))
        init(self, jobs)

    monkeypatch.setattr(dykaf.ops.Jobs, "__init__", counting)
    params, groups = params_and_groups(torch.float32)
    optimizer = dykaf.DyKAF(groups)
    for seed in range(3):
        step([optimizer], params, seed)
    assert set(counts) == {1}
    optimizer.param_groups[1].update(changed)
    counts.clear()
    step([optimizer], params, 3)
    assert counts == ([] if num_jobs == 1 and optimizer._kept is not None else [num_jobs])


def test_a_rate_on_the_gpu_is_that_of_its_group_alone() -> None:
    if not backends.is_gpu():
        pytest.skip("the CPU reads every rate")
    params, groups = params_and_groups(torch.float32)
    others, plain = params_and_groups(torch.float32)
    groups[1]["lr"] = torch.tensor(3e-3, device=backends.device())
    optimizer, expected = dykaf.DyKAF(groups), dykaf.DyKAF(plain)
    for seed in range(5):
        step([optimizer], params, seed)
        step([expected], others, seed)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)
