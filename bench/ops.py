"""Time every operation of dykaf.ops against its plain-torch form, the backend of torch's own
operations and the machine's peaks.

The protocol and the columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial

from bench.cases import CASES, Case, Inputs, check_agreement
from bench.counts import Count, total
from bench.machine import Peaks, available_bytes, matmul_precision, measure_peaks
from bench.progress import tqdm
from bench.report import BenchError, Columns, Record, Report, print_table
from bench.shapes import SHAPE_SETS, Workload
from bench.timing import paired_ratio, seconds, summarise
from dykaf import ops

MIN_REPEATS, MAX_REPEATS = 5, 50
PRECISIONS = ("highest", "high", "medium")
# For the plan only: the share of the peak that operation and plain form reach on average, and that
# decompositions slow down to.
EXPECTED_FRACTION = 0.4
DECOMPOSITION_FRACTION = 0.2
DECOMPOSING = ("initialize_", "refresh_basis_")
COPIES = 2.5  # of parameters and state: those that are changed, the saved ones, temporaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES), metavar="OP")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["highest"], help="of products"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each row (5 to 50 repetitions)"
    )


def expected_seconds(case: Case, count: Count, peaks: Peaks, precision: str) -> float:
    """A rough estimate for the operation, its plain form and its aten form, once each."""
    fraction = DECOMPOSITION_FRACTION if case.name in DECOMPOSING else EXPECTED_FRACTION
    return 3 * count.bound(peaks, precision)[0] / fraction + 1e-4


def needed_bytes(workload: Workload) -> float:
    numbers = sum(
        x.num_matrices * (5 * x.m * x.n + 2 * (x.left * x.m**2 + x.right * x.n**2))
        for x in workload.matrices()
    )
    return COPIES * 4 * numbers


def measure(case: Case, x: Inputs, budget: float) -> tuple[list[float], list[float], list[float]]:
    """Times of the operation, its plain form and its aten form, in turns, from the same state."""
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    operation, plain = case.make(x)
    calls = (operation, plain, partial(through_aten, operation))
    spent = 0.0
    for round_idx in range(-1, MAX_REPEATS):  # round -1 warms up
        for idx in (0, 1, 2) if round_idx % 2 else (2, 1, 0):
            x.restore()
            with matmul_precision(x.precision):
                elapsed = seconds(calls[idx], x.device)
            if round_idx >= 0:
                times[idx].append(elapsed)
                spent += elapsed
        if round_idx + 1 >= MIN_REPEATS and spent > budget:
            break
    return times


def through_aten(operation: Callable[[], object]) -> None:
    """The operation on the backend of torch's own operations."""
    with ops.aten_alone():
        operation()


def record(case: Case, x: Inputs, budget: float, peaks: Peaks) -> Record:
    """Measure one row."""
    count = total(case.count, x.workload.matrices())
    times, plain_times, aten_times = measure(case, x, budget)
    summary = summarise(times)
    ratio, aten_ratio = paired_ratio(times, plain_times), paired_ratio(times, aten_times)
    bound, limit = count.bound(peaks, x.precision)
    return {
        "set": x.workload.name,
        "op": case.name,
        "backend": x.device,
        "precision": x.precision,
        "num_matrices": sum(x.counts),
        **dataclasses.asdict(summary),
        "flops": count.flops,
        "bytes": count.bytes,
        "gflops": count.flops / summary.median / 1e9,
        "gbytes_per_second": count.bytes / summary.median / 1e9,
        "limit": limit,
        "fraction_of_peak": bound / summary.median,
        "plain_median": statistics.median(plain_times),
        "ratio": dataclasses.asdict(ratio) if ratio else {},
        "aten_median": statistics.median(aten_times),
        "aten_ratio": dataclasses.asdict(aten_ratio) if aten_ratio else {},
        "times": times,
        "plain_times": plain_times,
        "aten_times": aten_times,
    }


def format_rate(row: Record) -> str:
    if row["limit"] == "compute":
        return f"{row['gflops']:.1f} GFLOP/s"
    return f"{row['gbytes_per_second']:.1f} GB/s"


def format_ratio(ratio: Record) -> str:
    return f"{ratio['median']:.2f} [{ratio['p10']:.2f}-{ratio['p90']:.2f}]"


