"""SOAP from the formulas of its paper, in plain PyTorch: the benchmark's second baseline.

Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade, *SOAP: Improving and Stabilizing
Shampoo using Adam*, arXiv 2409.11321. With the gradient G [m, n] of W at step t:

    G'  = Q_L^T G Q_R
    M   = beta1 M + (1 - beta1) G            M' = Q_L^T M Q_R
    V   = beta2 V + (1 - beta2) G' o G'
    W   = W - lr Q_L (M' / (sqrt(V) + eps)) Q_R^T
    L   = beta2 L + (1 - beta2) G G^T        R  = beta2 R + (1 - beta2) G^T G
    every f steps, for each side:            Q  = QR(L Q)

M and V are bias-corrected as in Adam, weight decay is decoupled. The first gradient only sets up L
and R and their eigenvectors, so that it is not projected on a basis made of itself.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench.textbook import rotate, rotate_back


class TextbookSOAP(torch.optim.Optimizer):
    """SOAP, one matrix at a time; parameters that are not two-dimensional get AdamW.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the momentum; decay of the second moment and of L and R.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        precondition_frequency: steps between two refreshes of the bases.
        max_precond_dim: a longer side keeps the identity as its basis.
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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group)
        return loss

    def _step_parameter(self, W: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        state = self.state[W]
        beta1, beta2 = group["betas"]
        is_matrix = G.ndim == 2 and min(G.shape) <= group["max_precond_dim"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
            if is_matrix:
                init_factors(state, G, group["max_precond_dim"])
                update_factors(state, G, beta2)
                init_bases(state)
                return
        state["step"] += 1
        M, V = state["exp_avg"], state["exp_avg_sq"]
        M.lerp_(G, 1 - beta1)
        rotated = rotate(G, state)
        V.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        denominator = (V / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = rotate(M, state) / (1 - beta1 ** state["step"]) / denominator
        W.mul_(1 - group["lr"] * group["weight_decay"])
        W.sub_(rotate_back(update, state), alpha=group["lr"])
        if is_matrix:
            update_factors(state, G, beta2)
            if state["step"] % group["precondition_frequency"] == 0:
                refresh_bases(state)


def init_factors(state: dict[str, Any], G: Tensor, max_precond_dim: int) -> None:
    """Zero, for the sides that keep a factor."""
    for name, side in zip("LR", G.shape, strict=True):
        if side <= max_precond_dim:
            state[name] = torch.zeros(side, side, dtype=G.dtype, device=G.device)


def update_factors(state: dict[str, Any], G: Tensor, beta: float) -> None:
    """Two products, one per side."""
    if "L" in state:
        state["L"].mul_(beta).addmm_(G, G.T, alpha=1 - beta)
    if "R" in state:
        state["R"].mul_(beta).addmm_(G.T, G, alpha=1 - beta)


def init_bases(state: dict[str, Any]) -> None:
    """Eigenvectors."""
    for name in "LR":
        if name in state:
            state[f"Q_{name}"] = torch.linalg.eigh(state[name]).eigenvectors


def refresh_bases(state: dict[str, Any]) -> None:
    """One power iteration and QR per basis."""
    for name in "LR":
        if name in state:
            state[f"Q_{name}"] = torch.linalg.qr(state[name] @ state[f"Q_{name}"]).Q
