"""A few numbers that tell a logger how an optimizer fares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from torch.optim.optimizer import Optimizer

from dykaf.engine import KroneckerOptimizer


def summarize(report: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The report of :meth:`dykaf.DyKAF.diagnostics` in a few numbers over all parameters.

    Args:
        report: what ``diagnostics()`` returned.

    Returns:
        ``skipped_steps`` and ``refresh_fallbacks``, summed; ``staleness_max``,
        ``staleness_median`` and ``condition_max`` over all factors, where there are any;
        ``update_rms_max`` and ``update_rms_median`` over all parameters that have had a step.
    """

    def values(*keys: str) -> list[float]:
        return [entry[key] for entry in report.values() for key in keys if key in entry]

    staleness = values("staleness_L", "staleness_R")
    condition = values("condition_L", "condition_R")
    update_rms = values("update_rms")
    flat = {
        "skipped_steps": float(report["optimizer"]["skipped_steps"]),
        "refresh_fallbacks": float(sum(values("refresh_fallbacks"))),
    }
    if staleness:
        flat["staleness_max"] = max(staleness)
        flat["staleness_median"] = median(staleness)
        flat["condition_max"] = max(condition)
    if update_rms:
        flat["update_rms_max"] = max(update_rms)
        flat["update_rms_median"] = median(update_rms)
    return flat


def unwrapped(optimizer: Any) -> KroneckerOptimizer:
    """The DyKAF or FISMO inside of what Accelerate or Fabric made of it.

    Raises:
        TypeError: if there is none.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, KroneckerOptimizer):
        raise TypeError(f"optimizer: expected a DyKAF or FISMO, got {type(optimizer).__name__}")
    return optimizer


class Monitor:
    """Makes reports of an optimizer for a logger, and times its steps in between.

    .. code-block:: python

        monitor = Monitor(optimizer)
        for step, batch in enumerate(batches, start=1):
            ...
            optimizer.step()
            if step % 100 == 0:
                logger.log(monitor.report())

    A report costs O(n^2) for a factor of size n, and on a GPU waits for it: not for every step.

    Args:
        optimizer: a DyKAF, or what Accelerate or Fabric made of one.
        prefix: of the names in a report.

    Raises:
        TypeError: if there is no DyKAF in ``optimizer``.
    """

    def __init__(self, optimizer: Any, prefix: str = "dykaf/") -> None:
        self.optimizer = unwrapped(optimizer)
        self.prefix = prefix
        self._in_steps = 0.0
        self._step_start = self._last_report = time.perf_counter()
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._step_start = time.perf_counter()
        closure: Callable[[], Any] | None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None

        # The model's time, which comes first, is not the step's.
        def timed() -> Any:
            loss = closure()
            self._step_start = time.perf_counter()
            return loss

        return args[:1], {"closure": timed}

    def _after_step(self, *_: Any) -> None:
        self._in_steps += time.perf_counter() - self._step_start

    def report(self) -> dict[str, float]:
        """What :func:`summarize` tells, and the steps' share of the time since the last report.

        Returns:
            its entries and ``step_time_share``, each after the prefix. The time is the host's: on
            a GPU, what it takes to launch a step, not to run it.
        """
        now = time.perf_counter()
        elapsed = now - self._last_report
        flat = summarize(self.optimizer.diagnostics())
        flat["step_time_share"] = self._in_steps / elapsed if elapsed > 0 else 0.0
        self._in_steps = 0.0
        self._last_report = time.perf_counter()
        return {self.prefix + name: value for name, value in flat.items()}

    def close(self) -> None:
        """Takes its hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()