COLUMNS: Columns = {
    "op": lambda row: row["op"],
    "precision": lambda row: row["precision"],
    "median us": lambda row: f"{1e6 * row['median']:.1f}",
    "p10-p90 us": lambda row: f"{1e6 * row['p10']:.1f}-{1e6 * row['p90']:.1f}",
    "rate": format_rate,
    "of peak": lambda row: f"{100 * row['fraction_of_peak']:.0f}%",
    "plain torch us": lambda row: f"{1e6 * row['plain_median']:.1f}",
    "op / plain": lambda row: format_ratio(row["ratio"]),
    "aten us": lambda row: f"{1e6 * row['aten_median']:.1f}",
    "op / aten": lambda row: format_ratio(row["aten_ratio"]),
}


def print_means(records: list[Record]) -> None:
    """The geometric mean of op / plain over the sets, by operation."""
    if len({row["set"] for row in records}) < 2:
        return
    print("### All sets: geometric mean of op / plain, and the worst set\n")
    for name in dict.fromkeys(row["op"] for row in records):
        rows = [row for row in records if row["op"] == name]
        mean = statistics.fmean(math.log(row["ratio"]["median"]) for row in rows)
        worst = max(rows, key=lambda row: row["ratio"]["median"])
        print(
            f"- {name}: {math.exp(mean):.2f}, worst {worst['ratio']['median']:.2f} ({worst['set']})"
        )
    sys.stdout.flush()


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the subcommand; rows are in the report as soon as they are measured."""
    cases = [CASES[name] for name in options.ops]
    try:
        for case in cases:
            check_agreement(case, options.device)
    except (ArithmeticError, ValueError) as error:  # they differ; dykaf refuses the device
        raise BenchError(str(error)) from error
    peaks = measure_peaks(options.device, options.precisions, tiny=options.size == "tiny")
    report.settings |= {"peak_flops": peaks.flops, "peak_bandwidth": peaks.bandwidth}
    print("Operations and their plain-torch forms agree. Peaks of this run:")
    for precision, flops in peaks.flops.items():
        print(f"- large product, {precision}: {flops / 1e9:.1f} GFLOP/s")
    print(f"- large copy: {peaks.bandwidth / 1e9:.1f} GB/s")

    workloads = []
    expected = 0.0
    print(f"\nPlan ({len(cases)} rows per set and precision, up to {options.seconds:g} s each):")
    for name in options.sets:
        workload = SHAPE_SETS[name].workload(options.size)
        needed = needed_bytes(workload)
        if needed > available_bytes(options.device):
            report.note(f"- {name}: left out, it needs {needed / 2**30:.1f} GiB of memory")
            continue
        workloads.append(workload)
        of_set = 0.0
        for precision in options.precisions:
            for case in cases:
                once = expected_seconds(
                    case, total(case.count, workload.matrices()), peaks, precision
                )
                of_set += once * (1 + max(MIN_REPEATS, min(MAX_REPEATS, options.seconds / once)))
        expected += of_set
        print(f"- {name}: {workload.describe_shapes()}: {of_set / 60:.1f} min")
    print(f"In all about {expected / 60:.1f} min. Ctrl-C prints what is there.", flush=True)

    num_rows = len(workloads) * len(options.precisions) * len(cases)
    try:
        with tqdm(total=num_rows, disable=None, unit="row", leave=False) as progress:
            for workload in workloads:
                measure_set(workload, cases, options, peaks, report, progress)
    finally:
        print_means(report.records)


def measure_set(
    workload: Workload,
    cases: list[Case],
    options: argparse.Namespace,
    peaks: Peaks,
    report: Report,
    progress: tqdm[None],
) -> None:
    """Measure and print one set."""
    first_row = len(report.records)
    try:
        for precision in options.precisions:
            x = Inputs(workload, options.device, precision)
            for case in cases:
                progress.set_description(f"{workload.name}, {case.name}")
                report.records.append(record(case, x, options.seconds, peaks))
                progress.update()
            del x  # the next one needs the memory
            gc.collect()
    finally:
        tqdm.write(f"\n### {workload.name}, {options.size}: {workload.description}\n")
        tqdm.write(workload.describe_shapes() + "\n")
        print_table(COLUMNS, report.records[first_row:])
