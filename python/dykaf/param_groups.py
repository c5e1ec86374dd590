"""Sensible parameter groups for a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

# The last part of the name of a linear layer that maps to classes or a vocabulary.
HEAD_NAMES = frozenset(
    {
        "classifier",
        "embed_out",
        "fc",
        "head",
        "lm_head",
        "output",
        "output_layer",
        "score",
        "unembed",
    }
)

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


# Their weights are matrices however few inputs or outputs there are.
_MAPS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_vector(module: nn.Module, param: Tensor) -> bool:
    """Whether all entries lie along one dimension, and not for lack of inputs or outputs."""
    if param.ndim >= 2 and isinstance(module, _MAPS):
        return False
    return param.numel() == max(param.shape, default=1)


def _is_adam_module(module_name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return isinstance(module, nn.Linear) and module_name.rpartition(".")[2] in HEAD_NAMES


def param_groups(
    model: nn.Module,
    *,
    adam: Iterable[str] = (),
    precondition: Iterable[str] = (),
    no_decay: Iterable[str] = (),
    adam_lr_ratio: float = 2.0,
    matrix_options: Mapping[str, Any] | None = None,
    adam_options: Mapping[str, Any] | None = None,
    no_decay_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of ``model`` into groups for :class:`dykaf.DyKAF`.

    - Norms, biases and all other vectors, also those stored with dimensions of size 1 beside
      theirs: AdamW without weight decay.
    - Embeddings and output heads (linear layers whose name ends in one of ``HEAD_NAMES``), and
      whatever is tied to them: AdamW (``max_precond_dim=0``), with weight decay.
    - All other weights: DyKAF.

    Args:
        model: a module; parameters that need no gradient are left out.
        adam: name patterns (as in :mod:`fnmatch`, full parameter names; a tied parameter has
            several) to send to AdamW.
        precondition: name patterns to send to DyKAF against the rules; they win over ``adam``.
        no_decay: name patterns to send to the group without weight decay; they win over both.
        adam_lr_ratio: learning rate of what goes to AdamW over that of the optimizer; an ``lr`` in
            the options of a group wins.
        matrix_options: options for the DyKAF group, such as ``{"weight_decay": 0.1}``.
        adam_options: options for the group of embeddings and heads, such as ``{"lr": 1e-3}``.
        no_decay_options: options for the group without weight decay.

    Returns:
        the groups that are not empty, with named parameters: DyKAF, AdamW, AdamW without decay.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    adam_base = {"max_precond_dim": 0, "lr_ratio": adam_lr_ratio}
    adam, precondition, no_decay = tuple(adam), tuple(precondition), tuple(no_decay)
    # A tied parameter is one object under several names, with every role of each.
    names: dict[Tensor, list[str]] = {}
    adam_params: set[Tensor] = set()
    no_decay_params: set[Tensor] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(prefix=module_name, recurse=False):
            names.setdefault(param, []).append(name)
            if _is_adam_module(module_name, module):
                adam_params.add(param)
            if isinstance(module, _NORMS) or _is_vector(module, param):
                no_decay_params.add(param)

    for patterns in (adam, precondition, no_decay):
        for pattern in patterns:
            if not any(_matches(aliases, [pattern]) for aliases in names.values()):
                raise ValueError(
                    f"pattern {pattern!r}: expected to match a parameter of the model, "
                    f"got no match among {len(names)} names"
                )

    matrix_group: list[tuple[str, Tensor]] = []
    adam_group: list[tuple[str, Tensor]] = []
    no_decay_group: list[tuple[str, Tensor]] = []
    for param, aliases in names.items():
        if not param.requires_grad:
            continue
        if _matches(aliases, no_decay):
            group = no_decay_group
        elif _matches(aliases, precondition):
            group = matrix_group
        elif param in no_decay_params:
            group = no_decay_group
        elif param in adam_params or _matches(aliases, adam):
            group = adam_group
        else:
            group = matrix_group
        group.append((aliases[0], param))

    groups = [
        {"params": matrix_group, **(matrix_options or {})},
        {"params": adam_group, **adam_base, **(adam_options or {})},
        {
            "params": no_decay_group,
            **adam_base,
            "weight_decay": 0.0,
            **(no_decay_options or {}),
        },
    ]
    return [group for group in groups if group["params"]]
