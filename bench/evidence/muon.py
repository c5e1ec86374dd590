"""torch's Muon with its iteration in float32.

torch.optim.Muon orthogonalises in bfloat16, whose products a CPU without instructions for it
emulates at a small fraction of the float32 rate. Where optimizers are compared by time, that would
measure the CPU. The iteration is the one of torch: X <- a X + (b A + c A^2) X with A = X X^T
(Jordan et al. 2024), from X of unit Frobenius norm, the short side first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import _muon


def orthogonalise(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Brings the singular values of a matrix near 1, in its own dtype."""
    a, b, c = coefficients
    is_tall = grad.size(0) > grad.size(1)
    X = grad.mT if is_tall else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon, but for the dtype of the iteration."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with mock.patch.object(_muon, "_zeropower_via_newtonschulz", orthogonalise):
            return super().step(closure)
