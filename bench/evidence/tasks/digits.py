"""Softmax regression on scikit-learn's digits, full batch: convex, with a known optimum.

"loss" is the gap to the optimum. An optimizer that cannot close it, or leaves the start, has a
defect that a noisy loss would hide.
"""

from __future__ import annotations

import functools
import gzip
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.evidence import EvidenceError
from bench.evidence.grid import Run
from bench.evidence.sources import DIGITS, read_member, sha256_of

NUM_CLASSES = 10
OPTIMUM_TOLERANCE = 1e-8
START_DEVIATION = 0.1


@functools.lru_cache(maxsize=1)
def load() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Pixels in [0, 1] and a constant column [1797, 65], labels [1797], sha256; float64."""
    packed = read_member(DIGITS, "sklearn/datasets/data/digits.csv.gz")
    rows = [list(map(float, line.split(b","))) for line in gzip.decompress(packed).split()]
    table = torch.tensor(rows, dtype=torch.float64)
    ones = torch.ones(len(table), 1, dtype=torch.float64)
    return torch.cat([table[:, :-1] / 16, ones], 1), table[:, -1].long(), sha256_of(packed)


def data_sha256(task: str, settings: dict[str, Any]) -> str:
    return load()[2]


def objective(W: torch.Tensor, X: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Mean cross-entropy + penalty / 2 ||W||^2: strictly convex."""
    return functional.cross_entropy(X @ W.T, y) + 0.5 * penalty * W.square().sum()


@functools.lru_cache(maxsize=4)
def optimum(penalty: float) -> float:
    """The least value, by Newton's method in float64.

    The objective is strongly convex with constant `penalty`, so it lies at most
    ||gradient||^2 / (2 penalty) above its optimum: that bound ends the iteration.

    Raises:
        EvidenceError: the bound was not reached.
    """
    X, y, _ = load()
    W = torch.zeros(NUM_CLASSES, X.shape[1], dtype=torch.float64)
    for _ in range(50):
        P = torch.softmax(X @ W.T, 1)
        gradient = (P - functional.one_hot(y, NUM_CLASSES)).T @ X / len(y) + penalty * W
        if gradient.square().sum() / (2 * penalty) < 1e-3 * OPTIMUM_TOLERANCE:
            return float(objective(W, X, y, penalty))
        # Hessian block (a, b): mean over samples of p_a (delta_ab - p_b) x x^T.
        weights = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
        hessian = torch.einsum("sab,si,sj->aibj", weights, X, X) / len(y)
        hessian = hessian.reshape(W.numel(), W.numel())
        hessian += penalty * torch.eye(W.numel(), dtype=W.dtype)
        step = torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(W.shape)
        size, start = 1.0, objective(W, X, y, penalty)
        while objective(W - size * step, X, y, penalty) > start and size > 1e-6:
            size /= 2
        W -= size * step
    raise EvidenceError("digits: Newton's method did not reach the optimum")


class Softmax(nn.Module):
    """One float64 matrix."""

    def __init__(self, seed: int, num_features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(NUM_CLASSES, num_features, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(START_DEVIATION * start)


class Digits:
    """The matrix and its objective."""

    def __init__(self, run: Run) -> None:
        self.penalty = run.settings["penalty"]
        self.X, self.y, _ = load()
        self.optimum = optimum(self.penalty)
        self.model = Softmax(run.seed, self.X.shape[1])
        self.hidden = ["weight"]

    def loss(self) -> torch.Tensor:
        return objective(self.model.weight, self.X, self.y, self.penalty)

    @torch.no_grad()
    def evaluate(self, *, final: bool) -> dict[str, float]:
        """Gap to the optimum, which is known to OPTIMUM_TOLERANCE: smaller gaps count as that."""
        return {"loss": max(self.loss().item() - self.optimum, OPTIMUM_TOLERANCE)}


def build(run: Run) -> Digits:
    return Digits(run)
