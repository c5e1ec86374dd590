"""Float64 references of the method: dense objects first, then matrix forms, then the optimizer.

Conventions. vec is row-major: vec(G)[i n + j] = G[i, j] for an m x n matrix G. With it
kron(L, R) vec(G) = vec(L G R^T). A pair of unit-norm factors and a scale stand for
rho^2 L (x) R. All tensors are float64; nothing is scaled, symmetrised or stabilised.

Equations (beta is the factor decay, A the Van Loan rearrangement of the target):
  (E1) rearrangement   A[(i, k), (j, l)] = F[(i, j), (k, l)]; of L (x) R: vec(L) vec(R)^T
  (E2) target          F = beta rho^2 L (x) R + (1 - beta) vec(G) vec(G)^T
  (E3) K-step          K = s U + dA V,              U' = K / ||K||,  s^ = ||K||
  (E4) S-step          s~ = s^ - U'^T dA V
  (E5) L-step          B = s~ V + dA^T U',          V' = B / ||B||,  s' = ||B||
  (E6) unconventional  U' from (E3); J = s V + dA^T U, V' = J / ||J||;
                       s' = (U'^T U) s (V^T V') + U'^T dA V'
  (E7) one-sided       K = A V with V = vec(I) / sqrt(n) held fixed, rho' = sqrt ||K||
  (E8) diagonal        L_tot' = beta L_tot + (1 - beta) A vec(I) / n, R alike, A of vec(G) vec(G)^T
  (E9) refresh         X = M Q Pi, Q' = QR(X) with a non-negative diagonal
  (E10) bound          exp_avg^2 <= C exp_avg_sq, C = (1 - beta1)^2 / (1 - beta2) sum_(k < t) q^k,
                       q = beta1^2 / beta2; where q >= 1 at most 1
"""

import math
from typing import Any

import torch
from optim_helpers import BOTH
from orthogonal_reference import noise_rms, orthogonalized
from torch import Tensor

# ---- Dense objects -------------------------------------------------------------------------------


def van_loan(F: Tensor, m: int, n: int) -> Tensor:
    """Rearrange an mn x mn matrix into m^2 x n^2, (E1)."""
    return F.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def van_loan_inverse(A: Tensor, m: int, n: int) -> Tensor:
    """Undo `van_loan`: m^2 x n^2 back into mn x mn."""
    return A.reshape(m, m, n, n).permute(0, 2, 1, 3).reshape(m * n, m * n)


def outer_fisher(G: Tensor) -> Tensor:
    """vec(G) vec(G)^T."""
    g = G.reshape(-1)
    return torch.outer(g, g)


def kronecker(L: Tensor, R: Tensor, rho: float) -> Tensor:
    """rho^2 L (x) R."""
    return rho**2 * torch.kron(L, R)


def fisher_target(beta: float, L: Tensor, R: Tensor, rho: float, G: Tensor) -> Tensor:
    """beta rho^2 L (x) R + (1 - beta) vec(G) vec(G)^T, dense, (E2)."""
    return beta * kronecker(L, R, rho) + (1 - beta) * outer_fisher(G)


def kronecker_error(F: Tensor, L: Tensor, R: Tensor, rho: float) -> float:
    """||F - rho^2 L (x) R||_F."""
    return float((F - kronecker(L, R, rho)).norm())


def best_kronecker(F: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, float]:
    """Nearest rho^2 L (x) R in the Frobenius norm: the top singular triple of (E1)."""
    U, S, Vh = torch.linalg.svd(van_loan(F, m, n), full_matrices=False)
    L, R = U[:, 0].reshape(m, m), Vh[0].reshape(n, n)
    sign = -1.0 if L.trace() < 0 else 1.0  # the factors of a PSD matrix are PSD
    return sign * L, sign * R, math.sqrt(float(S[0]))


