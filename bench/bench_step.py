"""Time whole optimizer steps: DyKAF, its textbook form, and AdamW, alternating in one process.

    python -m bench.bench_step [--sets block lora small] [--steps N] [--threads T] [--json FILE]

The protocol and the columns are explained in bench/README.md.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shapes import SHAPE_SETS, ShapeSet
from bench.textbook import TextbookDyKAF
from bench.timing import Calibration, Summary, calibrate, machine, seconds, summarise

PRECONDITION_FREQUENCY = 10
NUM_WARMUP_STEPS = 2  # the first gradient (factors and first bases), then one plain step
NUM_GRADIENTS = 2  # cycled, so that no optimizer meets the same gradient twice in a row

DYKAF_INTEGRATORS = {"dykaf-ksl": "ksl", "dykaf-bug": "bug", "dykaf-diagonal": "diagonal"}
OPTIMIZERS = (*DYKAF_INTEGRATORS, "textbook", "adamw")
# Pairs of products of 2 m n (m + n) flops per step: rotations and factor update.
PRODUCT_PAIRS = {"dykaf-ksl": 4, "dykaf-bug": 5, "dykaf-diagonal": 3, "textbook": 6, "adamw": 0}
# Cost of one n x n factorisation in units of n^3 flops at the speed of a product. Only the
# estimate of the running time depends on these two.
QR_COST, EIGH_COST = 10, 30


class MissingDyKAF(Exception):
    """The package cannot be imported."""


def load_dykaf() -> Any:
    """Import dykaf, here and nowhere else."""
    try:
        import dykaf
    except ImportError as error:
        raise MissingDyKAF(
            f"dykaf cannot be imported ({error}); install the project first, "
            "or time the others alone: --optimizers textbook adamw"
        ) from error
    return dykaf


def make_optimizer(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Build one of OPTIMIZERS with the hyperparameters they share."""
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=3e-3, betas=(0.95, 0.95), weight_decay=0.01, fused=True
        )
    if name == "textbook":
        return TextbookDyKAF(parameters, precondition_frequency=PRECONDITION_FREQUENCY)
    # The default geometric schedule reaches this period at step 10 x PRECONDITION_FREQUENCY.
    optimizer: torch.optim.Optimizer = load_dykaf().DyKAF(
        parameters,
        integrator=DYKAF_INTEGRATORS[name],
        precondition_frequency=PRECONDITION_FREQUENCY,
        refresh_schedule="fixed",
    )
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, counted alike for every optimizer."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def expected_seconds(name: str, shape_set: ShapeSet, num_steps: int, rates: Calibration) -> float:
    """A rough estimate: products and factorisations at calibrated rates, eight passes of memory."""
    total = 0.0
    for m, n in shape_set.shapes:
        floats = m * n if name == "adamw" else m * m + n * n + m * n
        memory = 8 * 4 * floats / rates.bandwidth
        step = PRODUCT_PAIRS[name] * 2 * m * n * (m + n) / rates.flops + memory
        total += step * (num_steps + NUM_WARMUP_STEPS)
        if name != "adamw":
            products = 6 if name == "textbook" else 4
            refreshes = num_steps / PRECONDITION_FREQUENCY
            cubes = (products + QR_COST) * refreshes + EIGH_COST
            total += cubes * (m**3 + n**3) / rates.flops
    return total


class SetRun:
    """All optimizers on one shape set, each with its own parameters and the same gradients."""

    def __init__(self, shape_set: ShapeSet, names: list[str]) -> None:
        self.shape_set = shape_set
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(s, generator=generator) * scale for s in shape_set.shapes]

        start = draw(0.02)
        self.gradients = [draw(1e-3) for _ in range(NUM_GRADIENTS)]
        self.parameters = {n: [torch.nn.Parameter(w.clone()) for w in start] for n in names}
        self.optimizers = {n: make_optimizer(n, p) for n, p in self.parameters.items()}
        self.first_step: dict[str, float] = {}
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.num_rounds = 0

    def _step(self, name: str) -> float:
        gradients = self.gradients[self.num_rounds % NUM_GRADIENTS]
        for parameter, gradient in zip(self.parameters[name], gradients, strict=True):
            parameter.grad = gradient
        return seconds(self.optimizers[name].step)

    def run(self, num_steps: int) -> None:
        """Warm up, then take `num_steps` rounds of one step per optimizer."""
        names = list(self.optimizers)
        for round_idx in range(NUM_WARMUP_STEPS + num_steps):
            shift = round_idx % len(names)  # nobody always runs after the same neighbour
            for name in names[shift:] + names[:shift]:
                elapsed = self._step(name)
                if round_idx == 0:
                    self.first_step[name] = elapsed
                elif round_idx >= NUM_WARMUP_STEPS:
                    self.times[name].append(elapsed)
            self.num_rounds += 1

    def rows(self) -> list[dict[str, Any]]:
        """One record per optimizer that has measured steps."""
        summaries = {n: summarise(t) for n, t in self.times.items() if t}
        return [self._row(name, summary, summaries) for name, summary in summaries.items()]

    def _row(self, name: str, summary: Summary, summaries: dict[str, Summary]) -> dict[str, Any]:
        def ratio(baseline: str) -> float | None:
            return summary.mean / summaries[baseline].mean if baseline in summaries else None

        return {
            "set": self.shape_set.name,
            "optimizer": name,
            **dataclasses.asdict(summary),
            "whole_periods": summary.num_steps % PRECONDITION_FREQUENCY == 0,
            "worst_over_median": summary.worst / summary.median,
            "mean_over_textbook": ratio("textbook"),
            "mean_over_adamw": ratio("adamw"),
            "first_step": self.first_step[name],
            "state_bytes": state_bytes(self.optimizers[name]),
            "times": self.times[name],
        }


