"""The operations of dykaf.ops from plain torch calls, one parameter at a time.

What a careful user would write from docs/algorithm.md without this package: unscaled (no power of
two is taken out of the gradient), matrices of a stack together as a batch. Arguments are those of
dykaf.ops; the benchmark checks at its start that both agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.evidence.orthogonal import COEFFICIENTS

if TYPE_CHECKING:
    from dykaf.options import StepOptions
    from dykaf.state import State


def norm(x: Tensor) -> Tensor:
    """Frobenius norms, [..., 1, 1]."""
    size: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return size


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products, [..., 1, 1]."""
    return (x * y).sum((-2, -1), keepdim=True)


def grad_max(grads: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    maxima = [G.reshape(k, -1).abs().amax(1) for G, k in zip(grads, counts, strict=True)]
    return torch.cat(maxima).double()


def rotate(
    inputs: Sequence[Tensor], states: Sequence[State], into_basis: bool, options: StepOptions
) -> list[Tensor]:
    outputs = []
    for X, state in zip(inputs, states, strict=True):
        if "Q_L" in state:
            X = (state["Q_L"].mT if into_basis else state["Q_L"]) @ X
        if "Q_R" in state:
            X = X @ (state["Q_R"] if into_basis else state["Q_R"].mT)
        outputs.append(X)
    return outputs


def adam_update_(
    grads: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> list[Tensor]:
    beta1, beta2 = options["betas"]
    updates = []
    for G, state in zip(grads, states, strict=True):
        state["step"] += 1
        t = state["step"][..., None, None]
        state["exp_avg"].lerp_(G, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(options["eps"])
        update = (state["exp_avg"] / (1 - beta1**t)).div_(denominator)
        state["update_rms"].copy_(update.square().mean((-2, -1)).sqrt_())
        updates.append(update)
    return updates


def orthogonalize_(
    updates: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> None:
    """Without Nesterov's momentum, and no update is zero."""
    a, b, c = COEFFICIENTS
    beta1, _ = options["betas"]
    full_rms = math.sqrt((1 - beta1) / (1 + beta1))  # of D for gradients of noise
    for update, state in zip(updates, states, strict=True):
        m, n = update.shape[-2:]
        size = norm(update)
        X = (update if m <= n else update.mT) / size
        X /= norm(X @ X.mT).sqrt_()
        for _ in range(options["orthogonalize"]):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        fade = (size / (full_rms * math.sqrt(m * n))).clamp_(max=1)
        update.copy_(X if m <= n else X.mT).mul_(0.2 * math.sqrt(max(m, n)) * fade)
        state["update_rms"].copy_(update.square().mean((-2, -1)).sqrt_())


def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    states: Sequence[State],
    streams: Sequence[int],
    options: StepOptions,
) -> None:
    keep = 1 - options["lr"] * options["weight_decay"]
    for param, update in zip(params, updates, strict=True):
        param.mul_(keep).add_(update, alpha=-options["lr"])


def decayed(state: State, options: StepOptions, side_idx: int = 0) -> Tensor:
    """beta rho^2 of a side, [..., 1, 1], in the dtype of the factors."""
    rho = state["rho"][..., side_idx, None, None]
    return (options["factor_beta"] * rho.square()).to(state["exp_avg"].dtype)


def set_rho(state: State, squared: Tensor, side: slice | int = slice(None)) -> None:
    """Set rho from rho^2, [..., 1, 1]."""
    root = squared.double().sqrt()[..., 0]
    state["rho"][..., side] = root[..., 0] if isinstance(side, int) else root


def ksl_(G: Tensor, state: State, options: StepOptions) -> None:
    a, b = decayed(state, options), 1 - options["factor_beta"]
    L, R = state["L"], state["R"]
    K = a * L + b * (G @ R @ G.mT)
    U = K / norm(K)
    B = a * inner(U, L) * R + b * (G.mT @ (U @ G))
    s = norm(B)
    L.copy_(U)
    R.copy_(B / s)
    set_rho(state, s)


def bug_(G: Tensor, state: State, options: StepOptions) -> None:
    a, b = decayed(state, options), 1 - options["factor_beta"]
    L, R = state["L"], state["R"]
    K = a * L + b * (G @ R @ G.mT)
    J = a * R + b * (G.mT @ (L @ G))
    U, V = K / norm(K), J / norm(J)
    s = a * inner(U, L) * inner(R, V) + b * inner(U, G @ V @ G.mT)
    L.copy_(U)
    R.copy_(V)
    set_rho(state, s)


def average_(state: State, options: StepOptions, name: str, increment: Tensor) -> None:
    """rho^2 F <- beta rho^2 F + (1 - beta) increment, F of unit norm."""
    side_idx = "LR".index(name)
    total = decayed(state, options, side_idx) * state[name]
    total += (1 - options["factor_beta"]) * increment
    size = norm(total)
    state[name].copy_(total / size)
    set_rho(state, size, side_idx)


def diagonal_(G: Tensor, state: State, options: StepOptions) -> None:
    m, n = G.shape[-2:]
    average_(state, options, "L", G @ G.mT / n)
    average_(state, options, "R", G.mT @ G / m)


def one_sided_(G: Tensor, state: State, options: StepOptions) -> None:
    name, H = ("L", G) if "L" in state else ("R", G.mT)
    average_(state, options, name, H @ H.mT / math.sqrt(H.shape[-1]))
    state["rho"][:] = state["rho"][..., "LR".index(name), None]


INTEGRATORS = {"ksl": ksl_, "bug": bug_, "diagonal": diagonal_}


def factor_update_(grads: Sequence[Tensor], states: Sequence[State], options: StepOptions) -> None:
    for G, state in zip(grads, states, strict=True):
        two_sided = "L" in state and "R" in state
        (INTEGRATORS[options["integrator"]] if two_sided else one_sided_)(G, state, options)


def set_prior_(G: Tensor, state: State, options: StepOptions) -> None:
    """The identity, weighted so that both terms of K have the same trace."""
    m, n = G.shape[-2:]
    for name, d in (("L", m), ("R", n)):
        if name in state:
            state[name].copy_(torch.eye(d, device=G.device, dtype=G.dtype) / math.sqrt(d))
    beta = options["factor_beta"]
    weight = (1 - beta) / beta * norm(G).square()
    if options["integrator"] == "diagonal" and "L" in state and "R" in state:
        set_rho(state, weight / (n * math.sqrt(m)), 0)
        set_rho(state, weight / (m * math.sqrt(n)), 1)
    else:
        set_rho(state, weight / math.sqrt(m * n))


def signed_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """QR with a diagonal of R that is not negative."""
    Q, R = torch.linalg.qr(x)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)
    return Q * signs[..., None, :], R * signs[..., None]


def initialize_(
    grads: Sequence[Tensor],
    states: Sequence[State],
    offsets: Sequence[tuple[int, int, int]],
    options: StepOptions,
) -> None:
    """Factors and first bases; refresh dates are left to the caller."""
    for G, state in zip(grads, states, strict=True):
        set_prior_(G, state, options)
        factor_update_([G], [state], options)
        for name in ("L", "R"):
            if name in state:
                F = state[name]
                d, k = F.shape[-1], min(G.shape[-2:])
                vectors = torch.linalg.eigh(F).eigenvectors.flip(-1)[..., :k]
                units = torch.eye(d, d - k, device=F.device, dtype=F.dtype)
                units = units.expand(*F.shape[:-2], d, d - k)
                Q = vectors if k == d else signed_qr(torch.cat((vectors, units), -1))[0]
                state[f"Q_{name}"].copy_(Q)
                F.copy_(Q.mT @ F @ Q)


def refresh_basis_(states: Sequence[State], side: str, options: StepOptions) -> None:
    name = "L" if side == "left" else "R"
    for state in states:
        if name not in state:
            continue
        F, Q = state[name], state[f"Q_{name}"]
        order = F.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        P, S = signed_qr(F.take_along_dim(order[..., None, :], -1))
        Q.copy_(Q @ P)
        F.copy_(S @ P.take_along_dim(order[..., None], -2))
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.copy_(P.mT @ exp_avg if side == "left" else exp_avg @ P)
        axis = -2 if side == "left" else -1
        index = order[..., None] if side == "left" else order[..., None, :]
        beta1, beta2 = options["betas"]
        t = state["step"][..., None, None]
        q = beta1**2 / beta2
        C = (1 - beta1) ** 2 / (1 - beta2) * ((1 - q**t) / (1 - q) if q != 1 else t)
        least = exp_avg.square() / (C.clamp(max=1) if q >= 1 else C)
        exp_avg_sq.copy_(torch.maximum(exp_avg_sq.take_along_dim(index, axis), least))


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    streams: Sequence[int],
    options: StepOptions,
) -> None:
    """A whole step between two refreshes."""
    rotated = rotate(grads, states, True, options)
    updates = rotate(adam_update_(rotated, states, options), states, False, options)
    apply_update_(params, updates, states, streams, options)
    factor_update_(rotated, states, options)
