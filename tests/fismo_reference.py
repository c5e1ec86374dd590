"""Float64 reference of FISMO: dense factors in the original coordinates, roots by eigh.

For W (m x n) with gradient G, P and Q of traces m and n, p and q the mean eigenvalues of the
averages p P and q Q, e the exponent:

  (F1)  L = G Q^-1 G^T / n + mu p I;  S = gamma p P + (1 - gamma) L;  p = tr(S) / m, P = S / p
  (F2)  R = G^T P^-1 G / m + mu q I;  S = gamma q Q + (1 - gamma) R;  q = tr(S) / n, Q = S / q
  (F3)  M = beta M + (1 - beta) P^-e G Q^-e / sqrt(p)
  (F4)  N = beta M / (1 - beta^t) + (1 - beta) P^-e G Q^-e / sqrt(p) with Nesterov's momentum, else
        N = M
  (F5)  W = W (1 - lr decay) - lr s P^-e orthogonalised(N) Q^-e, s = 0.2 sqrt(max(m, n)), or with
        that norm restored

Without a P, q stands for p. Variants: momentum "plain" has G in (F3) and (F4) and the powers around
N in (F5); integrator "diagonal" has Q = I in (F1) and P = I in (F2); of one side alone the other is
I. A zero gradient changes p and q alone, by gamma. The first gradient sets P = Q = I and
p = q = (1 - gamma) / gamma mean(G^2), takes (F1) and (F2), and updates nothing.

With roots "tracked" a power of P is Q_L diag(Q_L^T P Q_L)^-e Q_L^T for a basis that reference.py's
(E9) refreshes.
"""

from __future__ import annotations

import math

import torch
from reference import first_basis, next_refresh, positive_qr, rayleigh
from torch import Tensor


def quintic(N: Tensor, steps: int) -> Tensor:
    """Newton-Schulz steps by singular values, from N over the root of ||N N^T||."""
    left, s, right = torch.linalg.svd(N, full_matrices=False)
    s = s / s.norm(4).clamp_min(1e-300)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (left * s) @ right


