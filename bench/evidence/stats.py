"""The paired comparison; no dependency but the standard library."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


def student_cdf(t: float, dof: int) -> float:
    """P(T <= t) of Student's distribution with whole degrees of freedom.

    The finite series of Abramowitz & Stegun 26.7.3 and 26.7.4, with theta = atan(t / sqrt(dof)).
    """
    theta = math.atan2(t, math.sqrt(dof))
    cos_sq = math.cos(theta) ** 2
    if dof % 2 == 1:
        total, term = 0.0, 1.0
        for k in range(1, dof - 1, 2):  # cos + 2/3 cos^3 + ... up to cos^(dof - 2)
            term *= 1.0 if k == 1 else (k - 1) / k * cos_sq
            total += term
        inside = 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    else:
        total, term = 1.0, 1.0
        for k in range(2, dof, 2):  # 1 + 1/2 cos^2 + ... up to cos^(dof - 2)
            term *= (k - 1) / k * cos_sq
            total += term
        inside = math.sin(theta) * total
    return 0.5 + 0.5 * inside


def student_quantile(probability: float, dof: int) -> float:
    """The t with student_cdf(t, dof) = probability, for probabilities of at least one half."""
    low, high = 0.0, 1.0
    while student_cdf(high, dof) < probability:
        high *= 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        if student_cdf(middle, dof) < probability:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and half the width of its confidence interval."""

    mean: float
    half_width: float  # infinite for a single pair
    num_pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        if self.num_pairs == 1:
            return f"{self.mean:+.4f} (1 pair)"
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"


def paired_difference(ours: dict[int, float], base: dict[int, float]) -> Difference | None:
    """Differences ours - base over the seeds that both have; None if they share none.

    The interval is mean +- t sd / sqrt(n), t the 97.5% quantile with n - 1 degrees of freedom.
    """
    differences = [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]
    n = len(differences)
    if n == 0:
        return None
    half_width = math.inf
    if n > 1:
        quantile = student_quantile(0.5 + CONFIDENCE / 2, n - 1)
        half_width = quantile * statistics.stdev(differences) / math.sqrt(n)
    return Difference(statistics.fmean(differences), half_width, n)