def unit(X: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """X / ||X|| and ||X||; a zero X keeps the old factor."""
    norm = X.norm()
    return (X / norm if norm > 0 else old), norm


def lubich_oseledets(U: Tensor, s: Tensor, V: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One rank-one projector-splitting step of s U V^T along the increment dA, (E3)-(E5)."""
    U_new, s_hat = unit(s * U + dA @ V, U)  # K-step
    s_tilde = s_hat - U_new @ dA @ V  # S-step, backwards in time
    V_new, s_new = unit(s_tilde * V + dA.T @ U_new, V)  # L-step
    return U_new, s_new, V_new


def unconventional(U: Tensor, s: Tensor, V: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One rank-one basis-update-and-Galerkin step of s U V^T along dA, (E6)."""
    U_new, _ = unit(s * U + dA @ V, U)
    V_new, _ = unit(s * V + dA.T @ U, V)
    s_new = (U_new @ U) * s * (V @ V_new) + U_new @ dA @ V_new
    return U_new, s_new, V_new


def _dense(substeps, L, R, rho, G, beta):
    m, n = G.shape
    increment = (1 - beta) * (outer_fisher(G) - kronecker(L, R, rho))
    s = torch.tensor(rho**2, dtype=torch.float64)
    U, s, V = substeps(L.reshape(-1), s, R.reshape(-1), van_loan(increment, m, n))
    return U.reshape(m, m), V.reshape(n, n), math.sqrt(float(s))


def ksl_dense(L: Tensor, R: Tensor, rho: float, G: Tensor, beta: float):
    """The Lubich-Oseledets factor update on the rearranged dense matrix: (L, R, rho)."""
    return _dense(lubich_oseledets, L, R, rho, G, beta)


def bug_dense(L: Tensor, R: Tensor, rho: float, G: Tensor, beta: float):
    """The unconventional factor update on the rearranged dense matrix: (L, R, rho)."""
    return _dense(unconventional, L, R, rho, G, beta)


def one_sided_dense(M: Tensor, rho: float, G: Tensor, beta: float, side: int):
    """K-step alone with the other factor fixed at I / sqrt(dim), (E7): (M, rho)."""
    m, n = G.shape
    eye = torch.eye(G.shape[1 - side], dtype=torch.float64) / math.sqrt(G.shape[1 - side])
    L, R = (M, eye) if side == 0 else (eye, M)
    A = van_loan(fisher_target(beta, L, R, rho, G), m, n)
    K = A @ eye.reshape(-1) if side == 0 else A.T @ eye.reshape(-1)
    K, norm = unit(K.reshape(M.shape), M)
    return K, math.sqrt(float(norm))


def rayleigh(M: Tensor, Q: Tensor) -> Tensor:
    """diag(Q^T M Q)."""
    return (Q.T @ M @ Q).diagonal()


def diagonal_dense(L, R, rho, G, beta: float):
    """The averages (E8) by products with the rearranged dense vec(G) vec(G)^T.

    rho is the pair (rho_L, rho_R) of L_tot = rho_L^2 L and R_tot = rho_R^2 R; so is the last
    of the returned (L, R, rho).
    """
    m, n = G.shape
    eye_m, eye_n = (torch.eye(d, dtype=torch.float64).reshape(-1) for d in (m, n))
    A = van_loan(outer_fisher(G), m, n)
    L_total = beta * rho[0] ** 2 * L + (1 - beta) * (A @ eye_n).reshape(m, m) / n
    R_total = beta * rho[1] ** 2 * R + (1 - beta) * (A.T @ eye_m).reshape(n, n) / m
    L, norm_L = unit(L_total, L)
    R, norm_R = unit(R_total, R)
    return L, R, (math.sqrt(float(norm_L)), math.sqrt(float(norm_R)))


# ---- The same in matrix form, for shapes whose mn x mn matrix is too large -----------------------


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y>_F."""
    return (X * Y).sum()


def ksl_matrix(L: Tensor, R: Tensor, rho: float, G: Tensor, beta: float):
    """(E3)-(E5) with A vec(R) = beta rho^2 <R, R> L + (1 - beta) G R G^T, and A^T vec(L) alike.

    With a unit-norm R the S-step is s~ = rho^2 <U, L>, and its sum with the decay part of
    the increment in the L-step is beta rho^2 <U, L> R.
    """
    U, _ = unit(beta * rho**2 * L + (1 - beta) * G @ R @ G.T, L)
    V, s = unit(beta * rho**2 * inner(U, L) * R + (1 - beta) * G.T @ U @ G, R)
    return U, V, math.sqrt(float(s))


def bug_matrix(L: Tensor, R: Tensor, rho: float, G: Tensor, beta: float):
    """(E6); with the target A of (E2), s' = <U', A V'>."""
    U, _ = unit(beta * rho**2 * L + (1 - beta) * G @ R @ G.T, L)
    V, _ = unit(beta * rho**2 * R + (1 - beta) * G.T @ L @ G, R)
    s = beta * rho**2 * inner(U, L) * inner(R, V) + (1 - beta) * inner(U, G @ V @ G.T)
    return U, V, math.sqrt(float(s))


def one_sided_matrix(M: Tensor, rho: float, G: Tensor, beta: float, side: int):
    """(E7): K = beta rho^2 M + (1 - beta) G G^T / sqrt(n), or G^T G / sqrt(m)."""
    gram = G @ G.T if side == 0 else G.T @ G
    K = beta * rho**2 * M + (1 - beta) * gram / math.sqrt(G.shape[1 - side])
    K, norm = unit(K, M)
    return K, math.sqrt(float(norm))


def diagonal_matrix(L, R, rho, G, beta: float):
    """(E8) with one Gram matrix per side."""
    m, n = G.shape
    L, norm_L = unit(beta * rho[0] ** 2 * L + (1 - beta) * G @ G.T / n, L)
    R, norm_R = unit(beta * rho[1] ** 2 * R + (1 - beta) * G.T @ G / m, R)
    return L, R, (math.sqrt(float(norm_L)), math.sqrt(float(norm_R)))


# ---- Bases and schedule --------------------------------------------------------------------------


def positive_qr(X: Tensor) -> Tensor:
    """The Q of X = Q T with diag(T) >= 0."""
    Q, T = torch.linalg.qr(X)
    return Q * torch.where(T.diagonal() < 0, -1.0, 1.0)


def first_basis(M: Tensor, k: int) -> Tensor:
    """QR([v_1 .. v_k | e_i ..]), eigenvectors of the k largest eigenvalues, descending; first those
    units e_i on whose coordinate no v has a part, then the others."""
    d = M.shape[0]
    v = torch.linalg.eigh(M).eigenvectors.flip(1)[:, :k]
    has_part = v.abs().amax(1) > 1e-9
    order = torch.argsort(has_part.int(), stable=True)[: d - k]
    return positive_qr(torch.cat([v, torch.eye(d).to(M)[:, order]], dim=1))


def momentum_bound(betas: tuple[float, float], t: int) -> float:
    """C of (E10)."""
    q = betas[0] ** 2 / betas[1]
    C = (1 - betas[0]) ** 2 / (1 - betas[1]) * sum(q**k for k in range(t))
    return min(C, 1.0) if q >= 1 else C


def refresh_interval(t: int, precondition_frequency: int, schedule: str) -> int:
    """Steps from a refresh at step t to the next one, at most."""
    if schedule == "fixed":
        return precondition_frequency
    return min(precondition_frequency, max(1, t // 10))


def next_refresh(t: int, precondition_frequency: int, schedule: str, offset: int | None) -> int:
    """The largest u in (t, t + interval], u = offset mod interval.

    For "fixed", or without an offset, t + interval.
    """
    interval = refresh_interval(t, precondition_frequency, schedule)
    if schedule == "fixed" or offset is None:
        return t + interval
    return max(u for u in range(t + 1, t + interval + 1) if u % interval == offset % interval)


# ---- The optimizer -------------------------------------------------------------------------------


class ReferenceDyKAF:
    """DyKAF for one m x n matrix in textbook form, float64.

    L, R and exp_avg live in the original coordinates (exp_avg is projected at every step),
    exp_avg_sq in the rotated basis. Options are those of dykaf.DyKAF, and `stagger_offsets`, one
    offset per side, or None, for the places in the period of the geometric schedule. `dense` runs
    the factor update on the mn x mn matrix.

    Attributes: W, t, L, R, rho [rho_L, rho_R], Q_L, Q_R (None for a side that is not kept),
    exp_avg, exp_avg_sq or exp_avg_sq_row/_col/_scale, next_refresh, refreshes, update_rms;
    exp_avg_rotated, L_rotated and R_rotated are computed on demand.
    """

    def __init__(
        self,
        W: Tensor,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = 0.9,
        precondition_frequency: int = 50,
        max_precond_dim: int = 10000,
        sides: str = "one",
        integrator: str = "diagonal",
        init: str = "identity",
        second_moment: str = "full",
        nesterov: bool = True,
        orthogonalize: int = 3,
        refresh_schedule: str = "geometric",
        rescale_exp_avg_sq: bool = True,
        stagger_offsets: tuple[int, int] | None = None,
        maximize: bool = False,
        dense: bool = False,
    ) -> None:
        self.W = W.detach().double().clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.factor_beta = betas[1] if factor_beta is None else factor_beta
        self.precondition_frequency = precondition_frequency
        self.integrator, self.init = integrator, init
        self.refresh_schedule, self.rescale_exp_avg_sq = refresh_schedule, rescale_exp_avg_sq
        self.stagger_offsets, self.maximize, self.dense = stagger_offsets, maximize, dense
        self.nesterov, self.orthogonalize = nesterov, orthogonalize
        m, n = self.W.shape
        self.kept = [side for side, d in enumerate((m, n)) if d <= max_precond_dim]
        self.is_matrix = bool(self.kept)  # or else AdamW's
        if sides == "one" and len(self.kept) == 2:
            self.kept = [0 if m <= n else 1]
        if sides == "none":
            self.kept = []
        self.second_moment = second_moment if self.is_matrix else "full"
        self.started = not self.kept  # what has no factors steps from its first gradient on
        self.t = 0
        self.factors: list[Tensor | None] = [None, None]
        self.bases: list[Tensor | None] = [None, None]
        self.rho = [0.0, 0.0]
        self.next_refresh, self.refreshes = [0, 0], [0, 0]
        self.update_rms = 0.0
        self.exp_avg = torch.zeros_like(self.W)
        self.exp_avg_sq = torch.zeros_like(self.W)
        start = 0.0 if second_moment == "factored" else 1.0  # rank_one starts at unit norm
        self.exp_avg_sq_row = start * torch.ones(m).double() / math.sqrt(m)
        self.exp_avg_sq_col = start * torch.ones(n).double() / math.sqrt(n)
        self.exp_avg_sq_scale = 0.0

    @property
    def L(self) -> Tensor | None:
        return self.factors[0]

    @property
    def R(self) -> Tensor | None:
        return self.factors[1]

    @property
    def Q_L(self) -> Tensor | None:
        return self.bases[0]

    @property
    def Q_R(self) -> Tensor | None:
        return self.bases[1]

    @property
    def exp_avg_rotated(self) -> Tensor:
        return self._rotate(self.exp_avg)

    @property
    def L_rotated(self) -> Tensor | None:
        return None if self.Q_L is None else self.Q_L.T @ self.L @ self.Q_L

    @property
    def R_rotated(self) -> Tensor | None:
        return None if self.Q_R is None else self.Q_R.T @ self.R @ self.Q_R

    def step(self, G: Tensor) -> None:
        """Update W with the raw gradient G."""
        G = -G.double() if self.maximize else G.double()
        if not self.started:
            if bool((G != 0).any()):
                self._first_gradient(G)
            return
        self.t += 1
        beta1, beta2 = self.betas
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * G
        momentum = self.exp_avg / (1 - beta1**self.t)
        if self.nesterov and self.is_matrix:
            momentum = beta1 * momentum + (1 - beta1) * G
        D = self._rotate(momentum)
        if self.second_moment != "none":
            root = self._update_second_moment(self._rotate(G)) / math.sqrt(1 - beta2**self.t)
            D = D / (root + self.eps)
        if self.second_moment in (
            "rank_one",
            "factored",
        ):  # which row and column means do not bound
            C = momentum_bound(self.betas, self.t)
            bound = math.sqrt(C * (1 - beta2**self.t)) / (1 - beta1**self.t)
            if self.nesterov:
                bound = beta1 * bound + (1 - beta1) * math.sqrt((1 - beta2**self.t) / (1 - beta2))
            D = D.clamp(-bound, bound)
        update = self._rotate_back(D)
        if self.orthogonalize and self.is_matrix:
            least_rms = noise_rms(beta1, self.nesterov) if self.second_moment != "none" else 0.0
            update = orthogonalized(update, self.orthogonalize, least_rms)
        self.update_rms = float(update.square().mean().sqrt())
        self.W = self.W * (1 - self.lr * self.weight_decay) - self.lr * update
        if self.kept:
            self._update_factors(G)
        for side in self.kept:
            if self.t >= self.next_refresh[side]:
                self._refresh(side)
                self._schedule(side)

    def _first_gradient(self, G: Tensor) -> None:
        """Prior, factor update with this same G, first bases; no step, no moments."""
        k = min(G.shape)
        self._identity_prior(G)
        if self.init == "rank_one" and len(self.kept) == 2:
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
            self.factors = [torch.outer(U[:, 0], U[:, 0]), torch.outer(Vh[0], Vh[0])]
            self.rho = [float(S[0])] * 2
            if self.integrator == "diagonal":  # of G G^T / n and G^T G / m
                self.rho = [float(S[0]) / math.sqrt(d) for d in reversed(G.shape)]
            # The splitting integrators keep the first factors at rank one; "diagonal" does not.
            k = 1 if self.integrator != "diagonal" else k
        for side in self.kept:  # the diagonal integrator reads the factors in a basis: none yet
            self.bases[side] = torch.eye(G.shape[side], dtype=torch.float64)
        self._update_factors(G)
        for side in self.kept:
            self.bases[side] = first_basis(self.factors[side], k)
            self._schedule(side)
        self.started = True

    def _identity_prior(self, G: Tensor) -> None:
        """L = I / sqrt(m), R = I / sqrt(n); rho^2 L (x) R = (1 - beta)/beta mean(G^2) I."""
        m, n = G.shape
        for side in self.kept:
            d = G.shape[side]
            self.factors[side] = torch.eye(d, dtype=torch.float64) / math.sqrt(d)
        beta = self.factor_beta
        weighted_square = (1 - beta) / beta * float(G.square().sum())
        if self.integrator == "diagonal" and len(self.kept) == 2:
            # L_total = (1 - beta)/beta mean(G^2) I, and R_total likewise.
            self.rho = [
                math.sqrt(weighted_square / (n * math.sqrt(m))),
                math.sqrt(weighted_square / (m * math.sqrt(n))),
            ]
        else:
            self.rho = [math.sqrt(weighted_square / math.sqrt(m * n))] * 2

    def _update_factors(self, G: Tensor) -> None:
        beta = self.factor_beta
        if min(self.rho) == 0:  # underflow after a long run of zero gradients
            if not bool((G != 0).any()):
                return
            self._identity_prior(G)
        if len(self.kept) == 1:
            side = self.kept[0]
            one_sided = one_sided_dense if self.dense else one_sided_matrix
            factor, rho = one_sided(self.factors[side], self.rho[0], G, beta, side)
            self.factors[side] = factor
            self.rho = [rho, rho]
        elif self.integrator == "diagonal":
            diagonal = diagonal_dense if self.dense else diagonal_matrix
            L, R, rho = diagonal(self.L, self.R, self.rho, G, beta)
            self.factors, self.rho = [L, R], list(rho)
        else:
            forms = {"ksl": (ksl_matrix, ksl_dense), "bug": (bug_matrix, bug_dense)}
            integrator = forms[self.integrator][self.dense]
            L, R, rho = integrator(self.L, self.R, self.rho[0], G, beta)
            self.factors, self.rho = [L, R], [rho, rho]

    def _update_second_moment(self, G: Tensor) -> Tensor:
        """Average the square of the rotated gradient; return sqrt(V), before bias correction."""
        beta2 = self.betas[1]
        square = G.square()
        if self.second_moment == "full":
            self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * square
            return self.exp_avg_sq.sqrt()
        row, col = self.exp_avg_sq_row, self.exp_avg_sq_col
        if self.second_moment == "factored":
            self.exp_avg_sq_row = row = beta2 * row + (1 - beta2) * square.mean(1)
            self.exp_avg_sq_col = col = beta2 * col + (1 - beta2) * square.mean(0)
            mean = row.mean()
            return torch.zeros_like(G) if mean == 0 else (torch.outer(row, col) / mean).sqrt()
        # rank_one: (E3)-(E5) for V = sigma^2 l r^T with the target beta2 V + (1 - beta2) G.G
        decayed = beta2 * self.exp_avg_sq_scale**2
        u, _ = unit(decayed * row + (1 - beta2) * square @ col, row)
        v, s = unit(decayed * (u @ row) * col + (1 - beta2) * square.T @ u, col)
        self.exp_avg_sq_row, self.exp_avg_sq_col = u, v
        self.exp_avg_sq_scale = math.sqrt(float(s))
        return self.exp_avg_sq_scale * torch.outer(u.sqrt(), v.sqrt())

    def _refresh(self, side: int) -> None:
        """One power iteration with the columns sorted by their Rayleigh quotients, (E9)."""
        M, Q = self.factors[side], self.bases[side]
        before = rayleigh(M, Q)
        order = torch.argsort(before, descending=True, stable=True)
        Q_new = positive_qr(M @ Q[:, order])
        factor = torch.ones_like(before)
        if self.rescale_exp_avg_sq:
            ratio = (rayleigh(M, Q_new) / before[order]).clamp(0.1, 10.0)
            factor = torch.where(before[order] == 0, 1.0, ratio)
        self.bases[side] = Q_new
        self.refreshes[side] += 1
        if self.second_moment == "full":
            shape = (-1, 1) if side == 0 else (1, -1)
            moved = self.exp_avg_sq.index_select(side, order) * factor.reshape(shape)
            C = momentum_bound(self.betas, self.t)
            self.exp_avg_sq = torch.maximum(moved, self.exp_avg_rotated.square() / C)
            return
        name = ("exp_avg_sq_row", "exp_avg_sq_col")[side]
        vector = getattr(self, name)[order] * factor
        if self.second_moment == "rank_one":
            vector, norm = unit(vector, vector)
            self.exp_avg_sq_scale *= math.sqrt(float(norm))
        else:  # row_i col_j / mean(row) grows by `factor` on this side if both means grow alike
            other = ("exp_avg_sq_col", "exp_avg_sq_row")[side]
            mean = float(getattr(self, name).mean())
            if mean > 0:
                setattr(self, other, getattr(self, other) * (float(vector.mean()) / mean))
        setattr(self, name, vector)

    def _schedule(self, side: int) -> None:
        offset = None if self.stagger_offsets is None else self.stagger_offsets[side]
        self.next_refresh[side] = next_refresh(
            self.t, self.precondition_frequency, self.refresh_schedule, offset
        )

    def _rotate(self, X: Tensor) -> Tensor:
        X = X if self.Q_L is None else self.Q_L.T @ X
        return X if self.Q_R is None else X @ self.Q_R

    def _rotate_back(self, X: Tensor) -> Tensor:
        X = X if self.Q_L is None else self.Q_L @ X
        return X if self.Q_R is None else X @ self.Q_R.T


def two_sided_reference(W: Tensor, **options: Any) -> ReferenceDyKAF:
    """One that keeps both sides, with Adam's own update."""
    return ReferenceDyKAF(W, **{**BOTH, **options})