class ReferenceFISMO:
    """FISMO for one matrix; options are those of dykaf.FISMO, and offsets as in ReferenceDyKAF.

    Attributes: W, t, factors [P, Q] and means [p, q] (None for a side that is not kept), bases, M.
    """

    def __init__(
        self,
        W: Tensor,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = 0.95,
        damping: float = 0.1,
        exponent: float = 0.5,
        integrator: str = "coupled",
        momentum: str = "whitened",
        graft: bool = True,
        roots: str = "tracked",
        nesterov: bool = True,
        orthogonalize: int = 3,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        sides: str = "both",
        refresh_schedule: str = "geometric",
        stagger_offsets: tuple[int, int] | None = None,
        maximize: bool = False,
    ) -> None:
        self.W = W.detach().double().clone()
        self.lr, self.beta, self.weight_decay = lr, betas[0], weight_decay
        self.gamma = betas[1] if factor_beta is None else factor_beta
        self.damping, self.exponent = damping, exponent
        self.integrator, self.momentum, self.graft, self.roots = integrator, momentum, graft, roots
        self.nesterov, self.orthogonalize = nesterov, orthogonalize
        self.precondition_frequency, self.refresh_schedule = (
            precondition_frequency,
            refresh_schedule,
        )
        self.stagger_offsets, self.maximize = stagger_offsets, maximize
        m, n = self.W.shape
        self.kept = [side for side, d in enumerate((m, n)) if d <= max_precond_dim]
        if sides == "one" and len(self.kept) == 2:
            self.kept = [0 if m <= n else 1]
        self.started = False
        self.t = 0
        self.factors: list[Tensor | None] = [None, None]
        self.means = [0.0, 0.0]
        self.bases: list[Tensor | None] = [None, None]
        self.next_refresh = [0, 0]
        self.M = torch.zeros_like(self.W)
        self.update = torch.zeros_like(self.W)

    def step(self, G: Tensor) -> None:
        G = -G.double() if self.maximize else G.double()
        if not self.started:
            if bool((G != 0).any()):
                self._first_gradient(G)
            return
        self.t += 1
        self._update_factors(G)
        beta = self.beta
        g = (self._whitened(G) if self.momentum == "whitened" else G) / self._root_mean(G)
        self.M = beta * self.M + (1 - beta) * g
        N = beta * self.M / (1 - beta**self.t) + (1 - beta) * g if self.nesterov else self.M
        N = self._whitened(N) if self.momentum == "plain" else N
        X = 0.2 * math.sqrt(max(G.shape)) * quintic(N, self.orthogonalize)
        self.update = self._whitened(X)
        if self.graft:
            self.update = self.update * (X.norm() / self.update.norm().clamp_min(1e-300))
        self.W = self.W * (1 - self.lr * self.weight_decay) - self.lr * self.update
        for side in self.kept:
            if self.t >= self.next_refresh[side]:
                self._refresh(side)

    def power(self, side: int, exponent: float) -> Tensor:
        """P^-exponent or Q^-exponent; the identity of a side that is not kept."""
        F = self.factors[side]
        if F is None:
            return torch.eye(self.W.shape[side], dtype=torch.float64)
        basis = self.bases[side]
        if self.roots == "tracked" and basis is not None:
            return (basis * rayleigh(F, basis).pow(-exponent)) @ basis.T
        values, vectors = torch.linalg.eigh(F)
        return (vectors * values.pow(-exponent)) @ vectors.T

    def _root_mean(self, G: Tensor) -> float:
        """1 where it would divide a zero gradient by what has underflowed."""
        return math.sqrt(self.means[self.kept[0]]) if bool((G != 0).any()) else 1.0

    def _whitened(self, X: Tensor) -> Tensor:
        return self.power(0, self.exponent) @ X @ self.power(1, self.exponent)

    def _update_factors(self, G: Tensor) -> None:
        if not bool((G != 0).any()):
            self.means = [self.gamma * mean for mean in self.means]
            return
        if min(self.means[side] for side in self.kept) == 0:  # underflow after many zero gradients
            self._set_prior(G)
        for side in self.kept:
            X = G if side == 0 else G.T
            metric = torch.eye(X.shape[1], dtype=torch.float64)
            if self.integrator == "coupled":
                metric = self.power(1 - side, 1.0)
            F, mean, d = self.factors[side], self.means[side], X.shape[0]
            eye = torch.eye(d, dtype=torch.float64)
            increment = X @ metric @ X.T / X.shape[1] + self.damping * mean * eye
            S = self.gamma * mean * F + (1 - self.gamma) * increment
            self.means[side] = float(S.trace() / d)
            self.factors[side] = S / self.means[side]

    def _set_prior(self, G: Tensor) -> None:
        for side in self.kept:
            self.factors[side] = torch.eye(G.shape[side], dtype=torch.float64)
            self.means[side] = (1 - self.gamma) / self.gamma * float(G.square().mean())

    def _first_gradient(self, G: Tensor) -> None:
        self._set_prior(G)
        self._update_factors(G)
        for side in self.kept:
            self.bases[side] = first_basis(self.factors[side], min(G.shape))
            self._schedule(side)
        self.started = True

    def _refresh(self, side: int) -> None:
        F, basis = self.factors[side], self.bases[side]
        order = torch.argsort(rayleigh(F, basis), descending=True, stable=True)
        self.bases[side] = positive_qr(F @ basis[:, order])
        self._schedule(side)

    def _schedule(self, side: int) -> None:
        offset = None if self.stagger_offsets is None else self.stagger_offsets[side]
        self.next_refresh[side] = next_refresh(
            self.t, self.precondition_frequency, self.refresh_schedule, offset
        )
