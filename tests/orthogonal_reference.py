"""The orthogonalised update by singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonalized(U: Tensor, steps: int) -> Tensor:
    """0.2 sqrt(max(m, n)) times U with its singular values, over ||U||, mapped `steps` times by the
    quintic a s + b s^3 + c s^5 of Muon: Newton-Schulz steps without their products."""
    left, singular_values, right = torch.linalg.svd(U, full_matrices=False)
    s = singular_values / singular_values.norm().clamp_min(1e-300)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(U.shape)) * (left * s) @ right
