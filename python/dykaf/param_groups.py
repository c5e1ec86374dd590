"""Sensible parameter groups for a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

# The last part of the name of a linear layer that maps to classes or a vocabulary.
HEAD_NAMES = frozenset(
    {"head", "lm_head", "classifier", "score", "embed_out", "unembed", "output_layer"}
)

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
    matrix_options: Mapping[str, Any] | None = None,
    adam_options: Mapping[str, Any] | None = None,
    no_decay_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of ``model`` into groups for :class:`dykaf.DyKAF`.

    - Norms, biases and everything else with less than two dimensions: AdamW without weight decay.
    - Embeddings and output heads (linear layers whose name ends in one of ``HEAD_NAMES``), and
      whatever is tied to them: AdamW (``max_precond_dim=0``), with weight decay.
    - All other weights: DyKAF.

    Args:
        model: a module; parameters that need no gradient are left out.
        adam: name patterns (as in :mod:`fnmatch`, full parameter names) to send to AdamW.
        precondition: name patterns to send to DyKAF against the rules; they win over ``adam``.
        no_decay: name patterns to send to the group without weight decay; they win over both.
        matrix_options: options for the DyKAF group, such as ``{"weight_decay": 0.1}``.
        adam_options: options for the group of embeddings and heads, such as ``{"lr": 1e-3}``.
        no_decay_options: options for the group without weight decay.

    Returns:
        the groups that are not empty, with named parameters: DyKAF, AdamW, AdamW without decay.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    adam, precondition, no_decay = tuple(adam), tuple(precondition), tuple(no_decay)
    # A tied parameter is one object under several names: its first name counts, every role of it.
    names: dict[Tensor, str] = {}
    adam_params: set[Tensor] = set()
    norm_params: set[Tensor] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(prefix=module_name, recurse=False):
            names.setdefault(param, name)
            if _is_adam_module(module_name, module):
                adam_params.add(param)
            if isinstance(module, _NORMS):
                norm_params.add(param)

    for patterns in (adam, precondition, no_decay):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(
                    f"pattern {pattern!r}: expected to match a parameter of the model, "
                    f"got no match among {len(names)} names"
                )

    matrix_group: list[tuple[str, Tensor]] = []
    adam_group: list[tuple[str, Tensor]] = []
    no_decay_group: list[tuple[str, Tensor]] = []
    for param, name in names.items():
        if not param.requires_grad:
            continue
        if _matches(name, no_decay):
            no_decay_group.append((name, param))
        elif _matches(name, precondition):
            matrix_group.append((name, param))
        elif param.ndim < 2 or param in norm_params:
            no_decay_group.append((name, param))
        elif param in adam_params or _matches(name, adam):
            adam_group.append((name, param))
        else:
            matrix_group.append((name, param))

    groups = [
        {"params": matrix_group, **(matrix_options or {})},
        {"params": adam_group, "max_precond_dim": 0, **(adam_options or {})},
        {
            "params": no_decay_group,
            "max_precond_dim": 0,
            "weight_decay": 0.0,
            **(no_decay_options or {}),
        },
    ]
    return [group for group in groups if group["params"]]
