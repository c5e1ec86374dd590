"""python -m bench.evidence [run] [--task ...] [--quick]; python -m bench.evidence report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.evidence import DOCS, OUT, EvidenceError
from bench.evidence.grid import GRID_FILE, MODULES, load_grid, make_plan

DESCRIPTION = """Train DyKAF and other optimizers on real data, each with the same grid of learning
rates and warm-ups, and compare them in pairs. Results are appended to runs/evidence/ as they come;
the same command goes on with what is missing."""

# Quick results show that the suite works, no more.
DEFAULT_REPORT_SIZES = ("full", "time", "parts", "long", "batch*", "width*")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=DESCRIPTION)
    add = parser.add_argument
    add("action", nargs="?", choices=("run", "plan", "report"), default="run")
    add("--task", nargs="+", choices=list(MODULES), default=list(MODULES), help="default: all")
    add("--size", default=None, help="full (default), quick, or another that the grid has")
    add("--quick", action="store_true", help="the same as --size quick")
    add("--contenders", nargs="+", default=None, help="only these, in this order")
    add("--jobs", type=int, default=None, help="processes of one thread; default: all cores")
    add("--extend", action="store_true", help="take what --docs has records of for done")
    add("--grid", type=Path, default=GRID_FILE)
    add("--out", type=Path, default=OUT, help="folder of the results")
    add("--docs", type=Path, default=DOCS, help="folder of the report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 runs failed, 2 bad use, 130 stopped."""
    options = build_parser().parse_args(argv)
    try:
        if options.jobs is not None and options.jobs < 1:
            raise EvidenceError(f"--jobs must be at least 1, got {options.jobs}")
        if options.quick and options.size not in (None, "quick"):
            raise EvidenceError(f"--quick and --size {options.size} exclude each other")
        grid = load_grid(options.grid)
        size = options.size or ("quick" if options.quick else None)
        if options.action == "report":
            from bench.evidence.report import write_report  # late: it needs matplotlib

            sizes = DEFAULT_REPORT_SIZES if size is None else (size,)
            return write_report(options.out, options.docs, grid, options.task, sizes)
        from bench.evidence.runner import run_plans

        size = size or "full"
        plans = [make_plan(grid, task, size, options.contenders) for task in options.task]
        jobs = options.jobs or os.cpu_count() or 1
        docs = options.docs if options.extend else None
        return run_plans(plans, options.out, jobs, docs, only_show=options.action == "plan")
    except (EvidenceError, OSError) as error:
        print(f"bench.evidence: error: {error}", file=sys.stderr)
        return 2
