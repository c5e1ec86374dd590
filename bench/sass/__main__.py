"""Compiles the CUDA kernels and prints what their machine code says.

    python -m bench.sass                        # the tables, for all architectures
    python -m bench.sass --archs 80 90 --check  # against bench/sass/budgets.json
    python -m bench.sass --archs 80 90 --update # records new budgets
    python -m bench.sass --archs 80 90 --markdown docs/cuda.md

Fails on a warning, a spill, a stack frame, local memory, or a number outside its budget.
"""

import argparse
import sys
from pathlib import Path

from bench.sass import budgets, listing, report
from bench.sass.kernels import Kernel, analyse
from bench.sass.machines import MACHINES
from bench.sass.toolchain import ToolError, Unit, compile_all

ROOT = Path(__file__).resolve().parents[2]


def kernels_of(unit: Unit) -> list[Kernel]:
    functions = listing.parse(unit.listing)
    return [analyse(functions[n], r, unit.arch) for n, r in unit.resources.items()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--archs", type=int, nargs="+", default=list(MACHINES), choices=list(MACHINES)
    )
    parser.add_argument("--check", action="store_true", help="compare with the budgets")
    parser.add_argument("--update", action="store_true", help="record the budgets anew")
    parser.add_argument("--markdown", type=Path, help="put the tables between the file's markers")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="sources to compile")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sass", help="for cubins")
    arguments = parser.parse_args()
    if (arguments.check or arguments.update) and not set(budgets.ARCHS) <= set(arguments.archs):
        parser.error(f"--check and --update need --archs {' '.join(map(str, budgets.ARCHS))}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    try:
        units = compile_all(arguments.csrc, arguments.archs, arguments.out)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    kernels = [kernel for unit in units for kernel in kernels_of(unit)]
    text = report.tables(kernels)
    if arguments.markdown:
        report.put_between_markers(arguments.markdown, report.BEGIN, report.END, text)
    else:
        print(text)
    if arguments.update:
        budgets.write(budgets.make(kernels))
    problems = report.defects(kernels)
    if arguments.check:
        problems += budgets.excesses(kernels, budgets.read())
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
