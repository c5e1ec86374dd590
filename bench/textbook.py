"""The method as the paper's research code runs it, in plain PyTorch: the benchmark's baseline.

Factors and momentum stay in the original coordinates, parameters are visited in a Python loop.
The order of operations and the number of matrix products per step are those of the research
code: two to rotate the gradient, two for the momentum, two to rotate the update back, six for
the unconventional integrator, and 6 n^3 flops and one QR per factor at a refresh. Two details
are not copied: the scale-free identity prior replaces the random rank-one start, and eps is
added after the bias correction; neither costs or saves time.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class TextbookDyKAF(torch.optim.Optimizer):
    """DyKAF with the unconventional integrator, one matrix at a time.

    Two-dimensional parameters are preconditioned, all others get AdamW.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the momentum; decay of the second moment and of the factors.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, applied after the step.
        precondition_frequency: steps between two refreshes of the bases.
        max_precond_dim: a longer side keeps the scaled identity as its factor, which is not stored.
        bounded: keep exp_avg_sq above what the momentum needs in a new basis, as this package does.
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
        bounded: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "bounded": bounded,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The loss, if a closure was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group)
        return loss

    def _step_parameter(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        is_matrix = parameter.ndim == 2 and min(parameter.shape) <= group["max_precond_dim"]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if is_matrix:  # the first gradient only sets up the factors and their bases
                init_factors(state, grad, beta2, group["max_precond_dim"])
                update_factors(state, grad, beta2)
                for side in "LR":
                    if side in state:
                        state[f"Q_{side}"] = descending_eigenvectors(state[side])
                return
        state["step"] += 1
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(grad, 1 - beta1)
        projected, momentum = grad, exp_avg
        if is_matrix:
            projected, momentum = rotate(grad, state), rotate(exp_avg, state)
        exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        root_correction = math.sqrt(1 - beta2 ** state["step"])
        denominator = exp_avg_sq.sqrt().div_(root_correction).add_(group["eps"])
        update = denominator.reciprocal_().mul_(momentum)
        if is_matrix:
            update = rotate_back(update, state)
        parameter.add_(update, alpha=-group["lr"] / (1 - beta1 ** state["step"]))
        if group["weight_decay"] != 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if is_matrix:
            update_factors(state, grad, beta2)
            if state["step"] % group["precondition_frequency"] == 0:
                refresh_bases(state, momentum_bound(group, state["step"]))


def momentum_bound(group: dict[str, Any], step: int) -> float | None:
    """C with exp_avg^2 <= C exp_avg_sq in one basis, where it is to hold across refreshes."""
    beta1, beta2 = group["betas"]
    total = sum((beta1**2 / beta2) ** k for k in range(step))
    return (1 - beta1) ** 2 / (1 - beta2) * total if group["bounded"] else None


def init_factors(state: dict[str, Any], grad: Tensor, beta: float, max_precond_dim: int) -> None:
    """L = I / sqrt(m), R = I / sqrt(n); `scale` is the rho^2 of rho^2 L (x) R."""
    m, n = grad.shape
    for name, side in (("L", m), ("R", n)):
        if side <= max_precond_dim:
            identity = torch.eye(side, dtype=grad.dtype, device=grad.device)
            state[name] = identity / math.sqrt(side)
    state["scale"] = grad.square().sum() * ((1 - beta) / beta / math.sqrt(m * n))


def update_factors(state: dict[str, Any], grad: Tensor, beta: float) -> None:
    """One basis-update-and-Galerkin step: six products."""
    if "L" not in state or "R" not in state:
        update_one_factor(state, grad, beta)
        return
    L, R = state["L"], state["R"]
    decayed = state["scale"] * beta
    U = (L * decayed).addmm_(grad @ R, grad.T, alpha=1 - beta)
    U.div_(torch.linalg.vector_norm(U))
    V = (R * decayed).addmm_(grad.T @ L, grad, alpha=1 - beta)
    V.div_(torch.linalg.vector_norm(V))
    overlap = torch.vdot(U.view(-1), L.view(-1)) * torch.vdot(R.view(-1), V.view(-1))
    galerkin = torch.vdot(U.view(-1), ((grad @ V) @ grad.T).view(-1))
    state["L"], state["R"] = U, V
    state["scale"] = overlap * decayed + galerkin * (1 - beta)


def update_one_factor(state: dict[str, Any], grad: Tensor, beta: float) -> None:
    """The other factor is the scaled identity: one product."""
    name, G = ("L", grad) if "L" in state else ("R", grad.T)
    gain = (1 - beta) / math.sqrt(G.shape[1])
    total = (state[name] * (state["scale"] * beta)).addmm_(G, G.T, alpha=gain)
    state["scale"] = torch.linalg.vector_norm(total)
    state[name] = total / state["scale"]


def rotate(X: Tensor, state: dict[str, Any]) -> Tensor:
    """Q_L^T X Q_R."""
    X = state["Q_L"].T @ X if "Q_L" in state else X
    return X @ state["Q_R"] if "Q_R" in state else X


def rotate_back(X: Tensor, state: dict[str, Any]) -> Tensor:
    """Q_L X Q_R^T."""
    X = state["Q_L"] @ X if "Q_L" in state else X
    return X @ state["Q_R"].T if "Q_R" in state else X


def descending_eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors, largest eigenvalue first."""
    eigenvectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    return eigenvectors.flip(1)


def refresh_bases(state: dict[str, Any], bound: float | None = None) -> None:
    """One power iteration and QR per basis, columns sorted by their Rayleigh quotients."""
    for side, (factor_name, basis_name) in enumerate((("L", "Q_L"), ("R", "Q_R"))):
        if factor_name not in state:
            continue
        factor, basis = state[factor_name], state[basis_name]
        rayleigh = (basis.T @ factor @ basis).diagonal()
        order = torch.argsort(rayleigh, descending=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)
        state[basis_name] = torch.linalg.qr(factor @ basis.index_select(1, order)).Q
        if bound is not None:
            least = rotate(state["exp_avg"], state).square() / bound
            state["exp_avg_sq"] = torch.maximum(state["exp_avg_sq"], least)
