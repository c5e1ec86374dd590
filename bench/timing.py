"""Timing and memory of single calls, and what is said of many of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Summary:
    """Many times of one thing, in seconds."""

    num_samples: int
    mean: float
    median: float
    p10: float
    p90: float
    worst: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, by linear interpolation."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summarise(times: Sequence[float]) -> Summary:
    """Mean, median, 10th and 90th percentile and the worst of at least one time."""
    return Summary(
        len(times),
        statistics.fmean(times),
        statistics.median(times),
        quantile(times, 0.1),
        quantile(times, 0.9),
        max(times),
    )


@dataclass(frozen=True)
class Ratio:
    """A paired ratio: below 1 is faster than the baseline."""

    median: float
    p10: float
    p90: float
    num_blocks: int

    def __str__(self) -> str:
        spread = f" [{self.p10:.3f}-{self.p90:.3f}]" if self.num_blocks > 1 else ""
        return f"{self.median:.3f}{spread}"


def paired_ratio(times: Sequence[float], baseline: Sequence[float], block: int = 1) -> Ratio | None:
    """The ratio of two things timed in turn, taken over blocks of consecutive rounds.

    Args:
        times: seconds per round.
        baseline: seconds of the baseline in the same rounds.
        block: rounds that are summed before the ratio is taken; a refresh period for whole steps,
            for optimizers refresh in different rounds. A block that is not full does not count.

    Returns:
        Median, 10th and 90th percentile over the blocks; None without a full block.
    """
    num_blocks = min(len(times), len(baseline)) // block
    places = [slice(idx * block, (idx + 1) * block) for idx in range(num_blocks)]
    ratios = [sum(times[place]) / sum(baseline[place]) for place in places]
    if not ratios:
        return None
    ends = quantile(ratios, 0.1), quantile(ratios, 0.9)
    return Ratio(statistics.median(ratios), *ends, num_blocks)


def synchronize(device: str) -> None:
    """Wait for what the device still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call; the garbage collector has its turns between calls."""
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def peak_allocation(function: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that one call holds beyond those that lived before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    results = profile.kineto_results
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
