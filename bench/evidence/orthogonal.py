"""Muon's relatives in plain PyTorch, from the formulas of their papers.

For a weight W (m x n) with gradient G and NS_k, k Newton-Schulz steps of the quintic of Jordan et
al. (2024, Muon) on X / ||X||, whose singular values go towards 1:

    M <- beta1 M + (1 - beta1) G        N = beta1 M + (1 - beta1) G, or M without `nesterov`

    "muon"     U = NS_k(N)
    "adam"     V <- beta2 V + (1 - beta2) G^2    U = NS_k(N / (sqrt(V) + eps)), bias-corrected
    "normuon"  (Li et al. 2025, arXiv 2510.05491; the paper takes N = M)
               O = NS_k(N)    v <- beta2 v + (1 - beta2) mean_columns(O^2)
               U = O / (sqrt(v) + eps)

    W <- W (1 - lr weight_decay) - lr s U,   s = 0.2 sqrt(max(m, n)), for "normuon"
                                             s = 0.2 sqrt(m n) / ||U||

so that the root mean square of an update is about 0.2 for all, as AdamW's is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
KINDS = ("muon", "adam", "normuon")


def newton_schulz(X: Tensor, steps: int) -> Tensor:
    """NS_k of a matrix; zero stays zero."""
    norm = X.norm()
    X = X / torch.where(norm > 0, norm, 1.0)
    is_tall = X.shape[0] > X.shape[1]
    X = X.T if is_tall else X
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if is_tall else X


def update_scale(shape: torch.Size) -> float:
    """s of "muon" and "adam"."""
    return 0.2 * math.sqrt(max(shape))


class OrthogonalOptimizer(torch.optim.Optimizer):
    """Muon ("muon"), Adam's direction orthogonalised ("adam", AdaMuon's kind), NorMuon ("normuon").

    Args:
        params: parameters with two dimensions.
        lr: step size.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        form: "muon", "adam" or "normuon".
        steps: Newton-Schulz steps.
        nesterov: whether the momentum is Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        form: str = "muon",
        steps: int = 5,
        nesterov: bool = True,
    ) -> None:
        if form not in KINDS:
            raise ValueError(f"form: expected one of {KINDS}, got {form!r}")
        self.form, self.steps, self.nesterov = form, steps, nesterov
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for W in group["params"]:
                if W.grad is not None:
                    W.mul_(1 - group["lr"] * group["weight_decay"])
                    W.sub_(group["lr"] * self._update(W.grad, self.state[W], group))

    def _update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta1 = group["betas"][0]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(G)
        state["step"] += 1
        M = state["exp_avg"].lerp_(G, 1 - beta1) / (1 - beta1 ** state["step"])
        N = torch.lerp(G, M, beta1) if self.nesterov else M
        if self.form == "adam":
            return update_scale(G.shape) * newton_schulz(
                self._over_root(N, G.square(), state, group), self.steps
            )
        O = newton_schulz(N, self.steps)  # noqa: E741  # the paper's letter
        if self.form == "muon":
            return update_scale(G.shape) * O
        U = self._over_root(O, O.square().mean(1, keepdim=True), state, group)
        norm = U.norm()
        return 0.2 * math.sqrt(U.numel()) / torch.where(norm > 0, norm, 1.0) * U

    @staticmethod
    def _over_root(
        X: Tensor, squares: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """X over the root of the running mean of `squares`, bias-corrected."""
        beta2 = group["betas"][1]
        V = state.setdefault("exp_avg_sq", torch.zeros_like(squares))
        V.lerp_(squares, 1 - beta2)
        return X / ((V / (1 - beta2 ** state["step"])).sqrt() + group["eps"])
