"""Timing of whole optimizer steps: summaries, calibration, a description of the machine."""

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Summary:
    """Times of one optimizer's steps, in seconds."""

    num_steps: int
    mean: float
    median: float
    p10: float
    p90: float
    worst: float


def summarise(times: list[float]) -> Summary:
    """Summarise the step times of whole refresh periods.

    Args:
        times: seconds per step, at least one.

    Returns:
        Mean, median, 10th and 90th percentile (linear interpolation) and the worst step.
    """
    samples = torch.tensor(times, dtype=torch.float64)
    p10, p90 = torch.quantile(samples, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return Summary(
        len(times), statistics.fmean(times), statistics.median(times), p10, p90, max(times)
    )


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; the garbage collector runs before, not during it."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    finally:
        gc.enable()


@dataclass(frozen=True)
class Calibration:
    """Rates of this machine, for the estimate of the running time only."""

    flops: float
    bandwidth: float


def calibrate() -> Calibration:
    """Measure a float32 product (flops/s) and an in-place scaling (bytes/s), median of five."""
    side = 768
    a = torch.randn(side, side)
    b = torch.randn(1 << 24)
    torch.mm(a, a)
    b.mul_(1.0)
    product = statistics.median(seconds(lambda: torch.mm(a, a)) for _ in range(5))
    scaling = statistics.median(seconds(lambda: b.mul_(1.0)) for _ in range(5))
    return Calibration(2 * side**3 / product, 2 * b.numel() * b.element_size() / scaling)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str | int | float]:
    """CPU, threads, load and versions, for the head of a report."""
    return {
        "cpu": cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
