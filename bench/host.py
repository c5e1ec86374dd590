"""The host's time of a step: many small parameters, so that arithmetic takes next to nothing.

The columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import time
from collections.abc import Callable

import torch

import dykaf
from bench.report import Record, Report, print_table
from bench.timing import summarise
from dykaf import ops

# Of each kind of parameter; a transformer's are about half and half.
SHAPES = {"matrices": (4, 4), "vectors": (4,)}
# Plain steps alone: no refresh comes due.
OPTIONS = {"refresh_schedule": "fixed", "precondition_frequency": 10**6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numbers", type=int, nargs="+", default=[150, 500, 5000])
    parser.add_argument("--rounds", type=int, default=50, help="timed steps of each")
    parser.add_argument("--groups", type=int, default=1, help="that differ in lr alone")
    parser.epilog = (
        "With the package of tests/simt/extension.py and SIMT_STUBBED=1 the row native is that of "
        "the CUDA backend, whose kernels then do nothing."
    )


def make_step(shape: tuple[int, ...], number: int, num_groups: int) -> Callable[[], object]:
    """A step of DyKAF's over `number` parameters of a shape, in groups of their own rates."""
    groups = []
    for idx in range(num_groups):
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(idx, number, num_groups)]
        for param in params:
            param.grad = torch.randn(shape)
        groups.append({"params": params, "lr": 1e-3 * (1 + idx)})
    return dykaf.DyKAF(groups, **OPTIONS).step


def adamw_step(shape: tuple[int, ...], number: int) -> Callable[[], object]:
    """The same of torch.optim.AdamW, in one call per operation."""
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(number)]
    for param in params:
        param.grad = torch.randn(shape)
    return torch.optim.AdamW(params, foreach=True).step


def cpu_seconds(step: Callable[[], object]) -> float:
    """Of this process alone: other work on the machine does not count, nor garbage collection."""
    gc.disable()
    try:
        start = time.process_time()
        step()
        return time.process_time() - start
    finally:
        gc.enable()


def run(options: argparse.Namespace, report: Report) -> None:
    """Print the table; a record per kind and number, microseconds per parameter."""
    native = ops.backend_of(torch.zeros(1))
    is_stubbed = bool(os.environ.get("SIMT_STUBBED"))
    report.note(f"native: {native}{', kernels stubbed' if native == 'cuda' and is_stubbed else ''}")
    print("\n### Microseconds of the host per parameter and step\n")
    for kind, shape in SHAPES.items():
        for number in options.numbers:
            steps = {
                "native": (make_step(shape, number, options.groups), contextlib.nullcontext()),
                "aten": (make_step(shape, number, options.groups), ops.aten_alone()),
                "adamw": (adamw_step(shape, number), contextlib.nullcontext()),
            }
            record: Record = {"kind": kind, "number": number}
            for name, (step, context) in steps.items():
                with context:
                    for _ in range(3):  # first gradients, and what is kept from step to step
                        step()
                    times = [cpu_seconds(step) for _ in range(options.rounds)]
                summary = summarise(times)
                record[name] = {
                    "median": 1e6 * summary.median / number,
                    "p10": 1e6 * summary.p10 / number,
                    "p90": 1e6 * summary.p90 / number,
                }
            report.records.append(record)
    columns: dict[str, Callable[[Record], str]] = {
        "": lambda record: f"{record['number']} {record['kind']}"
    }
    for name in ("native", "aten", "adamw"):
        columns[name] = lambda record, name=name: (
            f"{record[name]['median']:.2f} [{record[name]['p10']:.2f}-{record[name]['p90']:.2f}]"
        )
    print_table(columns, report.records)