def describe_shapes(shape_set: ShapeSet) -> str:
    """Distinct shapes with their counts, in order."""
    counts: dict[tuple[int, int], int] = {}
    for shape in shape_set.shapes:
        counts[shape] = counts.get(shape, 0) + 1
    return ", ".join(f"{m}x{n}" + (f" (x{c})" if c > 1 else "") for (m, n), c in counts.items())


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "optimizer": lambda row: row["optimizer"],
    "steps": lambda row: str(row["num_steps"]) + ("" if row["whole_periods"] else " (cut)"),
    "mean ms": lambda row: f"{1e3 * row['mean']:.2f}",
    "median ms": lambda row: f"{1e3 * row['median']:.2f}",
    "p10-p90 ms": lambda row: f"{1e3 * row['p10']:.2f}-{1e3 * row['p90']:.2f}",
    "worst / median": lambda row: f"{row['worst_over_median']:.2f}",
    "mean / textbook": lambda row: format_ratio(row["mean_over_textbook"]),
    "mean / AdamW": lambda row: format_ratio(row["mean_over_adamw"]),
    "first step ms": lambda row: f"{1e3 * row['first_step']:.1f}",
    "state MiB": lambda row: f"{row['state_bytes'] / 2**20:.2f}",
}


def format_ratio(ratio: float | None) -> str:
    """A ratio, or a dash where its baseline was not measured."""
    return "-" if ratio is None else f"{ratio:.3f}"


def print_table(shape_set: ShapeSet, rows: list[dict[str, Any]]) -> None:
    """Print one set as a Markdown table."""
    print(f"\n### {shape_set.name}: {shape_set.description}\n\n{describe_shapes(shape_set)}\n")
    if not rows:
        print("(no step was measured)")
        return
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(column(row) for column in COLUMNS.values()) + " |")
    sys.stdout.flush()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time whole optimizer steps.")
    parser.add_argument("--sets", nargs="+", choices=SHAPE_SETS, default=list(SHAPE_SETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument(
        "--steps",
        type=int,
        help=f"measured steps per set, rounded up to whole periods of {PRECONDITION_FREQUENCY}",
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parsed = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected a positive integer, got {value}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0; 2 if dykaf was asked for and cannot be imported; 130 after Ctrl-C.
    """
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    head = machine()
    if any(name in DYKAF_INTEGRATORS for name in options.optimizers):
        try:
            head["dykaf"] = getattr(load_dykaf(), "__version__", "unknown version")
        except MissingDyKAF as error:
            print(error, file=sys.stderr)
            return 2
    for key, value in head.items():
        print(f"- {key}: {value}")

    rates = calibrate()
    plan: list[tuple[ShapeSet, int]] = []
    expected = 0.0
    print("\nPlan (each round: one step of every optimizer, in rotating order):")
    for name in dict.fromkeys(options.sets):
        shape_set = SHAPE_SETS[name]
        periods = shape_set.num_periods
        if options.steps is not None:
            periods = math.ceil(options.steps / PRECONDITION_FREQUENCY)
        num_steps = periods * PRECONDITION_FREQUENCY
        plan.append((shape_set, num_steps))
        time_of_set = sum(
            expected_seconds(optimizer, shape_set, num_steps, rates)
            for optimizer in options.optimizers
        )
        expected += time_of_set
        print(
            f"- {name}: {len(shape_set.shapes)} matrices, {NUM_WARMUP_STEPS} warm-up rounds, "
            f"{num_steps} measured rounds, estimated {time_of_set / 60:.1f} min"
        )
    print(f"Estimated in all: {expected / 60:.1f} min. Ctrl-C prints what is there.", flush=True)

    records: list[dict[str, Any]] = []
    status = 0
    for shape_set, num_steps in plan:
        run = SetRun(shape_set, list(dict.fromkeys(options.optimizers)))
        try:
            run.run(num_steps)
        except KeyboardInterrupt:
            status = 130
        rows = run.rows()
        records += rows
        print_table(shape_set, rows)
        if status != 0:
            print("\nInterrupted: rows marked (cut) are not means over whole refresh periods.")
            break
        del run  # the next set needs the memory
    if options.json is not None:
        report = {
            "machine": head,
            "precondition_frequency": PRECONDITION_FREQUENCY,
            "interrupted": status != 0,
            "results": records,
        }
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
