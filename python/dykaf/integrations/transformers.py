"""DyKAF in the Trainer of transformers, and in those of TRL, which are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dykaf.integrations import require
from dykaf.integrations.metrics import Monitor
from dykaf.optimizer import DyKAF
from dykaf.param_groups import param_groups

require("transformers")  # before the imports of it, which would not say what to install

from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class _Factory:
    """What Trainer.create_optimizer instantiates and calls, with the model as it will train."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments,
        groups: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> DyKAF:
        # Read here and not before: a hyperparameter search changes them.
        return DyKAF(
            param_groups(model, **groups),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            **options,
        )


def dykaf_optimizer(
    args: TrainingArguments, *, groups: Mapping[str, Any] | None = None, **options: Any
) -> tuple[type[_Factory], dict[str, Any]]:
    """DyKAF for a Trainer, made over ``dykaf.param_groups`` of the model when training starts.

    .. code-block:: python

        trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=dykaf_optimizer(args))

    So it gets the parameters that are trained: adapters that TRL adds, shards. A trainer whose
    constructor does not take the argument has the attribute ``optimizer_cls_and_kwargs`` to set.

    Args:
        args: the trainer's; ``learning_rate`` and ``weight_decay`` are DyKAF's, and the scheduler
            and ``max_grad_norm`` are used as ever. ``optim`` and the ``adam_`` ones are not read.
        groups: arguments of :func:`dykaf.param_groups`, such as ``{"adam_lr_ratio": 1.0}``.
        options: all other arguments of :class:`dykaf.DyKAF`.

    Returns:
        the value of ``optimizer_cls_and_kwargs``.
    """
    return _Factory, {"args": args, "groups": dict(groups or {}), "options": options}


class DiagnosticsCallback(TrainerCallback):
    """Logs what :class:`dykaf.integrations.metrics.Monitor` reports.

    .. code-block:: python

        trainer.add_callback(DiagnosticsCallback(trainer, every_n_steps=100))

    Args:
        trainer: whose ``log`` takes the reports, and with it its loggers and ``log_history``.
        every_n_steps: steps of the optimizer between two reports.
    """

    def __init__(self, trainer: Trainer, every_n_steps: int = 100) -> None:
        self.trainer = trainer
        self.every_n_steps = every_n_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to time the steps."""
        self._monitor = Monitor(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs where a report is due."""
        if state.global_step % self.every_n_steps == 0:
            should_log = control.should_log
            self.trainer.log(self._monitor.report())
            control.should_log = should_log  # log() takes the loss of this step for logged

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ceases to time the steps."""
        self._monitor.close()
