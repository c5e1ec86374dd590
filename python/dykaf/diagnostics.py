"""What a parameter's state tells of its factors and bases, at O(n^2) per side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dykaf import ops
from dykaf.checks import param_name
from dykaf.narrow import widened
from dykaf.state import State, bytes_by_kind, host_entries_, matrices


def condition(factor: Tensor) -> float:
    """Largest over smallest diagonal entry: the condition number in so far as the basis is right.

    Args:
        factor: rotated L or R, [n, n].
    """
    diagonal = factor.diagonal()
    smallest = float(diagonal.min())
    return float(diagonal.max()) / smallest if smallest > 0 else float("inf")


def staleness(factor: Tensor) -> float:
    """The share of the off-diagonal entries in the squared norm: 0 in the factor's eigenbasis.

    Args:
        factor: rotated L or R, [n, n].
    """
    off_diagonal = factor - torch.diag(factor.diagonal())
    total = float(factor.double().square().sum())
    return float(off_diagonal.double().square().sum()) / total if total > 0 else 0.0


def orthogonality_error(basis: Tensor) -> float:
    """``||Q^T Q x - x|| / ||x||`` for one fixed x without structure.

    Args:
        basis: Q, [n, n].
    """
    x = _probe(basis)
    return float((basis.T @ (basis @ x) - x).norm() / x.norm())


def _probe(basis: Tensor) -> Tensor:
    places = torch.arange(basis.shape[0], dtype=torch.float64, device=basis.device)
    return torch.sin(1 + places).to(basis.dtype)


def _matrix_diagnostics(state: State) -> dict[str, float]:
    report = {
        "rho": float(state["rho"].prod().sqrt()),
        "refreshes": float(state["refreshes"].sum()),
        "refresh_fallbacks": float(state["refresh_fallbacks"]),
    }
    for side in ("L", "R"):
        if side in state:
            report[f"condition_{side}"] = condition(state[side])
            report[f"staleness_{side}"] = staleness(state[side])
            report[f"orthogonality_{side}"] = orthogonality_error(state[f"Q_{side}"])
    return report


def parameter_diagnostics(state: State) -> dict[str, float]:
    """The entries that :meth:`dykaf.DyKAF.diagnostics` documents; of a stack the largest of each.

    Matrices that have seen no gradient yet have no factors and count for nothing.

    Args:
        state: the state of one parameter.
    """
    report = {
        "step": float(state["step"].max()),
        "update_rms": float(state["update_rms"].max()),
    }
    if "rho" not in state:
        return report
    # autocast would round the products.
    with torch.autocast(state["rho"].device.type, enabled=False):
        for matrix in matrices(widened(state)):
            if not float(matrix["rho"][0]) > 0:
                continue
            for key, value in _matrix_diagnostics(matrix).items():
                report[key] = max(value, report.get(key, value))
    return report


class Reported(Optimizer):
    """The part of :class:`dykaf.DyKAF` that tells how it fares."""

    skipped_steps: int

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """How each parameter with state fares, by name; a stack of matrices gives its worst.

        Returns:
            per parameter ``backend`` (what serves it, see :func:`dykaf.ops.backend_of`), ``step``
            and ``update_rms`` (of the last update, before lr), and with factors ``rho`` (the factor
            scale, in gradient units), ``condition_L``, ``condition_R`` (largest over smallest
            diagonal entry in the basis), ``staleness_L``, ``staleness_R`` (the off-diagonal share
            of the squared norm), ``orthogonality_L``, ``orthogonality_R`` (``||Q^T Q x - x|| /
            ||x||`` for a fixed x), ``refreshes`` and ``refresh_fallbacks``. Of a side kept at
            ``skinny_rank`` nothing is told, and of sharded parameters this process knows its own.
            The entry "optimizer" holds ``skipped_steps``.
        """
        report: dict[str, dict[str, Any]] = {"optimizer": {"skipped_steps": self.skipped_steps}}
        for group_idx, group in enumerate(self.param_groups):
            for idx, param in enumerate(group["params"]):
                state = self.state.get(param)
                if state and state["step"].numel() > 0:  # else another rank has it
                    name = param_name(group, group_idx, idx)
                    backend = ops.backend_of(state["exp_avg"])
                    if backend == "cuda" and "exponent" in group and "rho" in state:
                        backend = "aten"  # the kernels have Adam's updates alone
                    report[name] = {
                        "backend": backend,
                        **parameter_diagnostics(host_entries_(state)),
                    }
        return report

    def state_bytes(self) -> dict[str, int]:
        """Bytes of state of this process by kind.

        Returns:
            exp_avg, exp_avg_sq, factors, bases, master, scalars, total.
        """
        return bytes_by_kind(self.state.values())
