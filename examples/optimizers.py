"""The optimizers that the example compares, made alike: one lr, the same weight decay.

For the matrix optimizers (dykaf, muon) embedding and output head are updated by AdamW, with dykaf
at twice the rate, as dykaf.param_groups has it; vectors never decay.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from settings import Settings, UserError
from torch import nn

ADAMW_BETAS = (0.9, 0.95)


class OptimizerLike(Protocol):
    """What the training loop asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class OptimizerPair:
    """Two optimizers over disjoint parameters, used as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)
        self.param_groups = [*first.param_groups, *second.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Optimizers replace their group dicts when they load.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """torch's fused AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=ADAMW_BETAS, fused=True)


def make_muon(model: nn.Module, settings: Settings) -> OptimizerPair:
    """torch's Muon for the hidden matrices, AdamW for the rest, at one lr."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9 or later, got {torch.__version__}")
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and not name.startswith(("embedding.", "head."))
        (hidden if is_hidden else rest).append(parameter)
    # match_rms_adamw brings Muon's updates to AdamW's size, so that one lr serves both.
    muon = torch.optim.Muon(
        hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return OptimizerPair(muon, make_adamw(rest, settings))


def make_dykaf(model: nn.Module, settings: Settings, process_group: Any = None) -> OptimizerLike:
    """DyKAF; dykaf.param_groups sends embedding, head and vectors to AdamW."""
    try:
        import dykaf  # only here: the other optimizers run without it
    except ImportError as error:
        raise UserError(f"--optimizer dykaf needs the package dykaf: {error}") from error
    return dykaf.DyKAF(
        dykaf.param_groups(model),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        precondition_frequency=settings.precondition_frequency,
        seed=settings.seed,
        process_group=process_group,
    )


def make_optimizer(
    name: str, model: nn.Module, settings: Settings, process_group: Any = None
) -> OptimizerLike:
    """Make an optimizer for all parameters of a model.

    Args:
        name: "dykaf", "adamw" or "muon".
        model: its embedding and output head are called `embedding` and `head`.
        settings: gives lr, weight decay and refresh period.
        process_group: over which DyKAF shares its work on parameters that all ranks have whole.

    Returns:
        The optimizer, without state.

    Raises:
        UserError: the name is unknown, dykaf cannot be imported, or torch has no Muon.
    """
    if name == "dykaf":
        return make_dykaf(model, settings, process_group)
    if name == "muon":
        return make_muon(model, settings)
    if name == "adamw":
        return make_adamw(list(model.parameters()), settings)
    raise UserError(f"unknown optimizer {name}")


def lr_factor(step: int, settings: Settings) -> float:
    """Linear warm-up to 1, then a cosine down to 0 after the last step; step counts from 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_versions() -> dict[str, str | None]:
    """Versions that decide what the optimizers compute."""
    torch_version = str(torch.__version__)  # a class of its own, which checkpoints refuse
    try:
        import dykaf
    except ImportError:
        return {"torch": torch_version, "dykaf": None}
    return {"torch": torch_version, "dykaf": str(getattr(dykaf, "__version__", "unknown"))}
