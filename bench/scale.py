"""How the cost of a step grows: with the side of a matrix, and with the number of matrices.

The protocol and the columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from operator import itemgetter

from bench.machine import available_bytes, matmul_precision, measure_peaks
from bench.optimizers import (
    PRECONDITION_FREQUENCY,
    SPECS,
    expected_bytes,
    expected_seconds,
    installed,
)
from bench.progress import tqdm
from bench.report import BenchError, Record, Report, print_table
from bench.shapes import MAX_PRECOND_DIM, Workload
from bench.step import NUM_WARMUP_STEPS, SetRun

DEFAULT_OPTIMIZERS = (
    "dykaf",
    "dykaf-ksl",
    "textbook-dykaf",
    "textbook-soap",
    "muon",
    "adamw",
)
SIDES = {"full": (64, 128, 256, 512, 1024, 2048, 4096), "small": (64, 128, 256, 512, 1024)}
COUNTS = {"full": (1, 4, 16, 64, 256), "small": (1, 4, 16, 64)}
SIDES["tiny"], COUNTS["tiny"] = (4, 8, 16), (1, 2, 4)
NUM_FITTED = 3  # the largest points, where the growth is nearest to its limit
SWEEPS = {"n": "one n x n matrix", "matrices": "that many matrices"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=SPECS,
        default=list(DEFAULT_OPTIMIZERS),
        metavar="NAME",
        help="of " + ", ".join(SPECS),
    )
    parser.add_argument("--sides", nargs="+", type=int, help="n of the n x n matrices")
    parser.add_argument("--counts", nargs="+", type=int, help="numbers of matrices")
    parser.add_argument("--side", type=int, help="side of the matrices that are counted")
    parser.add_argument("--periods", type=int, default=1, help="refresh periods per point")
    parser.add_argument(
        "--precision", choices=("highest", "high", "medium"), default="highest", help="of products"
    )


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The least-squares slope of log y over log x, that is p of y = c x^p.

    Args:
        xs: at least two different positive numbers.
        ys: as many positive numbers.
    """
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


def crossings(
    xs: Sequence[float], first: Sequence[float], second: Sequence[float]
) -> list[tuple[float, bool]]:
    """Where one curve passes through another, between points on straight log-log lines.

    Args:
        xs: ascending.
        first: positive values at xs.
        second: positive values at xs.

    Returns:
        The places, and whether the first curve is the lower one after each.
    """
    found = []
    gaps = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    for (x0, gap0), (x1, gap1) in pairwise(zip(xs, gaps, strict=True)):
        if gap0 * gap1 < 0:
            share = gap0 / (gap0 - gap1)
            found.append((x0 * (x1 / x0) ** share, gap1 < 0))
    return found


def make_workloads(options: argparse.Namespace) -> list[tuple[str, int, Workload]]:
    """The points of both sweeps: which, where, what."""
    sides = sorted(set(options.sides or SIDES[options.size]))
    numbers = sorted(set(options.counts or COUNTS[options.size]))
    side = options.side or (8 if options.size == "tiny" else 256)
    for name, value in (("sides", sides[0]), ("counts", numbers[0]), ("side", side)):
        if value < 1:
            raise BenchError(f"--{name}: expected positive integers, got {value}")
    if options.periods < 1:
        raise BenchError(f"--periods: expected a positive integer, got {options.periods}")

    def workload(n: int, count: int) -> Workload:
        limit = max(n, MAX_PRECOND_DIM)
        return Workload(f"{count} of {n}x{n}", "", ((n, n),) * count, limit, options.periods)

    points = [("n", n, workload(n, 1)) for n in sides]
    return points + [("matrices", count, workload(side, count)) for count in numbers]


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the subcommand; points are in the report as soon as they are measured."""
    points = make_workloads(options)
    names = installed(options.optimizers, report.note)
    peaks = measure_peaks(options.device, [options.precision], tiny=options.size == "tiny")
    rates = peaks.flops[options.precision], peaks.bandwidth
    num_steps = options.periods * PRECONDITION_FREQUENCY
    num_rounds = NUM_WARMUP_STEPS + num_steps
    report.settings |= {"precision": options.precision, "period": PRECONDITION_FREQUENCY}

    print(f"\nPlan: {', '.join(names)}; {num_rounds} steps each at every point")
    expected = 0.0
    affordable = []
    for sweep, place, workload in points:
        needed = sum(expected_bytes(name, workload) for name in names)
        if needed > available_bytes(options.device):
            report.note(f"- {workload.name}: left out, it needs {needed / 2**30:.1f} GiB of memory")
            continue
        affordable.append((sweep, place, workload))
        expected += sum(expected_seconds(name, workload, num_rounds, *rates) for name in names)
    print("- points: " + ", ".join(workload.name for _, _, workload in affordable))
    print(f"In all about {expected / 60:.1f} min. Ctrl-C prints what is there.", flush=True)

    try:
        with (
            matmul_precision(options.precision),
            tqdm(
                total=len(affordable) * (len(names) + num_steps), disable=None, leave=False
            ) as progress,
        ):
            for sweep, place, workload in affordable:
                progress.set_description(workload.name)
                set_run = SetRun(workload, names, options.device)
                set_run.run(num_steps, progress.update)
                report.records += [
                    {"sweep": sweep, "at": place, **record} for record in set_run.records()
                ]
                del set_run  # the next point needs the memory
                gc.collect()
    finally:
        for sweep in SWEEPS:
            print_sweep(sweep, [r for r in report.records if r["sweep"] == sweep], report)


def curves(records: Sequence[Record]) -> dict[str, tuple[list[int], list[float]]]:
    """Places and mean seconds per step of each optimizer, in one sweep."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        xs, ys = found.setdefault(record["optimizer"], ([], []))
        xs.append(record["at"])
        ys.append(record["mean"])
    return found


def print_sweep(sweep: str, records: list[Record], report: Report) -> None:
    """Print the table of one sweep, the exponents and the crossings; keep both in the report."""
    print(f"\n### Mean ms per step against {sweep}: {SWEEPS[sweep]}\n")
    found = curves(records)
    xs = next(iter(found.values()))[0] if found else []
    exponents = {
        name: fitted_exponent(xs[-NUM_FITTED:], ys[-NUM_FITTED:])
        for name, (xs, ys) in found.items()
        if len(xs) > 1
    }
    rows: list[Record] = [
        {"name": name, "exponent": exponents.get(name)}
        | {f"{sweep} = {x}": f"{1e3 * y:.3f}" for x, y in zip(xs, ys, strict=True)}
        for name, (xs, ys) in found.items()
    ]
    columns: dict[str, Callable[[Record], str]] = {"optimizer": itemgetter("name")}
    columns |= {name: itemgetter(name) for name in (f"{sweep} = {x}" for x in xs)}
    if exponents:
        columns["exponent"] = lambda row: f"{row['exponent']:.2f}"
    print_table(columns, rows)

    crossed = []
    for first, second in combinations(found, 2):
        for place, first_wins in crossings(xs, found[first][1], found[second][1]):
            winner, loser = (first, second) if first_wins else (second, first)
            crossed.append({"at": place, "cheaper_beyond": winner, "dearer_beyond": loser})
            print(f"- from {sweep} = {place:.0f} on {winner} is cheaper than {loser}")
    if xs and not crossed:
        print("- no curve crosses another")
    report.settings[f"against {sweep}"] = {"exponents": exponents, "crossings": crossed}
