"""Sensible parameter groups for a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dykaf.routing import Role, Weight, weights_of


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
    named: bool = True,
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of ``model`` into groups for :class:`dykaf.DyKAF`.

    - AdamW without weight decay: norms, biases (of stacked experts too) and all other vectors, also
      those stored with dimensions of size 1 beside theirs; tables of positions and learned tokens;
      decays of state-space models (``A_log``, ``D``); what ``no_weight_decay()`` of a module names,
      and what has ``_no_weight_decay``.
    - AdamW (``max_precond_dim=0``), with weight decay: embeddings and output heads, what is tied to
      them, depthwise convolutions, which mix no inputs, and maps to or from a single feature. Heads
      are what ``get_output_embeddings()`` or ``get_classifier()`` of a module returns, and layers
      outside of numbered blocks that are named as heads are, such as ``lm_head``, ``classifier``,
      ``score``, ``fc``, ``output`` and what ends in ``_head``, or are the last of such a container.
    - DyKAF: all other weights. Kernels of convolutions are matrices, output channels by the rest;
      other tensors with more than two dimensions are stacks of matrices as ``batch_dims=None`` of
      :class:`dykaf.DyKAF` has it, and three-dimensional ones of ``experts`` always.

    :func:`dykaf.summary` shows what came of it.

    Args:
        model: a module; parameters that need no gradient are left out.
        adam: name patterns (as in :mod:`fnmatch`, full parameter names; a tied parameter has
            several) to send to AdamW. What wrappers put into names is left out,
            such as ``_orig_mod`` of torch.compile, ``_checkpoint_wrapped_module`` and PEFT's
            ``base_layer``; ``parametrizations.weight.original0`` is ``weight``.
        precondition: name patterns to send to DyKAF against the rules; they win over ``adam``.
        no_decay: name patterns to send to the group without weight decay; they win over both.
        adam_lr_ratio: learning rate of what goes to AdamW over that of the optimizer; an ``lr`` in
            the options of a group wins.
        matrix_options: options for the DyKAF group, such as ``{"weight_decay": 0.1}``.
        adam_options: options for the group of embeddings and heads, such as ``{"lr": 1e-3}``.
        no_decay_options: options for the group without weight decay.
        named: whether the groups hold names with the parameters. Messages and reports use them;
            ZeroRedundancyOptimizer refuses them.

    Returns:
        the groups that are not empty: DyKAF (a second one where shapes alone would mislead about
        stacks), AdamW, AdamW without decay.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    adam_base = {"max_precond_dim": 0, "lr_ratio": adam_lr_ratio}
    options: dict[Role, dict[str, Any]] = {
        Role.MATRIX: {**(matrix_options or {})},
        Role.ADAM: {**adam_base, **(adam_options or {})},
        Role.NO_DECAY: {**adam_base, "weight_decay": 0.0, **(no_decay_options or {})},
    }
    patterns = {
        Role.ADAM: tuple(adam),
        Role.MATRIX: tuple(precondition),
        Role.NO_DECAY: tuple(no_decay),
    }
    weights = weights_of(model)
    _check_patterns(weights, [pattern for some in patterns.values() for pattern in some])

    members: dict[tuple[Role, int | None], list[Any]] = {(role, None): [] for role in Role}
    for weight in weights:
        if not weight.param.requires_grad:
            continue
        role = weight.role
        for wanted, some in patterns.items():  # the last that matches wins
            # What has no decay can be sent to DyKAF, but not to decay.
            if weight.is_any_of(some) and not (role is Role.NO_DECAY and wanted is Role.ADAM):
                role = wanted
        key = role, weight.batch_dims if role is Role.MATRIX else None
        member = (weight.name, weight.param) if named else weight.param
        members.setdefault(key, []).append(member)

    order = list(Role)
    groups = []
    for role, batch_dims in sorted(
        members, key=lambda key: (order.index(key[0]), -1 if key[1] is None else key[1])
    ):
        params = members[role, batch_dims]
        if params:
            seen_as = {} if batch_dims is None else {"batch_dims": batch_dims}
            groups.append({"params": params, **seen_as, **options[role]})
    return groups


def _check_patterns(weights: Iterable[Weight], patterns: Iterable[str]) -> None:
    weights = list(weights)
    for pattern in patterns:
        if not any(weight.is_any_of([pattern]) for weight in weights):
            num_names = sum(len(weight.names) for weight in weights)
            raise ValueError(
                f"pattern {pattern!r}: expected to match a parameter of the model, "
                f"got no match among {num_names} names"
            )
