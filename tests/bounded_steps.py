"""Steps of an optimizer whose updates are held against what bounds them.

For betas with beta1^2 < beta2 the entries of an update in the basis are at most `update_bound`, 1
for equal betas. Rotations keep lengths, so the root mean square of W_t - W_(t-1) of a matrix is at
most lr times that without weight decay, and an entry at most sqrt(d) times as large, d being the
product of the sides with a factor. Orthogonalised, the singular values of an update are bounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from optim_helpers import BOTH, params_of
from reference import momentum_bound
from tolerances import unit_roundoff
from torch import Tensor

from dykaf import DyKAF, preset
from dykaf.state import State, matrices

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "both_sides": BOTH,
    "rank_one_init": {**BOTH, "init": "rank_one"},
    "ksl": {**BOTH, "integrator": "ksl"},
    "bug": {**BOTH, "integrator": "bug"},
    "paper": preset("paper"),
    "rank_one": {**BOTH, "second_moment": "rank_one"},
    "factored": {**BOTH, "second_moment": "factored"},
    "bfloat16": {**BOTH, "state_dtype": "bfloat16"},
}


# The largest value of Newton-Schulz's quintic on [0, 1], and on what it maps that to.
QUINTIC = 1.2025


def update_bound(betas: tuple[float, float], t: int, nesterov: bool = False) -> float:
    """Of an entry of the update in the basis, after bias correction."""
    left = 1 - betas[1] ** t
    bound = math.sqrt(momentum_bound(betas, t) * left) / (1 - betas[0] ** t)
    if not nesterov:
        return bound
    return betas[0] * bound + (1 - betas[0]) * math.sqrt(left / (1 - betas[1]))


def departure(size: int, dtype: torch.dtype) -> float:
    """By how much a basis of this dtype may stretch a vector.

    Up to 32 refreshes lie between two corrections. Each adds a rounding of u sqrt(n) to every
    column, at random (tests/test_invariants.py), in bfloat16 one of 2^-9 of every entry; the norm
    of a matrix of random entries is at most twice the length of its columns.
    """
    column = 2.0**-9 if dtype == torch.bfloat16 else size**0.5 * unit_roundoff(dtype)
    return math.sqrt(32) * 2 * column


class BoundedSteps:
    """Of a DyKAF without weight decay."""

    def __init__(self, optimizer: DyKAF) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        params = params_of(self.optimizer)
        begins = [self._weights(param) for param in params]
        bases = [self._bases(param) for param in params]
        self.optimizer.step()
        self.steps += 1
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                begin, basis = begins.pop(0), bases.pop(0)
                state = self.optimizer.state[param]
                num, largest = state["step"].numel(), float(begin.abs().max())
                moves = (self._weights(param) - begin).view(
                    num, *state["exp_avg"].shape[state["step"].dim() :]
                )
                for idx, matrix in enumerate(matrices(state)):
                    self._check(group, moves[idx], matrix, basis[idx] if basis else {}, largest)

    def check_finite(self) -> None:
        for param in params_of(self.optimizer):
            for key, value in {"param": param, **self.optimizer.state[param]}.items():
                assert bool(value.isfinite().all()), key

    def _weights(self, param: Tensor) -> Tensor:
        """As exact as they are kept, float64, flat."""
        state = self.optimizer.state.get(param, {})
        return state.get("master", param).detach().cpu().double().reshape(-1).clone()

    def _bases(self, param: Tensor) -> list[State]:
        state = self.optimizer.state.get(param)
        bases = {
            key: value for key, value in (state or {}).items() if key in ("step", "Q_L", "Q_R")
        }
        return [
            {key: value.cpu().double().clone() for key, value in matrix.items() if key != "step"}
            for matrix in (matrices(bases) if state else ())
        ]

    def _check(
        self, group: dict[str, Any], move: Tensor, state: State, basis: State, largest: float
    ) -> None:
        t = int(state["step"])
        if t == 0:
            assert not move.any()
            return
        u = unit_roundoff(state["exp_avg"].dtype)
        factors = [state[key] for key in ("L", "R", "basis") if key in state]
        # The two rotations of an update round by gamma(m) and gamma(n), the two averages, whose
        # terms do not cancel where the bound is reached, by 4 u in each step.
        share = (4 * self.steps + 2 * sum(move.shape)) * u
        share += sum(departure(F.shape[-1], F.dtype) for F in factors)
        lr = float(group["lr"])
        if group["orthogonalize"] and "rho" in state and "basis" not in state:
            # Singular values of at most QUINTIC, times 0.2 sqrt(max(m, n)).
            spectral = lr * 0.2 * QUINTIC * math.sqrt(max(move.shape)) * (1 + share)
            rounding = 2 * u * largest * math.sqrt(move.numel())
            assert float(torch.linalg.matrix_norm(move, 2)) <= spectral + rounding
            return
        bound = lr * update_bound(group["betas"], t, group["nesterov"] and "rho" in state)
        # W - update rounds as well.
        limit = bound * (1 + share) + 2 * u * largest
        assert float(move.square().mean().sqrt()) <= limit
        turned = math.prod(F.shape[-1] for F in factors)
        assert float(move.abs().max()) <= math.sqrt(turned) * limit
        if "basis" in state or not basis:
            return  # of a skinny matrix only a part of the basis is kept
        if "Q_L" in basis:
            move = basis["Q_L"].T @ move
        if "Q_R" in basis:
            move = move @ basis["Q_R"]
        # Entry by entry; an error of the bases turns the whole update's length.
        slack = math.sqrt(move.numel()) * (limit - bound + share * bound)
        assert float(move.abs().max()) <= bound + slack
