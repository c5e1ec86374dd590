"""Matrices without factors: the optimizer against the float64 reference, on any backend."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import reference
import torch
from optim_helpers import frozen
from reference import ReferenceDyKAF
from tolerances import gamma, newton_schulz_bound, newton_schulz_growth
from torch import Tensor

from dykaf import DyKAF

FORMS: dict[str, dict[str, Any]] = {
    "orthogonal": {},
    "orthogonal, plain momentum": {"nesterov": False, "orthogonalize": 5},
    "adam": {"orthogonalize": 0},
    "adam, plain momentum": {"orthogonalize": 0, "nesterov": False},
    "factored": {"second_moment": "factored"},
    "rank_one": {"second_moment": "rank_one"},
    "factored adam": {"second_moment": "factored", "orthogonalize": 0},
    "momentum": {"second_moment": "none", "orthogonalize": 5},
}


def signs(shape: tuple[int, int], step: int) -> Tensor:
    """A gradient with entries of magnitudes in [0.5, 1]."""
    generator = torch.Generator().manual_seed(step)
    values = torch.rand(shape, generator=generator) - 0.5
    return values + 0.5 * values.sign()


@pytest.mark.parametrize("shape", [(5, 7), (7, 4), (1, 9), (40, 70), (90, 33)])
@pytest.mark.parametrize("form", FORMS)
def test_trajectory(form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and second moment are averages of numbers of at most 1 and err by gamma(60) at most
    (an average forgets; a row's mean is of as many as it is long), D by twice that over a root of
    0.5. Newton-Schulz starts from D over two norms, whose errors are of its size, and lets it grow.
    """
    steps, options = 25, {"sides": "none", "weight_decay": 0.1, "eps": 1e-3, **FORMS[form]}
    W = signs(shape, 100).double()
    param = W.float().to(backends.device())
    optimizer = DyKAF([param], **options)
    lr = optimizer.param_groups[0]["lr"]
    error_of_D = 4 * gamma(60 + max(shape), torch.float32) * (shape[0] * shape[1]) ** 0.5
    errors: list[float] = []
    orthogonalized = reference.orthogonalized

    def recorded(U: Tensor, num_steps: int, least_rms: float) -> Tensor:
        X, full = U / U.norm(), 0.2 * max(shape) ** 0.5
        root = float((X @ X.T).norm()) ** 0.5 if least_rms > 0 else 1.0
        growth = newton_schulz_growth(X / root, num_steps)
        result = orthogonalized(U, num_steps, least_rms)
        relative = 3 * error_of_D / float(U.norm())
        errors.append(relative * (full * growth / root + float(result.norm())))
        errors[-1] += newton_schulz_bound(U, num_steps, torch.float32, least_rms)
        return result

    monkeypatch.setattr(reference, "orthogonalized", recorded)
    ref = ReferenceDyKAF(param.cpu().double(), **options)
    for step in range(steps):
        param.grad = signs(shape, step).to(param.device)
        optimizer.step()
        ref.step(signs(shape, step).double())
    assert len(errors) == (0 if options.get("orthogonalize") == 0 else steps)
    bound = lr * (sum(errors) if errors else steps * error_of_D)
    bound += steps * gamma(2, torch.float32) * float(W.norm())
    assert float((param.cpu().double() - ref.W).norm()) <= bound < 0.05 * float((ref.W - W).norm())
    state = optimizer.state[param]
    assert float(state["update_rms"]) == pytest.approx(ref.update_rms, rel=0.01)
    assert state["rho"].tolist() == [0.0, 0.0]
    assert not {"L", "R", "Q_L", "Q_R", "refreshes"} & set(state)


@pytest.mark.filterwarnings("ignore:gradient of")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_not_finite_changes_nothing(form: str, dtype: torch.dtype) -> None:
    param = signs((6, 9), 100).to(backends.device(), dtype)
    optimizer = DyKAF([param], sides="none", **FORMS[form])
    for step in range(3):
        param.grad = signs((6, 9), step).to(param)
        optimizer.step()
    assert param.grad is not None
    param.grad[2, 3] = float("nan")
    before = frozen(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.skipped_steps = 0
    assert frozen(optimizer) == before


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_row_and_a_vector_of_its_length(order: list[int]) -> None:
    """One is a matrix, the other goes to AdamW: each as alone, though their arrays are alike."""
    params = [signs((1, 8), 100), signs((1, 8), 101).flatten()]
    params = [param.to(backends.device()) for param in params]
    alone = [param.clone() for param in params]
    together = DyKAF([params[i] for i in order], sides="none")
    apart = [DyKAF([param], sides="none") for param in alone]
    for step in range(6):
        for idx in (0, 1):
            grad = signs((1, 8), 2 * step + idx).to(backends.device())
            params[idx].grad = grad.view_as(params[idx])
            alone[idx].grad = params[idx].grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, alone, strict=True))
    assert not torch.equal(params[0].flatten(), params[1])
