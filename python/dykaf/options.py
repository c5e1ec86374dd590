"""The options of a parameter group: defaults, checks and their form for the backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

import torch

from dykaf import _C


class WhiteningOptions(TypedDict, total=False):
    """What the operations read of a group of :class:`dykaf.FISMO` alone."""

    exponent: float
    damping: float
    roots: str
    momentum: str
    graft: bool


class StepOptions(WhiteningOptions):
    """What the operations read of a parameter group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    factor_beta: float
    grad_scale: float
    precondition_frequency: int
    seed: int
    integrator: str
    init: str
    second_moment: str
    refresh_schedule: str
    rescale_exp_avg_sq: bool
    matmul_precision: str | None
    state_dtype: str
    nesterov: bool
    orthogonalize: int


@dataclass(frozen=True)
class _Rule:
    accepts: Callable[[Any], bool]
    expected: str
    plain: Callable[[Any], Any]  # what is accepted, as a value of Python's own


def _is_numpy(value: object, name: str) -> bool:
    numpy = sys.modules.get("numpy")  # torch works without it
    return numpy is not None and isinstance(value, getattr(numpy, name))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(accepts: Callable[[float], bool], expected: str) -> _Rule:
    # Comparisons with NaN are false, so NaN is refused everywhere.
    return _Rule(lambda value: _is_number(value) and bool(accepts(value)), expected, float)


def _integer(accepts: Callable[[int], bool], expected: str) -> _Rule:
    return _Rule(
        lambda value: (
            isinstance(value, Integral) and not isinstance(value, bool) and accepts(int(value))
        ),
        expected,
        int,
    )


def _optional(rule: _Rule) -> _Rule:
    return _Rule(
        lambda value: value is None or rule.accepts(value),
        f"None or {rule.expected}",
        lambda value: None if value is None else rule.plain(value),
    )


def _one_of(*names: str | None) -> _Rule:
    expected = "one of " + ", ".join(repr(name) for name in names)
    return _Rule(
        lambda value: (value is None or isinstance(value, str)) and value in names,
        expected,
        lambda value: None if value is None else str(value),
    )


def _is_lr(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return False
        if _C.backend_of(value, "lr") != "cpu":
            return True  # its value is the device's to read
        value = value.item()
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]  # a number


def _is_betas(value: Any) -> bool:
    is_array = _is_numpy(value, "ndarray") and value.ndim == 1
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    return (
        (is_array or is_sequence)
        and len(value) == 2
        and all(_is_number(beta) and 0 <= beta < 1 for beta in value)
    )


_FLAG = _Rule(
    lambda value: isinstance(value, bool) or _is_numpy(value, "bool_"), "True or False", bool
)

_SHARED: dict[str, _Rule] = {
    "lr": _Rule(
        _is_lr,
        "a finite number or one-element tensor >= 0",
        lambda value: value if isinstance(value, torch.Tensor) else float(value),
    ),
    "betas": _Rule(
        _is_betas, "two numbers in [0, 1)", lambda value: (float(value[0]), float(value[1]))
    ),
    "eps": _number(lambda value: 0 <= value < math.inf, "a finite number >= 0"),
    "weight_decay": _number(lambda value: 0 <= value < math.inf, "a finite number >= 0"),
    "factor_beta": _optional(_number(lambda value: 0 <= value < 1, "a number in [0, 1)")),
    "precondition_frequency": _integer(
        lambda value: 1 <= value < 2**62, "an integer in [1, 2**62)"
    ),
    "max_precond_dim": _integer(lambda value: value >= 0, "an integer >= 0"),
    "refresh_schedule": _one_of("geometric", "fixed"),
    "nesterov": _FLAG,
    "matmul_precision": _one_of(None, "highest", "high", "medium"),
    "batch_dims": _optional(_integer(lambda value: value >= 0, "an integer >= 0")),
    "state_dtype": _one_of("float32", "bfloat16"),
    "low_precision": _one_of("stochastic", "master"),
    "seed": _integer(lambda value: 0 <= value < 2**64, "an integer in [0, 2**64)"),
    "maximize": _FLAG,
    "nonfinite": _one_of("skip", "raise", "propagate"),
}

DYKAF_RULES: dict[str, _Rule] = {
    **_SHARED,
    "sides": _one_of("one", "both", "none"),
    "skinny_rank": _integer(lambda value: 0 <= value < 2**30, "an integer in [0, 2**30)"),
    "integrator": _one_of("ksl", "bug", "diagonal"),
    "init": _one_of("identity", "rank_one"),
    "second_moment": _one_of("full", "rank_one", "factored", "none"),
    "orthogonalize": _integer(lambda value: 0 <= value <= 20, "an integer in [0, 20]"),
    "rescale_exp_avg_sq": _FLAG,
}

