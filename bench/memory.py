"""Bytes of state per parameter, by mode and model. Nothing is allocated but what the sizes say.

The columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

import dykaf
from bench.report import Record, Report, print_table
from bench.shapes import SHAPE_SETS, Matrix, Workload
from dykaf.state import Layout

FLOAT = 4
MODES: dict[str, dict[str, Any]] = {
    "dykaf": {},
    "dykaf, factored": {"second_moment": "factored"},
    "dykaf, rank_one": {"second_moment": "rank_one"},
    "dykaf, bfloat16": {"state_dtype": "bfloat16"},
    "dykaf, bfloat16, factored": {"state_dtype": "bfloat16", "second_moment": "factored"},
    "dykaf, skinny_rank=0": {"skinny_rank": 0},
    "dykaf, sides=both": {"sides": "both"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The device and the threads do not matter here."


def state_bytes(workload: Workload, options: Mapping[str, Any]) -> int:
    """What DyKAF with these options keeps for float32 parameters of a workload."""
    group = {**dykaf.DyKAF([torch.zeros(1)]).param_groups[0]}
    group["max_precond_dim"] = workload.max_precond_dim
    group.update(options)
    total = 0
    for shape in workload.shapes:
        param = torch.empty(shape, device="meta")
        shapes = Layout.of(param, {**group, "batch_dims": len(shape) - 2}).shapes()
        total += sum(math.prod(size) * dtype.itemsize for size, dtype in shapes.values())
    return total


def soap_numbers(matrix: Matrix) -> int:
    """Numbers that SOAP keeps (Vyas et al., arXiv 2409.11321): two moments, and of each side a
    factor and its basis."""
    sides = (matrix.m**2 if matrix.left else 0) + (matrix.n**2 if matrix.right else 0)
    return matrix.num_matrices * (2 * matrix.m * matrix.n + 2 * sides)


def measured(workload: Workload) -> Record:
    """Bytes of state per parameter by row name."""
    num_params = sum(math.prod(shape) for shape in workload.shapes)
    totals = {name: state_bytes(workload, options) for name, options in MODES.items()}
    totals["SOAP"] = FLOAT * sum(soap_numbers(matrix) for matrix in workload.matrices())
    totals["AdamW"] = 2 * FLOAT * num_params
    return {name: total / num_params for name, total in totals.items()}


def run(options: argparse.Namespace, report: Report) -> None:
    """Print the table; a record per mode."""
    names = list(options.sets)
    by_set = {name: measured(SHAPE_SETS[name].workload(options.size)) for name in names}
    print(f"\n### Bytes of state per float32 parameter, {options.size}\n")
    for mode in next(iter(by_set.values())):
        report.records.append({"mode": mode, **{name: by_set[name][mode] for name in names}})
    columns = {"state of": lambda record: str(record["mode"])}
    columns |= {name: lambda record, name=name: f"{record[name]:.1f}" for name in names}
    print_table(columns, report.records)
