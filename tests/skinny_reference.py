"""Skinny matrices in textbook form, float64: the long side's factor as a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import reference
import torch
from torch import Tensor


class ReferenceSkinny:
    """DyKAF of one s x l matrix whose l x l factor is cut back to a given rank at each refresh.

    L and R are the plain averages, not normalised. V has the basis of the long side as columns,
    `since` the gradients since its last refresh,
    as Q turned them. Attributes: W, L, R, Q, V, next_refresh.
    """

    def __init__(
        self,
        W: Tensor,
        rank: int,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        factor_beta: float = 0.9,
        precondition_frequency: int = 10,
        rescale_exp_avg_sq: bool = True,
        long_first: bool = False,
        nesterov: bool = False,
        stagger_offsets: tuple[int, int] | None = None,
    ) -> None:
        self.W, self.rank, self.lr, self.betas, self.eps = W.clone(), rank, lr, betas, eps
        self.weight_decay = weight_decay
        self.precondition_frequency = precondition_frequency
        self.decay = factor_beta
        self.rescale, self.nesterov = rescale_exp_avg_sq, nesterov
        self.long_first = long_first  # where both sides are refreshed: of an l x s parameter
        self.stagger_offsets = stagger_offsets  # of the short and the long side
        self.t = -1

    @classmethod
    def from_state(
        cls, W: Tensor, state: Mapping[str, Tensor], **options: float
    ) -> ReferenceSkinny:
        """The same at the state of an optimizer, the parameter's short side first, with no refresh
        in sight."""
        x = {key: value.detach().cpu().double() for key, value in state.items()}
        is_wide = W.shape[0] < W.shape[1]
        Q, F = (x["Q_L"], x["L"]) if is_wide else (x["Q_R"], x["R"])
        rho_short, rho_long = x["rho"] if is_wide else x["rho"].flip(0)
        inner, used = (int(count) for count in state["rows"])
        rank = x["exp_avg_sq"].shape[1] - 1
        ref = cls((W if is_wide else W.T).detach().cpu().double(), rank, **options)
        ref.t = int(x["step"])
        ref.Q, ref.L = Q, rho_short**2 * Q @ F @ Q.T
        basis, core = x["basis"][:used], x["core"][:used, :used]
        ref.R = rho_long**2 * (
            x["flat"] * torch.eye(basis.shape[1]).double() + basis.T @ core @ basis
        )
        ref.V, ref.since = basis[:inner].T, list(basis[inner:].split(len(Q)))
        ref.exp_avg = Q @ (x["exp_avg"] if is_wide else x["exp_avg"].T)
        ref.v, ref.v_rest = x["exp_avg_sq"][:, :inner], x["exp_avg_sq"][:, rank]
        ref.next_refresh = [math.inf, math.inf]
        return ref

    def step(self, G: Tensor) -> None:
        self.t += 1
        if self.t == 0:
            self._first_gradient(G)
            return
        beta1, beta2 = self.betas
        short, long = G.shape
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * G
        X = self.Q.T @ G
        inside = X @ self.V
        # The mean square along what is orthogonal to V, from the projection itself.
        rest = (X - inside @ self.V.T).square().sum(1) / (long - self.V.shape[1])
        self.v = beta2 * self.v + (1 - beta2) * inside.square()
        self.v_rest = beta2 * self.v_rest + (1 - beta2) * rest

        def preconditioned(M: Tensor, v: Tensor) -> Tensor:
            return M / ((v / (1 - beta2**self.t)).sqrt() + self.eps)

        momentum = self.exp_avg / (1 - beta1**self.t)
        if self.nesterov:
            momentum = beta1 * momentum + (1 - beta1) * G
        M = self.Q.T @ momentum
        M_rest = M - M @ self.V @ self.V.T
        C = reference.momentum_bound(self.betas, self.t)
        bound = math.sqrt(C * (1 - beta2**self.t)) / (1 - beta1**self.t)
        if self.nesterov:
            bound = beta1 * bound + (1 - beta1) * math.sqrt((1 - beta2**self.t) / (1 - beta2))
        D = preconditioned(M @ self.V, self.v).clamp(-bound, bound) @ self.V.T
        D = D + preconditioned(M_rest, self.v_rest[:, None])
        self.W = self.W * (1 - self.lr * self.weight_decay) - self.lr * self.Q @ D

        self.L = self.decay * self.L + (1 - self.decay) * G @ G.T / long
        self.R = self.decay * self.R + (1 - self.decay) * G.T @ G / short
        self.since.append(X)
        self._refresh(short, long)

    def _first_gradient(self, G: Tensor) -> None:
        short, long = G.shape
        prior = G.square().sum() / (short * long)
        gain = 1 - self.decay
        self.L = gain * (prior * torch.eye(short).double() + G @ G.T / long)
        self.R = gain * (prior * torch.eye(long).double() + G.T @ G / short)
        self.Q = torch.linalg.eigh(self.L).eigenvectors.flip(1)
        self.V = torch.linalg.eigh(self.R).eigenvectors.flip(1)[:, :short]
        self.since: list[Tensor] = []
        self.exp_avg = torch.zeros(short, long).double()
        self.v, self.v_rest = torch.zeros(short, short).double(), torch.zeros(short).double()
        self.next_refresh: list[float] = [self._after(side) for side in range(2)]

    def _refresh(self, short: int, long: int) -> None:
        is_full = self.V.shape[1] + (len(self.since) + 1) * short > 2 * self.rank
        for is_long in (self.long_first, not self.long_first):
            if self.t < self.next_refresh[is_long] and not (is_long and is_full):
                continue
            if is_long:
                self._refresh_long(long)
            else:
                self._refresh_short()
            self.next_refresh[is_long] = self._after(is_long)

    def _after(self, side: int) -> int:
        offset = None if self.stagger_offsets is None else self.stagger_offsets[side]
        return reference.next_refresh(self.t, self.precondition_frequency, "geometric", offset)

    def growth(self, old: Tensor, new: Tensor) -> Tensor:
        return (new / old).clamp(0.1, 10) if self.rescale else torch.ones_like(new)

    def _refresh_short(self) -> None:
        before = reference.rayleigh(self.L, self.Q)
        order = torch.argsort(before, descending=True, stable=True)
        self.Q = reference.positive_qr(self.L @ self.Q[:, order])
        growth = self.growth(before[order], reference.rayleigh(self.L, self.Q))
        self.v = self.v[order] * growth[:, None]
        self.v_rest = self.v_rest[order] * growth
        self._bound(self.exp_avg.shape[1])

    def _bound(self, long: int) -> None:
        """(E10), within V entry by entry and beyond it by the mean square."""
        C = reference.momentum_bound(self.betas, self.t)
        M = self.Q.T @ self.exp_avg
        inside = M @ self.V
        rest = (M - inside @ self.V.T).square().sum(1) / (long - self.V.shape[1])
        self.v = torch.maximum(self.v, inside.square() / C)
        self.v_rest = torch.maximum(self.v_rest, rest / C)

    def _refresh_long(self, long: int) -> None:
        """One power iteration within the span of V and the gradients since; the rest made flat."""
        num_old = self.V.shape[1]
        Z = reference.positive_qr(torch.cat([self.V, *(X.T for X in self.since)], dim=1))
        F = Z.T @ self.R @ Z
        old_mean = (self.R.trace() - F.diagonal()[:num_old].sum()) / (long - num_old)
        order = torch.argsort(F.diagonal(), descending=True, stable=True)
        P = reference.positive_qr(F[:, order])
        order = order[: min(self.rank, len(F))]
        kept = len(order)
        self.V = (Z @ P)[:, :kept]
        old = torch.where(order < num_old, F.diagonal()[order], old_mean)
        F = self.V.T @ self.R @ self.V
        mean = (self.R.trace() - F.trace()) / (long - kept)
        columns = torch.cat([self.v, self.v_rest[:, None].expand(-1, len(P) - num_old)], dim=1)
        self.v = columns[:, order] * self.growth(old, F.diagonal())
        self.v_rest = self.v_rest * self.growth(old_mean, mean)
        self._bound(long)
        flat = mean * torch.eye(kept).double()
        self.R = mean * torch.eye(long).double() + self.V @ (F - flat) @ self.V.T
        self.since = []
