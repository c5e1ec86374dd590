"""Run a grid of trainings and tabulate it: a learning-rate sweep, or one rate with many seeds.

    python examples/sweep.py --optimizers adamw dykaf muon --lrs 1e-3 2e-3 4e-3 8e-3 1.6e-2 --jobs 2

Each run is a process of its own (train_gpt.py). Its result is appended to OUT/results.jsonl as it
comes, and a second call skips what is there. Options that sweep.py does not know go to
train_gpt.py as they are (--steps, --dim, ...).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plot import draw_folder
from settings import OPTIMIZERS, OneLineParser, UserError, parse

TRAIN = Path(__file__).resolve().parent / "train_gpt.py"
DIVERGED = 3  # exit code of train_gpt.py
# Options of train_gpt.py that the grid sets itself.
GRID_OPTIONS = frozenset({"--optimizer", "--lr", "--seed", "--precondition-frequency", "--resume"})
Record = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The command line of sweep.py."""
    parser = OneLineParser(prog="sweep.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "dykaf", "muon"])
    add("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    add("--seeds", nargs="+", type=int, default=[0])
    add(
        "--precondition-frequencies",
        nargs="+",
        type=int,
        default=[10],
        help="refresh periods, for dykaf alone (default: 10)",
    )
    add("--jobs", type=int, default=1, help="runs at a time; more than 1: one thread each")
    add("--out", type=Path, default=Path("runs/sweep"))
    return parser


def list_runs(options: argparse.Namespace, rest: list[str]) -> list[list[str]]:
    """Arguments of train_gpt.py for each run of the grid, checked; they are the run's identity."""
    for option in rest:
        if option.split("=")[0] in GRID_OPTIONS:
            raise UserError(f"{option} belongs to train_gpt.py; see sweep.py --help for the grid")
    runs = []
    for seed, name, lr in itertools.product(options.seeds, options.optimizers, options.lrs):
        periods = options.precondition_frequencies if name == "dykaf" else [None]
        for period in periods:
            args = ["--optimizer", name, "--lr", f"{lr:g}", "--seed", str(seed), *rest]
            if period is not None:
                args += ["--precondition-frequency", str(period)]
            parse(args)
            if args not in runs:
                runs.append(args)
    return runs


def read_records(path: Path) -> list[Record]:
    """The records of a JSONL file; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"note: left out a damaged line of {path}", file=sys.stderr)
    return records


def append_record(path: Path, record: Record) -> None:
    """Append one line and make it durable."""
    is_torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if is_torn else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_record(args: list[str], out: Path, exit_code: int) -> Record:
    """Read what a run left behind; a diverged run has no loss."""
    settings, _ = parse(args)
    record: Record = {
        "args": args,
        "optimizer": settings.optimizer,
        "lr": settings.lr,
        "seed": settings.seed,
        "precondition_frequency": settings.precondition_frequency,
        "val_loss": None,
    }
    if exit_code != DIVERGED:
        run = json.loads((out / f"{settings.run_name}.json").read_text())
        for key in (
            "val_loss",
            "train_seconds",
            "optimizer_share",
            "tokens_per_second",
            "num_parameters",
            "versions",
            "machine",
        ):
            record[key] = run[key]
        record["corpus_sha256"] = run["corpus"]["sha256"]
    return record


def run_all(runs: list[list[str]], out: Path, jobs: int, results: Path) -> int:
    """Run what is to be run, a few at a time.

    Args:
        runs: arguments of each run.
        out: folder of the runs.
        jobs: processes at a time.
        results: JSONL file to append to.

    Returns:
        Number of runs that failed. Their reason is on stderr; a second call tries them again.
    """
    waiting = list(runs)
    running: list[tuple[subprocess.Popen[str], list[str]]] = []
    num_failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                args = waiting.pop(0)
                threads = ["--threads", "1"] if jobs > 1 else []
                command = [sys.executable, str(TRAIN), *threads, *args, "--out", str(out)]
                running.append(
                    (
                        subprocess.Popen(
                            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                        ),
                        args,
                    )
                )
            time.sleep(0.2)
            for process, args in [job for job in running if job[0].poll() is not None]:
                running.remove((process, args))
                message = process.stderr.read() if process.stderr else ""
                if process.returncode in (0, DIVERGED):
                    record = make_record(args, out, process.returncode)
                    append_record(results, record)
                    loss = record["val_loss"]
                    print(
                        f"{' '.join(args)}: {'diverged' if loss is None else f'{loss:.4f}'}",
                        flush=True,
                    )
                else:
                    num_failed += 1
                    reason = (message.strip().splitlines() or ["no message"])[-1]
                    print(
                        f"{' '.join(args)}: failed ({process.returncode}): {reason}",
                        file=sys.stderr,
                    )
    except KeyboardInterrupt:
        for process, _ in running:  # they got the signal too, and finish their step
            process.wait()
        raise
    return num_failed


def table(records: Sequence[Record]) -> str:
    """Markdown table: mean and deviation over seeds; the best rate of each optimizer is bold."""
    cells: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        name = record["optimizer"]
        if name == "dykaf":
            name += f", every {record['precondition_frequency']}"
        cells[name, record["lr"]].append(record)
    means: dict[tuple[str, float], float] = {}
    for key, group in cells.items():
        losses = [record["val_loss"] for record in group]
        means[key] = float("inf") if None in losses else statistics.fmean(losses)
    lines = [
        "| optimizer | lr | seeds | val loss (nats/byte) | sd | training s | optimizer share "
        "| tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, lr in sorted(cells):
        group, mean = cells[name, lr], means[name, lr]
        if mean == float("inf"):
            lines.append(f"| {name} | {lr:g} | {len(group)} | diverged | | | | |")
            continue
        loss = f"{mean:.4f}"
        if mean == min(value for (other, _), value in means.items() if other == name):
            loss = f"**{loss}** (best)"
        losses = [record["val_loss"] for record in group]
        sd = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        seconds, share, speed = (
            statistics.fmean(record[key] for record in group)
            for key in ("train_seconds", "optimizer_share", "tokens_per_second")
        )
        lines.append(
            f"| {name} | {lr:g} | {len(group)} | {loss} | {sd} | {seconds:.1f} "
            f"| {share:.1%} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        if options.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {options.jobs}")
        runs = list_runs(options, rest)
        options.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    results = options.out / "results.jsonl"
    done = [record["args"] for record in read_records(results)]
    todo = [args for args in runs if args not in done]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before", flush=True)
    try:
        num_failed = run_all(todo, options.out, options.jobs, results)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    print(table([record for record in read_records(results) if record["args"] in runs]))
    print(f"\npicture: {draw_folder(options.out)}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
