"""The one training loop of all tasks: schedule, clipping, curve, divergence, timing."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import torch
from torch import nn

from bench.evidence.grid import Run
from bench.evidence.optimizers import make_optimizer


class Workload(Protocol):
    """What a task gives to the loop; made by its `build(run)`, seeded by `run.seed`."""

    model: nn.Module
    hidden: list[str]  # names of the weights for the optimizer under test

    def loss(self) -> torch.Tensor:
        """Loss of the next training batch."""
        ...

    def evaluate(self, *, final: bool) -> dict[str, float]:
        """Held-out measures: "loss", lower is better, and others; more data if final."""
        ...


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up to 1, then linearly towards 0, not reached; step counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def is_finite(measures: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in measures.values())


def train(run: Run, workload: Workload) -> dict[str, Any]:
    """Train a workload to its end.

    Returns:
        curve: points of step, wall seconds and CPU seconds of training alone, and held-out
            measures of a small part; the first before the first step.
        final: measures after the last step; None if diverged.
        diverged: a loss was not finite, or the run ended above where it started.
        and the seconds, of which `optimizer_cpu_seconds` in the optimizer.
    """
    settings = run.settings
    model = workload.model
    optimizer = make_optimizer(
        run.options, model, workload.hidden, run.lr, settings["weight_decay"]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    wall = cpu = optimizer_cpu = 0.0
    curve: list[dict[str, float]] = []
    final: dict[str, float] | None = None

    def add_point(step: int) -> bool:
        measures = workload.evaluate(final=False)
        if is_finite(measures):
            curve.append({"step": step, "seconds": wall, "cpu_seconds": cpu, **measures})
        return is_finite(measures)

    is_sound = add_point(0)
    for step in range(settings["steps"]):
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        loss = workload.loss()
        if not math.isfinite(loss.item()):
            is_sound = False
            break
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        if settings["clip"] > 0:
            torch.nn.utils.clip_grad_norm_(trained, settings["clip"])
        optimizer.scale_lr(lr_factor(step, settings["steps"], run.warmup))
        before = time.process_time()
        optimizer.step()
        end_cpu = time.process_time()
        # CPU time of one thread: what wall time is on an idle core, whatever else runs here.
        wall += time.perf_counter() - start_wall
        cpu += end_cpu - start_cpu
        optimizer_cpu += end_cpu - before
        if (step + 1) % settings["eval_every"] == 0 and not add_point(step + 1):
            is_sound = False
            break
    if is_sound:
        final = workload.evaluate(final=True)
        if not is_finite(final) or final["loss"] > curve[0]["loss"]:
            final = None
    return {
        "final": final,
        "diverged": final is None,
        "curve": curve,
        "seconds": wall,
        "cpu_seconds": cpu,
        "optimizer_cpu_seconds": optimizer_cpu,
        "num_parameters": sum(p.numel() for p in trained),
    }
