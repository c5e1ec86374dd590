"""The orthogonalised update by singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonalized(U: Tensor, steps: int, as_muon: bool = False) -> Tensor:
    """Newton-Schulz steps without their products.

    0.2 sqrt(max(m, n)) times U with its singular values, over (sum of their 4th powers)^(1/4), or
    over ||U|| as Muon has it, mapped `steps` times by Muon's quintic a s + b s^3 + c s^5.
    """
    left, singular_values, right = torch.linalg.svd(U, full_matrices=False)
    s = singular_values / singular_values.norm().clamp_min(1e-300)
    if not as_muon:
        s = s / s.norm(4).clamp_min(1e-300)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(U.shape)) * (left * s) @ right
