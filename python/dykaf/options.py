"""The options of a parameter group: defaults, checks and their form for the backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

import torch

from dykaf import _C


class StepOptions(TypedDict):
    """What the operations read of a parameter group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    factor_beta: float
    metric_power: float
    grad_scale: float
    precondition_frequency: int
    factor_update_every: int
    seed: int
    integrator: str
    init: str
    second_moment: str
    refresh_schedule: str
    rescale_exp_avg_sq: bool
    refresh_stagger: bool
    matmul_precision: str | None


@dataclass(frozen=True)
class _Rule:
    accepts: Callable[[Any], bool]
    expected: str


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(accepts: Callable[[float], bool], expected: str) -> _Rule:
    # Comparisons with NaN are false, so NaN is refused everywhere.
    return _Rule(lambda value: _is_number(value) and accepts(value), expected)


def _integer(accepts: Callable[[int], bool], expected: str) -> _Rule:
    return _Rule(
        lambda value: (
            isinstance(value, int) and not isinstance(value, bool) and bool(accepts(value))
        ),
        expected,
    )


def _one_of(*names: str | None) -> _Rule:
    expected = "one of " + ", ".join(repr(name) for name in names)
    return _Rule(lambda value: any(value is name or value == name for name in names), expected)


def _is_lr(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return False
        if _C.backend_of(value, "lr") == "cuda":
            return True  # its value is the GPU's to read
        value = value.item()
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]  # a number


def _is_betas(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(_is_number(beta) and 0 <= beta < 1 for beta in value)
    )


_FLAG = _Rule(lambda value: isinstance(value, bool), "True or False")

RULES: dict[str, _Rule] = {
    "lr": _Rule(_is_lr, "a finite number or one-element tensor >= 0"),
    "betas": _Rule(_is_betas, "two numbers in [0, 1)"),
    "eps": _number(lambda value: 0 <= value < math.inf, "a finite number >= 0"),
    "weight_decay": _number(lambda value: 0 <= value < math.inf, "a finite number >= 0"),
    "factor_beta": _Rule(
        lambda value: value is None or (_is_number(value) and 0 <= value < 1),
        "None or a number in [0, 1)",
    ),
    "precondition_frequency": _integer(
        lambda value: 1 <= value < 2**62, "an integer in [1, 2**62)"
    ),
    "factor_update_every": _integer(lambda value: 1 <= value < 2**62, "an integer in [1, 2**62)"),
    "max_precond_dim": _integer(lambda value: value >= 0, "an integer >= 0"),
    "skinny_rank": _integer(lambda value: 0 <= value < 2**30, "an integer in [0, 2**30)"),
    "integrator": _one_of("ksl", "bug", "diagonal"),
    "metric_power": _number(lambda value: -1 <= value <= 1, "a number in [-1, 1]"),
    "init": _one_of("identity", "rank_one"),
    "second_moment": _one_of("full", "rank_one", "factored"),
    "refresh_schedule": _one_of("geometric", "fixed"),
    "rescale_exp_avg_sq": _FLAG,
    "refresh_stagger": _FLAG,
    "matmul_precision": _one_of(None, "highest", "high", "medium"),
    "batch_dims": _integer(lambda value: value >= 0, "an integer >= 0"),
    "state_dtype": _one_of("float32", "bfloat16"),
    "low_precision": _one_of("stochastic", "master"),
    "seed": _integer(lambda value: 0 <= value < 2**64, "an integer in [0, 2**64)"),
    "maximize": _FLAG,
    "nonfinite": _one_of("skip", "raise", "propagate"),
}


def check_options(group: Mapping[str, Any]) -> None:
    """Checks every option of a parameter group.

    A negative lr passes: schedulers of torch may round one that ends at 0 to a little less.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    for name, rule in RULES.items():
        if not rule.accepts(group[name]):
            raise ValueError(f"{name}: expected {rule.expected}, got {group[name]!r}")


def check_new_options(group: Mapping[str, Any]) -> None:
    """Checks every option of a group that is added.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    check_options(group)
    lr = group["lr"]
    is_readable = not isinstance(lr, torch.Tensor) or _C.backend_of(lr, "lr") != "cuda"
    if is_readable and float(lr) < 0:
        raise ValueError(f"lr: expected {RULES['lr'].expected}, got {lr!r}")


def step_options(
    group: Mapping[str, Any], grad_scale: float = 1.0, lr: float | None = None
) -> StepOptions:
    """The options of ``group`` as the operations take them.

    Args:
        group: a checked parameter group.
        grad_scale: GradScaler's scale, by which the gradients are divided.
        lr: in place of the group's.
    """
    factor_beta = group["betas"][1] if group["factor_beta"] is None else group["factor_beta"]
    return {
        "lr": float(group["lr"]) if lr is None else lr,
        "betas": (float(group["betas"][0]), float(group["betas"][1])),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "factor_beta": float(factor_beta) ** group["factor_update_every"],
        "metric_power": float(group["metric_power"]),
        "grad_scale": (-1.0 if group["maximize"] else 1.0) / grad_scale,
        "precondition_frequency": group["precondition_frequency"],
        "factor_update_every": group["factor_update_every"],
        "seed": group["seed"],
        "integrator": group["integrator"],
        "init": group["init"],
        "second_moment": group["second_moment"],
        "refresh_schedule": group["refresh_schedule"],
        "rescale_exp_avg_sq": group["rescale_exp_avg_sq"],
        "refresh_stagger": group["refresh_stagger"],
        "matmul_precision": group["matmul_precision"],
    }
