"""Time whole optimizer steps, the optimizers in turns in one process.

The protocol and the columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.machine import available_bytes, matmul_precision, measure_peaks
from bench.optimizers import (
    BASELINES,
    DEFAULT_OPTIMIZERS,
    PRECONDITION_FREQUENCY,
    SPECS,
    expected_bytes,
    expected_seconds,
    installed,
    state_bytes,
)
from bench.progress import tqdm
from bench.report import BenchError, Columns, Record, Report, print_table
from bench.shapes import SHAPE_SETS, Workload
from bench.timing import Summary, paired_ratio, peak_allocation, seconds, summarise

# The first gradient (factors and first bases), then a whole period, so that everything that is
# compiled or allocated once is there. Allocations are counted over these steps and not later: only
# a profile that sees a tensor made knows its size when it is freed.
NUM_WARMUP_STEPS = 1 + PRECONDITION_FREQUENCY
# Cycled: no optimizer meets the same gradient twice in a row, nor an adapter's basis the same rows,
# which would be rare. Models too large for so many have two.
NUM_GRADIENTS = 16
MAX_GRADIENT_ELEMENTS = 2**26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=SPECS,
        default=list(DEFAULT_OPTIMIZERS),
        metavar="NAME",
        help="of " + ", ".join(SPECS),
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"measured steps per set, rounded up to whole periods of {PRECONDITION_FREQUENCY}",
    )
    parser.add_argument(
        "--precision", choices=("highest", "high", "medium"), default="highest", help="of products"
    )


class SetRun:
    """Optimizers on one workload, each with its own parameters and the same gradients."""

    def __init__(self, workload: Workload, names: list[str], device: str) -> None:
        self.workload = workload
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [
                torch.randn(shape, generator=generator, device=device) * scale
                for shape in workload.shapes
            ]

        start = draw(0.02)
        size = sum(tensor.numel() for tensor in start)
        num_gradients = max(2, min(NUM_GRADIENTS, MAX_GRADIENT_ELEMENTS // size))
        self.gradients = [draw(1e-3) for _ in range(num_gradients)]
        self.parameters = {
            name: [torch.nn.Parameter(p.clone()) for p in self._split(name, start)]
            for name in names
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, parameters in self.parameters.items():
            try:
                self.optimizers[name] = SPECS[name].make(parameters, workload.max_precond_dim)
            except ValueError as error:  # such as a device that it does not support
                raise BenchError(f"{name}: {error}") from error
        self.first_step: dict[str, float] = {}
        self.peak_bytes = dict.fromkeys(names, 0)
        self.times: dict[str, list[float]] = {name: [] for name in names}

    @staticmethod
    def _split(name: str, tensors: list[Tensor]) -> list[Tensor]:
        """Stacks as one tensor each for those that take them, else matrix by matrix."""
        if SPECS[name].takes_stacks:
            return tensors
        return [matrix for t in tensors for matrix in (t.unbind() if t.ndim > 2 else (t,))]

    def _step(self, name: str, step_idx: int) -> float:
        gradients = self._split(name, self.gradients[step_idx % len(self.gradients)])
        for parameter, gradient in zip(self.parameters[name], gradients, strict=True):
            parameter.grad = gradient
        return seconds(self.optimizers[name].step, self.device)

    def _warm_up(self, name: str) -> None:
        self.first_step[name] = self._step(name, 0)
        for step_idx in range(1, NUM_WARMUP_STEPS):
            self._step(name, step_idx)

    def run(self, num_steps: int, tick: Callable[[], object]) -> None:
        """Warm up, then take `num_steps` rounds of one step per optimizer."""
        names = list(self.optimizers)
        order = random.Random(0)
        for name in names:
            self.peak_bytes[name] = peak_allocation(partial(self._warm_up, name), self.device)
            tick()
        for round_idx in range(num_steps):
            order.shuffle(names)  # nobody always runs after the same neighbour
            for name in names:
                self.times[name].append(self._step(name, NUM_WARMUP_STEPS + round_idx))
            tick()

    def records(self) -> list[Record]:
        """One record per optimizer that has measured steps."""
        return [
            self._record(name, summarise(times), times)
            for name, times in self.times.items()
            if times
        ]

    def _record(self, name: str, summary: Summary, times: list[float]) -> Record:
        ratios = {}
        for baseline in BASELINES:
            if self.times.get(baseline):
                # An interrupted run may lack a whole period; its ratios are of rounds then.
                block = PRECONDITION_FREQUENCY if len(times) >= PRECONDITION_FREQUENCY else 1
                ratio = paired_ratio(times, self.times[baseline], block)
                if ratio is not None:
                    ratios[baseline] = dataclasses.asdict(ratio)
        return {
            "set": self.workload.name,
            "optimizer": name,
            "backend": self.device,
            **dataclasses.asdict(summary),
            "whole_periods": summary.num_samples % PRECONDITION_FREQUENCY == 0,
            "worst_over_median": summary.worst / summary.median,
            "first_step": self.first_step[name],
            "ratio": ratios,
            "peak_bytes": self.peak_bytes[name],
            "state_bytes": state_bytes(self.optimizers[name]),
            "times": times,
        }


def format_ratio(baseline: str) -> Callable[[Record], str]:
    def text(row: Record) -> str:
        ratio = row["ratio"].get(baseline)
        if ratio is None:
            return "-"
        return f"{ratio['median']:.3f} [{ratio['p10']:.3f}-{ratio['p90']:.3f}]"

    return text


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


COLUMNS: Columns = {
    "optimizer": lambda row: row["optimizer"],
    "steps": lambda row: str(row["num_samples"]) + ("" if row["whole_periods"] else " (cut)"),
    "mean ms": lambda row: f"{1e3 * row['mean']:.2f}",
    "median ms": lambda row: f"{1e3 * row['median']:.2f}",
    "p10-p90 ms": lambda row: f"{1e3 * row['p10']:.2f}-{1e3 * row['p90']:.2f}",
    "worst / median": lambda row: f"{row['worst_over_median']:.2f}",
    **{f"/ {baseline}": format_ratio(baseline) for baseline in BASELINES},
    "first step ms": lambda row: f"{1e3 * row['first_step']:.1f}",
    "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    "state MiB": lambda row: mebibytes(row["state_bytes"]["total"]),
}


def kind_column(kind: str) -> Callable[[Record], str]:
    return lambda row: mebibytes(row["state_bytes"][kind])


KINDS = ("exp_avg", "exp_avg_sq", "factors", "bases", "other", "total")
KIND_COLUMNS: Columns = {
    "optimizer": lambda row: row["optimizer"],
    **{f"{kind} MiB": kind_column(kind) for kind in KINDS},
}


def make_plan(
    options: argparse.Namespace, names: list[str], report: Report
) -> list[tuple[Workload, int]]:
    """Print what will be run; the sets that fit into memory, with their numbers of steps."""
    peaks = measure_peaks(options.device, [options.precision], tiny=options.size == "tiny")
    rates = peaks.flops[options.precision], peaks.bandwidth
    plan: list[tuple[Workload, int]] = []
    expected = 0.0
    print("\nPlan (each round: one step of every optimizer, in rotating order):")
    print(f"- optimizers: {', '.join(names)}")
    for name in options.sets:
        workload = SHAPE_SETS[name].workload(options.size)
        needed = sum(expected_bytes(optimizer, workload) for optimizer in names)
        if needed > available_bytes(options.device):
            report.note(
                f"- {name}: left out, it needs {needed / 2**30:.1f} GiB of memory for all "
                "optimizers together"
            )
            continue
        steps = options.steps or workload.num_periods * PRECONDITION_FREQUENCY
        num_steps = math.ceil(steps / PRECONDITION_FREQUENCY) * PRECONDITION_FREQUENCY
        plan.append((workload, num_steps))
        of_set = sum(
            expected_seconds(optimizer, workload, NUM_WARMUP_STEPS + num_steps, *rates)
            for optimizer in names
        )
        expected += of_set
        print(
            f"- {name}: {workload.describe_shapes()}: {NUM_WARMUP_STEPS} warm-up and "
            f"{num_steps} measured steps, {of_set / 60:.1f} min"
        )
    print(f"In all about {expected / 60:.1f} min. Ctrl-C prints what is there.", flush=True)
    return plan


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the subcommand; a set that is interrupted still yields its records."""
    if options.steps is not None and options.steps < 1:
        raise BenchError(f"--steps: expected a positive integer, got {options.steps}")
    names = installed(options.optimizers, report.note)
    report.settings |= {"precision": options.precision, "period": PRECONDITION_FREQUENCY}
    with matmul_precision(options.precision):
        plan = make_plan(options, names, report)
        num_ticks = sum(len(names) + num_steps for _, num_steps in plan)
        with tqdm(total=num_ticks, disable=None, leave=False) as progress:
            for workload, num_steps in plan:
                progress.set_description(workload.name)
                set_run = SetRun(workload, names, options.device)
                try:
                    set_run.run(num_steps, progress.update)
                finally:
                    records = set_run.records()
                    report.records += records
                    tqdm.write(f"\n### {workload.name}, {options.size}: {workload.description}\n")
                    tqdm.write(workload.describe_shapes() + "\n")
                    print_table(COLUMNS, records)
                    if records:
                        print_table(KIND_COLUMNS, records)
                del set_run  # the next set needs the memory
                gc.collect()
