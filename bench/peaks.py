"""The rates that plain torch reaches here: large products by precision, a copy on the device."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from bench.machine import matmul_precision
from bench.report import Columns, Record, Report, print_table
from bench.timing import seconds, summarise

NUM_SAMPLES = 20
# name -> (dtype of the operands, torch.set_float32_matmul_precision)
PRODUCTS = {
    "float32 product": (torch.float32, "highest"),
    "TF32 product": (torch.float32, "high"),
    "bfloat16 product": (torch.bfloat16, "highest"),
}
SIDES = {"full": 8192, "small": 2048, "tiny": 64}
COPIED_BYTES = {"full": 1 << 30, "small": 1 << 28, "tiny": 1 << 14}

COLUMNS: Columns = {
    "peak": lambda row: row["peak"],
    "size": lambda row: row["size"],
    "best": lambda row: f"{row['best_rate']:.4g} {row['unit']}",
    "median": lambda row: f"{row['median_rate']:.4g} {row['unit']}",
    "p10-p90 us": lambda row: f"{1e6 * row['p10']:.1f}-{1e6 * row['p90']:.1f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def record(name: str, size: str, amount: float, unit: str, times: list[float]) -> Record:
    """One row; `amount` is what one call does, in the unit times seconds."""
    summary = summarise(times)
    return {
        "peak": name,
        "size": size,
        "unit": unit,
        "best_rate": amount / min(times),
        "median_rate": amount / summary.median,
        **dataclasses.asdict(summary),
        "times": times,
    }


def product_record(name: str, side: int, device: str) -> Record:
    """A square product; where the device has no TF32 that row repeats float32."""
    dtype, precision = PRODUCTS[name]
    a = torch.randn(side, side, device=device).to(dtype)
    with matmul_precision(precision):
        torch.mm(a, a)
        times = [seconds(lambda: torch.mm(a, a), device) for _ in range(NUM_SAMPLES)]
    return record(name, f"{side} x {side}", 2 * side**3 / 1e12, "TFLOP/s", times)


def copy_record(num_bytes: int, device: str) -> Record:
    """Read and write counted."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.ones_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(NUM_SAMPLES)]
    return record("copy", f"{num_bytes / 2**20:g} MiB", 2 * num_bytes / 1e9, "GB/s", times)


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the subcommand."""
    for name in PRODUCTS:
        report.records.append(product_record(name, SIDES[options.size], options.device))
    report.records.append(copy_record(COPIED_BYTES[options.size], options.device))
    print()
    print_table(COLUMNS, report.records)
