"""DyKAF by its name in timm's factory of optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from dykaf.integrations import require
from dykaf.optimizer import DyKAF
from dykaf.param_groups import param_groups

require("timm")  # before the imports of it, which would not say what to install

import timm.optim  # noqa: E402
from timm.optim._optim_factory import default_registry  # noqa: E402


def _from_registry(params: Iterable[Any], **options: Any) -> DyKAF:
    optimizer = DyKAF(params, **options)
    if any("param_names" not in group for group in optimizer.param_groups):
        warnings.warn(
            "timm's own groups do not tell embeddings and heads from other matrices; "
            "dykaf.integrations.timm.create_optimizer_v2, or param_group_fn=dykaf.param_groups, "
            "makes groups that do",
            stacklevel=2,
        )
    return optimizer


default_registry.register(
    timm.optim.OptimInfo(
        name="dykaf",
        opt_class=_from_registry,
        description="Adam in the eigenbasis of a Kronecker-factored Fisher matrix",
        has_eps=True,
        has_betas=True,
    )
)


def model_groups(
    model: nn.Module,
    *,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
    **groups: Any,
) -> list[dict[str, Any]]:
    """``dykaf.param_groups`` of a model of timm, split by layers if wanted.

    Args:
        model: one of timm's.
        layer_decay: each group is split by layers, and has the entry ``lr_scale`` that timm's
            schedulers read: ``layer_decay`` to the power of the layers above; None: no split.
        layer_decay_min_scale: the least of them.
        layer_decay_no_opt_scale: layers under this are frozen.
        groups: arguments of :func:`dykaf.param_groups`.
    """
    scales = {}
    if layer_decay is not None:
        layers = timm.optim.param_groups_layer_decay(
            model,
            layer_decay=layer_decay,
            min_scale=layer_decay_min_scale,
            no_opt_scale=layer_decay_no_opt_scale,
        )
        scales = {param: layer["lr_scale"] for layer in layers for param in layer["params"]}
    split = []
    for group in param_groups(model, **groups):
        by_scale: dict[float | None, list[tuple[str, nn.Parameter]]] = {}
        for name, param in group["params"]:
            by_scale.setdefault(scales.get(param), []).append((name, param))
        for scale, params in by_scale.items():
            lr_scale = {} if scale is None else {"lr_scale": scale}
            split.append({**group, "params": params, **lr_scale})
    return split


def create_optimizer_v2(
    model_or_params: Any,
    opt: str = "dykaf",
    lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """The function of this name in timm, where "dykaf" trains a model in :func:`model_groups`.

    Args:
        model_or_params: a model, or parameters or groups, which are taken as they are.
        opt: "dykaf", "lookahead_dykaf", or any name that timm knows.
        lr: learning rate; None: DyKAF's own.
        weight_decay: of all that takes any. As in timm, 0 unless said.
        layer_decay: as in :func:`model_groups`; so the next two.
        layer_decay_min_scale: see there.
        layer_decay_no_opt_scale: see there.
        kwargs: timm's other arguments, ``param_group_fn`` in place of :func:`model_groups` among
            them, and those of :class:`dykaf.DyKAF`.
    """
    layers: dict[str, Any] = {
        "layer_decay": layer_decay,
        "layer_decay_min_scale": layer_decay_min_scale,
        "layer_decay_no_opt_scale": layer_decay_no_opt_scale,
    }
    is_ours = opt.lower().rpartition("_")[2] == "dykaf"
    if is_ours and kwargs.get("param_group_fn") is None:
        kwargs["param_group_fn"] = partial(model_groups, **layers)
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        model_or_params, opt=opt, lr=lr, weight_decay=weight_decay, **layers, **kwargs
    )
    return optimizer
