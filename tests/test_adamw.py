"""Without factors it is torch.optim.AdamW, and goes on from its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_helpers import bits, parameter, params_of, randn, refuses, run, trajectory
from torch import Tensor, nn

from dykaf import DyKAF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("maximize", "weight_decay", "tensor_lr"),
    [(False, 0.0, False), (False, 0.3, True), (True, 0.3, False)],
)
def test_without_factors_it_is_adamw(
    dtype: torch.dtype, maximize: bool, weight_decay: float, tensor_lr: bool
) -> None:
    """Tolerance, u the unit roundoff: the moments carry at most 60 u of their largest term (three
    roundings a step over 1 / (1 - beta) = 20 steps), and a term is at most 16 times the root of
    the second moment within 50 steps, which makes 1000 u in D; the parameter itself is rounded
    twice a step. eps = 0.01 shows whether eps is added after the bias correction."""
    steps, lr = 50, 1e-2
    shapes = [(7, 5), (9,), (), (5, 3, 2), (2049,)]
    ours = [parameter(*shape, seed=idx, dtype=dtype) for idx, shape in enumerate(shapes)]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    options: dict[str, Any] = {
        "lr": torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr,
        "betas": (0.9, 0.95),
        "eps": 1e-2,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    dykaf = DyKAF(ours, max_precond_dim=4, **options)
    adamw = torch.optim.AdamW(theirs, foreach=False, **options)
    run(dykaf, range(steps))
    run(adamw, range(steps))
    unit_roundoff = torch.finfo(dtype).eps / 2
    for our, their in zip(ours, theirs, strict=True):
        bound = steps * unit_roundoff * (2 * float(their.detach().abs().max()) + 1000 * lr)
        assert float((our - their).detach().abs().max()) <= bound
        assert set(dykaf.state[our]) == {"step", "update_rms", "exp_avg", "exp_avg_sq"}
        assert float(dykaf.state[our]["step"]) == steps


def test_adamw_takes_zero_gradients_from_the_start() -> None:
    """A matrix with factors waits for its first gradient; AdamW decays at once."""
    vector, matrix = parameter(3), parameter(3, 3)
    start = matrix.detach().clone()
    expected = vector.detach() * (1 - 0.1 * 0.5)
    optimizer = DyKAF([vector, matrix], lr=0.1, weight_decay=0.5)
    for param in (vector, matrix):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(vector.detach(), expected, rtol=2e-7, atol=0)
    assert bits(matrix) == bits(start)
    assert float(optimizer.state[vector]["step"]) == 1
    assert float(optimizer.state[matrix]["step"]) == 0


# ---- From torch.optim.AdamW ----------------------------------------------------------------------


def _adamw_pair(
    shape: tuple[int, ...], channels_last: bool = False
) -> tuple[torch.optim.AdamW, nn.Parameter]:
    values = randn(*shape)
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    theirs, ours = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, foreach=False)
    run(adamw, range(10))
    ours.data.copy_(theirs.detach())
    return adamw, ours


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda param: DyKAF([param], max_precond_dim=0),
        # A group's own options stand where the saved group has none.
        lambda param: DyKAF([{"params": [param], "max_precond_dim": 0}]),
    ],
    ids=["default", "group"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_state_of_adamw_continues_as_adamw(
    make_optimizer: Callable[[nn.Parameter], DyKAF], channels_last: bool
) -> None:
    """Fifty float64 steps of parameters of order one: rounding is below 1e-12 by far."""
    adamw, ours = _adamw_pair((4, 3, 2, 2), channels_last)
    optimizer = make_optimizer(ours)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["max_precond_dim"] == 0
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    run(adamw, range(10, 60))
    run(optimizer, range(10, 60))
    theirs = params_of(adamw)[0]
    assert float((ours - theirs).detach().abs().max()) < 1e-12
    assert float(optimizer.state[ours]["step"]) == 60


def _saved_by_adamw(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    adamw = torch.optim.AdamW([parameter(*shape, dtype=dtype)], lr=0.01, **options)
    run(adamw, range(5))
    return adamw.state_dict()


def _loaded(saved: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> DyKAF:
    optimizer = DyKAF([parameter(*shape, seed=1, dtype=dtype)], max_precond_dim=0)
    optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parametrize(
    "form",
    [
        int,
        float,
        *(
            lambda step, dtype=dtype: step.to(dtype)
            for dtype in (torch.int64, torch.int32, torch.float64, torch.bfloat16)
        ),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (), (4, 3)])
def test_the_step_may_be_of_any_type(form: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    saved = _saved_by_adamw(shape, torch.float32)
    expected = _loaded(saved, shape, torch.float32)
    saved["state"][0]["step"] = form(saved["state"][0]["step"])
    optimizer = _loaded(saved, shape, torch.float32)
    assert float(optimizer.state[params_of(optimizer)[0]]["step"]) == 5
    for each in (optimizer, expected):
        run(each, range(5, 9))
    assert trajectory(optimizer) == trajectory(expected)


@pytest.mark.parametrize("shape", [(5,), (), (4, 3)])
@pytest.mark.parametrize("saved_in", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_of_another_dtype_are_converted(
    shape: tuple[int, ...], saved_in: torch.dtype, dtype: torch.dtype
) -> None:
    """Once, from what was saved to what the parameter keeps; not by way of its own dtype."""
    saved = _saved_by_adamw(shape, saved_in)
    optimizer = _loaded(saved, shape, dtype)
    state = optimizer.state[params_of(optimizer)[0]]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for key in ("exp_avg", "exp_avg_sq"):
        assert saved["state"][0][key].dtype == saved_in
        assert bits(state[key]) == bits(saved["state"][0][key].to(kept))
    run(optimizer, range(5, 8))
    assert float(state["step"]) == 8


def test_the_default_device_and_dtype_of_torch_do_not_matter() -> None:
    saved = _saved_by_adamw((5,), torch.float32)
    saved["state"][0]["step"] = 1001  # bfloat16 would make it 1000
    optimizer = DyKAF([parameter(5)])
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.load_state_dict(saved)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    run(optimizer, range(1))
    state = optimizer.state[params_of(optimizer)[0]]
    assert float(state["step"]) == 1002 and float(state["update_rms"]) > 0


def test_state_of_amsgrad_is_refused() -> None:
    saved = _saved_by_adamw((4, 3), torch.float32, amsgrad=True)
    optimizer = DyKAF([("weight", parameter(4, 3))], max_precond_dim=0)
    message = "state of weight: expected one of AdamW without amsgrad, got 'max_exp_avg_sq'"
    with refuses(optimizer, message):
        optimizer.load_state_dict(saved)


def test_with_factors_nothing_is_converted() -> None:
    """State of AdamW has no factors; of an own one another dtype would change the run."""
    optimizer = DyKAF([("weight", parameter(4, 3))])
    run(optimizer, range(2))
    with refuses(optimizer, "state of weight: expected a tensor 'update_rms', got None"):
        optimizer.load_state_dict(_saved_by_adamw((4, 3), torch.float32))
    saved = optimizer.state_dict()
    saved["state"] = {0: {**saved["state"][0], "step": 1}}
    with refuses(optimizer, "state of weight: expected a tensor 'step', got 1"):
        optimizer.load_state_dict(saved)
