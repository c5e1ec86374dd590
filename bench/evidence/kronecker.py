"""SOAP and KL-Shampoo in plain PyTorch, from the formulas of their papers.

For a weight W (m x n) with gradient G, factors S_L (m x m) and S_R (n x n) with bases Q_L, Q_R:

    "shampoo" factors (SOAP, Vyas et al. 2024, arXiv 2409.11321)
        S_L <- beta2 S_L + (1 - beta2) G G^T             S_R <- beta2 S_R + (1 - beta2) G^T G
    "kl" factors (Lin et al. 2025, arXiv 2509.03378), both from the old S_L, S_R
        S_L <- beta2 S_L + (1 - beta2) G S_R^-1 G^T / n  S_R <- ... + (1 - beta2) G^T S_L^-1 G / m

    "adam" update (SOAP): Adam in the basis, M the average of G in the original coordinates
        V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2
        W <- W - lr Q_L [ (Q_L^T M Q_R) / (sqrt(V) + eps) ] Q_R^T
    with `newton_schulz` = k > 0 orthogonalised, as bench/evidence/orthogonal.py has it
        W <- W - lr 0.2 sqrt(max(m, n)) NS_k(Q_L [ ... ] Q_R^T)
    "root" update (KL-Shampoo), after the factors have seen G
        W <- W - lr S_L^-1/2 M S_R^-1/2

    every `precondition_frequency` steps Q <- QR(S Q), columns by falling Rayleigh quotient.

Powers of S are taken on its Rayleigh quotients in the current basis. Where the papers leave it
open, this is as in torch.optim.AdamW: bias correction of M and V, eps after it, decoupled decay
first. The first gradient sets factors and bases (SOAP's own rule) and updates nothing. The KL
factors start from the identity times the root mean square of that gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bench.evidence.orthogonal import newton_schulz, update_scale

# Rayleigh quotients below this share of the largest count as this share: S^-1 must stay finite.
FLOOR = 1e-10


class KroneckerOptimizer(torch.optim.Optimizer):
    """SOAP (factors "shampoo"), KL-SOAP (factors "kl"), KL-Shampoo (factors "kl", update "root").

    Args:
        params: parameters with two dimensions.
        lr: step size.
        betas: decay of the momentum; decay of the second moment and of the factors.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        precondition_frequency: steps between two refreshes of the bases.
        max_precond_dim: a longer side has no factor and keeps the identity as its basis.
        factors: "shampoo" or "kl".
        update: "adam" or "root".
        newton_schulz: steps that orthogonalise SOAP's update; 0: none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        factors: str = "shampoo",
        update: str = "adam",
        newton_schulz: int = 0,
    ) -> None:
        if factors not in ("shampoo", "kl") or update not in ("adam", "root"):
            raise ValueError(f"no such form: factors {factors!r}, update {update!r}")
        if (factors, update) != ("shampoo", "adam") and max_precond_dim < 10000:
            raise ValueError(f"max_precond_dim: for SOAP alone, got {max_precond_dim}")
        if update != "adam" and newton_schulz > 0:
            raise ValueError(f"newton_schulz: for update 'adam' alone, got {newton_schulz}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precond_dim": max_precond_dim,
                "factors": factors,
                "update": update,
                "newton_schulz": newton_schulz,
            },
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, parameter.grad, group)

    def _step_matrix(self, W: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        state = self.state[W]
        beta1, beta2 = group["betas"]
        if not state:
            if bool((G != 0).any()):  # a zero gradient has no basis
                state.update(first_state(G, beta2, group["factors"], group["max_precond_dim"]))
            return
        state["step"] += 1
        t = state["step"]
        M = state["M"].lerp_(G, 1 - beta1) / (1 - beta1**t)
        W.mul_(1 - group["lr"] * group["weight_decay"])
        Q_L, Q_R = state["Q"]
        if group["update"] == "adam":
            V = state["V"].mul_(beta2).add_(into(G, Q_L, Q_R).square(), alpha=1 - beta2)
            denominator = (V / (1 - beta2**t)).sqrt() + group["eps"]
            update = out_of(into(M, Q_L, Q_R) / denominator, Q_L, Q_R)
            if group["newton_schulz"] > 0:
                update = update_scale(W.shape) * newton_schulz(update, group["newton_schulz"])
            W.sub_(update, alpha=group["lr"])
            update_factors(state, G, beta2, group["factors"])
        else:
            update_factors(state, G, beta2, group["factors"])
            root_L, root_R = power(state, 0, -0.5), power(state, 1, -0.5)
            W.sub_(root_L @ M @ root_R, alpha=group["lr"])
        if t % group["precondition_frequency"] == 0:
            refresh(state)


def into(X: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Q_L^T X Q_R; None is the identity."""
    X = X if Q_L is None else Q_L.T @ X
    return X if Q_R is None else X @ Q_R


def out_of(X: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Q_L X Q_R^T; None is the identity."""
    X = X if Q_L is None else Q_L @ X
    return X if Q_R is None else X @ Q_R.T


def first_state(
    G: Tensor, beta: float, factors: str, max_precond_dim: int = 10000
) -> dict[str, Any]:
    """State after the first gradient: factors that have seen it, and their eigenvectors.

    Sides over max_precond_dim have None in place of both.
    """
    sides = G.shape
    state: dict[str, Any] = {"step": 0, "M": torch.zeros_like(G), "V": torch.zeros_like(G)}
    start = 0.0 if factors == "shampoo" else G.square().mean().sqrt()
    identities = [
        torch.eye(d, dtype=G.dtype, device=G.device) if d <= max_precond_dim else None
        for d in sides
    ]
    state["S"] = [None if identity is None else start * identity for identity in identities]
    state["Q"] = identities
    update_factors(state, G, beta, factors)
    state["Q"] = [
        None if S is None else torch.linalg.eigh(S).eigenvectors.flip(1) for S in state["S"]
    ]
    return state


def update_factors(state: dict[str, Any], G: Tensor, beta: float, factors: str) -> None:
    """One averaging step of both factors."""
    inverses = [power(state, side, -1.0) for side in (0, 1)] if factors == "kl" else []
    for side, (S, X) in enumerate(zip(state["S"], (G, G.T), strict=True)):
        if S is not None:
            is_kl = factors == "kl"
            term = X @ inverses[1 - side] @ X.T / X.shape[1] if is_kl else X @ X.T
            S.mul_(beta).add_(term, alpha=1 - beta)


def rayleigh(S: Tensor, Q: Tensor) -> Tensor:
    """diag(Q^T S Q)."""
    return (Q * (S @ Q)).sum(0)


def power(state: dict[str, Any], side: int, exponent: float) -> Tensor:
    """Q diag(Q^T S Q)^exponent Q^T."""
    Q = state["Q"][side]
    values = rayleigh(state["S"][side], Q)
    return (Q * values.clamp(min=FLOOR * float(values.max())) ** exponent) @ Q.T


def refresh(state: dict[str, Any]) -> None:
    """One step of orthogonal iteration per side; V follows the order of the columns."""
    for side, S in enumerate(state["S"]):
        if S is None:
            continue
        Q = state["Q"][side]
        order = torch.argsort(rayleigh(S, Q), descending=True)
        state["Q"][side] = torch.linalg.qr(S @ Q[:, order]).Q
        state["V"] = state["V"].index_select(side, order)
