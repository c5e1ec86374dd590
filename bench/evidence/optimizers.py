"""Makes the optimizers that are compared, all alike: one weight decay, AdamW for the rest.

`hidden` weights go to the optimizer under test; the rest (embeddings, output heads, vectors) to the
same torch.optim.AdamW whatever the contender is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.evidence import EvidenceError
from bench.evidence.kronecker import KroneckerOptimizer
from bench.evidence.orthogonal import OrthogonalOptimizer

ADAMW_BETAS = (0.9, 0.95)  # of the contender AdamW
REST_BETAS = (0.9, 0.95)  # of the rest, for all contenders


class MatrixViews:
    """Lets an optimizer for matrices update weights of more dimensions, seen as first by rest."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.views = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]

    def take_gradients(self) -> None:
        for weight, view in zip(self.weights, self.views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)


class Parts:
    """Several optimizers over disjoint parameters, used as one; `scale_lr` is the schedule."""

    def __init__(
        self, optimizers: list[torch.optim.Optimizer], views: MatrixViews | None = None
    ) -> None:
        self.optimizers = optimizers
        self.views = views
        self.base = [(group, group["lr"]) for part in optimizers for group in part.param_groups]

    def scale_lr(self, factor: float) -> None:
        for group, lr in self.base:
            group["lr"] = lr * factor

    def step(self) -> None:
        if self.views is not None:
            self.views.take_gradients()
        for optimizer in self.optimizers:
            optimizer.step()


def make_adamw(
    parameters: list[nn.Parameter],
    lr: float,
    weight_decay: float,
    betas: tuple[float, ...] = ADAMW_BETAS,
) -> torch.optim.Optimizer:
    """torch's AdamW with weight decay on everything but vectors."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


# What a contender of kind dykaf does not name, whatever the package's defaults are.
DYKAF_BASE = {
    "betas": (0.95, 0.95),
    "sides": "both",
    "nesterov": False,
    "orthogonalize": 0,
    "factor_beta": None,
    "rescale_exp_avg_sq": False,
    "skinny_rank": 0,
}


def make_optimizer(
    options: dict[str, Any], model: nn.Module, hidden: list[str], lr: float, weight_decay: float
) -> Parts:
    """The optimizer of a contender.

    Args:
        options: `kind` ("adamw", "muon", "orthogonal", "kronecker", "dykaf", "fismo"), that
            optimizer's own options, and for the rest `rest_lr`, its peak learning rate, or
            `rest_ratio`, the same over lr (default: 1).
        model: its parameters that need a gradient are trained.
        hidden: names of the weights for the optimizer under test.
        lr: peak learning rate.
        weight_decay: decoupled.

    Raises:
        EvidenceError: there is no such kind, or dykaf cannot be imported.
    """
    options = dict(options)
    kind = options.pop("kind")
    rest_lr = options.pop("rest_lr", lr) * options.pop("rest_ratio", 1.0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = [named[name] for name in hidden]
    rest = [p for name, p in named.items() if name not in set(hidden)]
    others = [make_adamw(rest, rest_lr, weight_decay, REST_BETAS)] if rest else []
    if kind == "adamw":
        return Parts([make_adamw(weights, lr, weight_decay, **options), *others])
    if kind in ("dykaf", "fismo"):
        try:
            import dykaf  # only here: the other optimizers run without it
        except ImportError as error:
            raise EvidenceError(f"contenders of kind {kind} need the package: {error}") from error
        options = {**DYKAF_BASE, **options} if kind == "dykaf" else options
        matrix_class = dykaf.DyKAF if kind == "dykaf" else dykaf.FISMO
        return Parts([matrix_class(weights, lr=lr, weight_decay=weight_decay, **options), *others])
    views = MatrixViews(weights)
    if kind == "orthogonal":
        matrix = OrthogonalOptimizer(views.views, lr=lr, weight_decay=weight_decay, **options)
    elif kind == "kronecker":
        matrix = KroneckerOptimizer(views.views, lr=lr, weight_decay=weight_decay, **options)
    elif kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise EvidenceError(f"contenders of kind muon need torch 2.9, got {torch.__version__}")
        # match_rms_adamw brings Muon's updates to AdamW's size, so that one lr serves both.
        matrix = torch.optim.Muon(
            views.views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **options
        )
    else:
        expected = "adamw, muon, orthogonal, kronecker, dykaf or fismo"
        raise EvidenceError(f"contender kind: expected {expected}, got {kind}")
    return Parts([matrix, *others], views)
