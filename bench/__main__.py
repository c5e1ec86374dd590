"""The command line: python -m bench {ops,step,scale,distributed,host,memory,peaks,evidence}."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from bench.machine import default_size, machine
from bench.report import INSTALL, BenchError, Report
from bench.shapes import SHAPE_SETS, SIZES

COMMANDS = {
    "ops": "every operation against plain torch and the machine's peaks",
    "step": "whole optimizer steps, the optimizers in turns",
    "scale": "cost against size and number of matrices",
    "distributed": "steps of sharded parameters on several processes, and what they exchange",
    "host": "the host's time of a step, by the number of parameters",
    "memory": "bytes of state per parameter, by mode and model",
    "peaks": "the rates that plain torch reaches: products by precision, a copy",
}
EVIDENCE = "python -m bench evidence: training runs against other optimizers, and their report."


def make_parser(selected: str | None) -> argparse.ArgumentParser:
    """The parser; only the selected command imports what it needs and has all its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of dykaf.", epilog=EVIDENCE
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument(
            "--size", choices=SIZES, help="default: small on a CPU with few cores, else full"
        )
        command.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
        command.add_argument("--json", type=Path, metavar="FILE", help="all numbers, single times")
        command.add_argument("--csv", type=Path, metavar="FILE", help="one line per row")
        if name in ("step", "scale"):
            command.add_argument("--png", type=Path, metavar="FILE", help="a picture")
        if name not in ("scale", "peaks", "host"):
            command.add_argument(
                "--sets", nargs="+", choices=SHAPE_SETS, default=list(SHAPE_SETS), metavar="SET"
            )
        if name == selected:
            importlib.import_module(f"bench.{name}").add_arguments(command)
    return parser


def check_outputs(options: argparse.Namespace) -> None:
    """A file that cannot be written is noticed before the run, not after it."""
    for name in ("json", "csv", "png"):
        path: Path | None = getattr(options, name, None)
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise BenchError(f"--{name}: cannot write into {path.parent}")


def write(options: argparse.Namespace, report: Report) -> None:
    """Write the files that were asked for."""
    if options.json is not None:
        report.write_json(options.json)
    if options.csv is not None:
        report.write_csv(options.csv)


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0; 2 if it cannot run; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["evidence"]:  # a command line of its own
        return importlib.import_module("bench.evidence.command").main(arguments[1:])
    try:
        parser = make_parser(arguments[0] if arguments else None)
    except ImportError as error:
        print(f"python -m bench: {error}; {INSTALL} installs what it needs", file=sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected a positive integer, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.size = options.size or default_size(options.device)
    command = "python -m bench " + " ".join(arguments)
    report = Report(command, machine(options.device), {"size": options.size})
    try:
        check_outputs(options)
        print(report.machine_line(), flush=True)
        importlib.import_module(f"bench.{options.command}").run(options, report)
    except KeyboardInterrupt:
        report.interrupted = True
        print("\nInterrupted: what is above is what there is; rows marked (cut) are not whole.")
    except BenchError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except Exception:  # out of memory, for one; what was measured before it is kept
        report.interrupted = True
        write(options, report)
        raise
    write(options, report)
    if getattr(options, "png", None) is not None and report.records:
        importlib.import_module("bench.plots").DRAW[options.command](report.records, options.png)
    return 130 if report.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