# The last ones are not for users to choose: they say what a state has.
FISMO_RULES: dict[str, _Rule] = {
    **_SHARED,
    "sides": _one_of("both", "one"),
    "integrator": _one_of("coupled", "diagonal"),
    "orthogonalize": _integer(lambda value: 1 <= value <= 20, "an integer in [1, 20]"),
    "exponent": _number(lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "damping": _number(lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "roots": _one_of("tracked", "exact"),
    "momentum": _one_of("whitened", "plain"),
    "graft": _FLAG,
    "skinny_rank": _integer(lambda value: value == 0, "0"),
    "init": _one_of("identity"),
    "second_moment": _one_of("none"),
    "rescale_exp_avg_sq": _Rule(lambda value: value is False, "False", bool),
}
FISMO_FIXED: dict[str, Any] = {
    "skinny_rank": 0,
    "init": "identity",
    "second_moment": "none",
    "rescale_exp_avg_sq": False,
}


def rules_of(group: Mapping[str, Any]) -> dict[str, _Rule]:
    """The rules of the optimizer that a parameter group belongs to."""
    return FISMO_RULES if "exponent" in group else DYKAF_RULES


def check_options(group: Mapping[str, Any]) -> None:
    """Checks every option of a parameter group.

    A negative lr passes: schedulers of torch may round one that ends at 0 to a little less.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    rules = rules_of(group)
    for name, rule in rules.items():
        if not rule.accepts(group[name]):
            raise ValueError(f"{name}: expected {rule.expected}, got {group[name]!r}")
    is_momentum = rules is DYKAF_RULES and group["second_moment"] == "none"
    if is_momentum and (group["sides"] != "none" or group["orthogonalize"] == 0):
        raise ValueError(
            "second_moment: expected 'none' with sides='none' and orthogonalize > 0 alone, got "
            f"it with sides={group['sides']!r}, orthogonalize={group['orthogonalize']}"
        )


def check_alike(group: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Checks that the group ``other`` belongs to the same optimizer as ``group``.

    Raises:
        ValueError: if only one of them has the options of FISMO.
    """
    if rules_of(group) is not rules_of(other):
        names = ["FISMO" if rules_of(g) is FISMO_RULES else "DyKAF" for g in (group, other)]
        raise ValueError(
            f"param_groups: expected the options of {names[0]}, got those of {names[1]}"
        )


def check_new_options(group: Mapping[str, Any]) -> None:
    """Checks every option of a group that is added.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    check_options(group)
    lr = group["lr"]
    is_readable = not isinstance(lr, torch.Tensor) or _C.backend_of(lr, "lr") == "cpu"
    if is_readable and float(lr) < 0:
        raise ValueError(f"lr: expected {_SHARED['lr'].expected}, got {lr!r}")


def with_rate(group: Mapping[str, Any], lr: Any) -> dict[str, Any]:
    """``group`` with the ``lr`` that its ``lr_ratio`` says, if it has one, of ``lr``.

    Raises:
        ValueError: for a ratio that is no finite number >= 0.
    """
    group = dict(group)
    ratio = group.pop("lr_ratio", 1.0)
    if not (_is_number(ratio) and 0 <= ratio < math.inf):
        raise ValueError(f"lr_ratio: expected a finite number >= 0, got {ratio!r}")
    if ratio != 1 and "lr" not in group:
        group["lr"] = lr * ratio
    return group


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``group`` as values of Python's own, but for a tensor lr.

    NumPy's do as well, but ``torch.load(weights_only=True)`` refuses them. What is not accepted is
    left out: it is for :func:`check_options` to name.
    """
    return {
        name: rule.plain(group[name])
        for name, rule in rules_of(group).items()
        if name in group and rule.accepts(group[name])
    }


def step_options(
    group: Mapping[str, Any], grad_scale: float = 1.0, lr: float | None = None
) -> StepOptions:
    """The options of ``group`` as the operations take them.

    Args:
        group: a checked parameter group.
        grad_scale: GradScaler's scale, by which the gradients are divided.
        lr: in place of the group's.
    """
    plain = {name: rule.plain(group[name]) for name, rule in rules_of(group).items()}
    factor_beta = plain["betas"][1] if plain["factor_beta"] is None else plain["factor_beta"]
    options: StepOptions = {
        "lr": float(plain["lr"]) if lr is None else lr,
        "betas": plain["betas"],
        "eps": plain["eps"],
        "weight_decay": plain["weight_decay"],
        "factor_beta": factor_beta,
        "grad_scale": (-1.0 if plain["maximize"] else 1.0) / grad_scale,
        "precondition_frequency": plain["precondition_frequency"],
        "seed": plain["seed"],
        "integrator": plain["integrator"],
        "init": plain["init"],
        "second_moment": plain["second_moment"],
        "refresh_schedule": plain["refresh_schedule"],
        "rescale_exp_avg_sq": plain["rescale_exp_avg_sq"],
        "matmul_precision": plain["matmul_precision"],
        "state_dtype": plain["state_dtype"],
        "nesterov": plain["nesterov"],
        "orthogonalize": plain["orthogonalize"],
    }
    if "exponent" in plain:
        options["exponent"] = plain["exponent"]
        options["damping"] = plain["damping"]
        options["roots"] = plain["roots"]
        options["momentum"] = plain["momentum"]
        options["graft"] = plain["graft"]
    return options
