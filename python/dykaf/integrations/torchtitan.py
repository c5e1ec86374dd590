"""DyKAF as the optimizer of torchtitan's Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dykaf.integrations import require
from dykaf.optimizer import DyKAF
from dykaf.param_groups import param_groups

require("torchtitan")  # before the imports of it, which would not say what to install

from torchtitan.components.checkpointer.utils import canonical_fqn  # noqa: E402
from torchtitan.components.optimizer import OptimizersContainer  # noqa: E402


class DyKAFContainer(OptimizersContainer):
    """A DyKAF for each part of the model, over ``dykaf.param_groups`` of it.

    .. code-block:: python

        config.optimizer = DyKAFContainer.Config(options={"lr": 0.01, "weight_decay": 0.1})

    Args:
        config: what to make.
        model_parts: as the Trainer has sharded them; more than one with pipeline parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Of the entries of OptimizersContainer none is read.

        Attributes:
            options: arguments of :class:`dykaf.DyKAF`.
            groups: arguments of :func:`dykaf.param_groups`.
        """

        options: dict[str, Any] = field(default_factory=dict)
        groups: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        for part in model_parts:
            groups = param_groups(part, **config.groups)
            for group in groups:  # checkpoints know parameters by these names
                group["params"] = [(canonical_fqn(name), param) for name, param in group["params"]]
            self.optimizers.append(DyKAF(groups, **config.options))
        params = [
            param
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        self._validate_params(params)
        self._post_init(params)
