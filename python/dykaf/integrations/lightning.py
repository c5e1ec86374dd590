"""DyKAF's diagnostics in the loggers of Lightning."""

from __future__ import annotations

from typing import Any

from dykaf.engine import KroneckerOptimizer
from dykaf.integrations import require
from dykaf.integrations.metrics import Monitor

require("lightning")  # before the imports of it, which would not say what to install

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402


class DiagnosticsCallback(Callback):
    """Logs what :class:`dykaf.integrations.metrics.Monitor` reports, to all loggers of the Trainer.

    .. code-block:: python

        trainer = Trainer(callbacks=[DiagnosticsCallback(every_n_steps=100)], ...)

    Names begin with ``dykaf/``, and where several optimizers are DyKAF with ``dykaf-1/`` from the
    second on.

    Args:
        every_n_steps: steps of the optimizers between two reports.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._monitors: list[Monitor] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to time the steps."""
        ours = [
            optimizer
            for optimizer in trainer.optimizers
            if isinstance(optimizer, KroneckerOptimizer)
        ]
        self._monitors = [
            Monitor(optimizer, prefix=f"dykaf-{idx}/" if idx else "dykaf/")
            for idx, optimizer in enumerate(ours)
        ]
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Logs where a report is due."""
        # With several optimizers a batch may be several steps, with accumulated gradients none.
        step = trainer.global_step
        is_due = step // self.every_n_steps > self._last_step // self.every_n_steps
        self._last_step = step
        for monitor in self._monitors if is_due else ():
            metrics = monitor.report()
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ceases to time the steps."""
        for monitor in self._monitors:
            monitor.close()
