"""Without factors it is torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import bits, parameter, run
from torch import nn

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
