"""The orthogonalised update by singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise_rms(beta1: float, nesterov: bool) -> float:
    """Root mean square of a long average of independent signs, or of Nesterov's mean of it and the
    newest."""
    weights = (1 - beta1) * beta1 ** torch.arange(3000, dtype=torch.float64)
    if nesterov:
        weights = beta1 * weights
        weights[0] += 1 - beta1
    return float(weights.norm())


def orthogonalized(U: Tensor, steps: int, least_rms: float = 0.0) -> Tensor:
    """Newton-Schulz steps without their products.

    0.2 sqrt(max(m, n)) times U with its singular values, over (sum of their 4th powers)^(1/4), or
    over ||U|| as Muon has it, mapped `steps` times by Muon's quintic a s + b s^3 + c s^5. Where the
    root mean square of U is below `least_rms`, 0 for Muon's, all is smaller in this ratio.
    """
    rms = float(U.square().mean().sqrt())
    left, singular_values, right = torch.linalg.svd(U, full_matrices=False)
    s = singular_values / singular_values.norm().clamp_min(1e-300)
    if least_rms > 0:
        s = s / s.norm(4).clamp_min(1e-300)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    scale = 0.2 * math.sqrt(max(U.shape)) * min(1, rms / least_rms if least_rms > 0 else 1)
    return scale * (left * s) @ right
