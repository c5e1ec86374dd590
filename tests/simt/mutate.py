"""Puts one fault at a time into the kernels; the checks must notice every one.

    python tests/simt/mutate.py [--only N...] [--every N] [--list] [--markdown docs/mutation.md]

mutants/ lists the faults. For each of them the files that contain it are compiled, the other
objects are those of build.py, and the checks run in the release build, then with the address
sanitizer, then with the thread sanitizer, until one fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import build
from mutants import MUTANTS, Mutant

NUM_JOBS = 2
OUT = build.OUT / "mutants"
NUM_SEEDS = {"release": 6, "asan": 0, "tsan": 0}
TIMEOUT = 240
BUILDING = Lock()
MODE_NAMES = {"release": "release", "asan": "address sanitizer", "tsan": "thread sanitizer"}


@dataclass
class Result:
    """Where a mutant was noticed and by what; an empty mode: nowhere."""

    mutant: Mutant
    mode: str = ""
    why: str = ""
    seconds: float = 0


def mutated_text(mutant: Mutant) -> str:
    text = (build.CUDA / mutant.file).read_text()
    num_found = text.count(mutant.old)
    if num_found != 1:
        sys.exit(
            f"{mutant.name}: expected its text once in {mutant.file}, found it {num_found} times"
        )
    return text.replace(mutant.old, mutant.new)


def gemm_source(mutant: Mutant) -> str:
    """launch_gemm_* with the kernels that the mutant's checks need, and no others."""
    lines = ['#include "cuda/kernels/gemm.cuh"', "namespace dykaf::cuda {"]
    for precision in ("Highest", "High", "Medium"):
        lines.append(
            f"int launch_gemm_{precision.lower()}(GemmForm form, TileClass tile_class, "
            "const GemmLaunch& launch, Stream stream) {"
        )
        for tile in mutant.tiles if precision == mutant.precision else ():
            lines.append(
                f"if (tile_class == TileClass::k{tile}) return launch_gemm_tile<{tile}Tile, "
                f"MatmulPrecision::k{precision}>(form, launch, stream);"
            )
        lines.append("(void)form, (void)tile_class, (void)launch, (void)stream;")
        lines.append("return static_cast<int>(cudaErrorNotSupported); }")
    return "\n".join([*lines, "}"])


def objects_of(mutant: Mutant, folder: Path, mode: str) -> tuple[list[build.Object], list[Path]]:
    """The objects to compile, and those of the normal build."""
    mutated = folder / "source" / "cuda" / mutant.file
    includes = (f"-I{folder / 'source'}", *build.INCLUDES)
    new: list[build.Object] = []
    old: list[Path] = []
    with_slim_gemm = False
    for source in build.PROGRAMS["check_kernels"]:
        base = build.Object(source, mode, build.OUT / mode)
        is_affected = build.CUDA / mutant.file in base.dependencies()
        is_gemm = re.fullmatch(r"gemm_(highest|high|medium)\.cu", source.name) is not None
        if not is_affected:
            old.append(base.path)
        elif is_gemm:
            with_slim_gemm = True
        else:
            actual = mutated if source == build.CUDA / mutant.file else source
            new.append(build.Object(actual, mode, folder / mode, includes))
    if with_slim_gemm:
        slim = folder / "source" / "slim_gemm.cu"
        slim.write_text(gemm_source(mutant))
        new.append(build.Object(slim, mode, folder / mode, includes))
    return new, old


def diagnosis(output: str, returncode: int) -> str:
    """What the failed program said, in a line."""
    for pattern in (r"^FAILED  (.*)", r"runtime error: (.*)", r"SUMMARY: \w+: (.*)"):
        found = re.search(pattern, output, re.MULTILINE)
        if found:
            text = re.sub(r"\(\S+\+0x\w+\) |/\S*/", "", found.group(1))
            return re.sub(r"\s+", " ", text)[:120]
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


def test_mode(mutant: Mutant, folder: Path, mode: str) -> str:
    """Builds and runs the checks in one mode; says what failed."""
    with BUILDING:  # what is up to date costs nothing
        build.build(mode, "check_kernels")
    new, old = objects_of(mutant, folder, mode)
    for obj in new:
        errors = obj.compile(quiet=True)
        if errors:
            sys.exit(f"{mutant.name}: does not compile\n{errors}")
    binary = folder / mode / "check_kernels"
    build.link([*(obj.path for obj in new), *old], binary, build.MODES[mode])
    command = [str(binary), str(NUM_SEEDS[mode]), "--stop"]
    for prefix in mutant.checks:
        command += ["--only", prefix]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **build.SANITIZER_OPTIONS},
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return "no end"
    finally:
        binary.unlink(missing_ok=True)
    return "" if done.returncode == 0 else diagnosis(done.stdout, done.returncode)


def test_mutant(number: int) -> Result:
    mutant = MUTANTS[number]
    start = time.monotonic()
    folder = OUT / str(number)
    target = folder / "source" / "cuda" / mutant.file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(mutated_text(mutant))
    result = Result(mutant)
    for mode in build.MODES:
        why = test_mode(mutant, folder, mode)
        if why:
            result = Result(mutant, mode, why)
            break
    result.seconds = time.monotonic() - start
    return result


def markdown(results: list[Result]) -> str:
    lines = [
        "# Faults that the kernel checks notice",
        "",
        "Each row is a fault that was put into the CUDA kernels, alone, and the build of the host",
        "executor whose checks noticed it first, in the order release, address sanitizer (with the",
        "undefined-behaviour sanitizer), thread sanitizer. None goes unnoticed. Made by",
        "",
        "    python tests/simt/mutate.py --markdown docs/mutation.md",
        "",
        "| fault | file | noticed in | by |",
        "|---|---|---|---|",
    ]
    for result in results:
        # Without the numbers, some of which are what happens to lie in memory.
        why = result.why.split(": expected")[0].replace("|", "\\|")
        mode = MODE_NAMES.get(result.mode, "**not noticed**")
        lines.append(f"| {result.mutant.name} | `{result.mutant.file}` | {mode} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N of them")
    parser.add_argument("--list", action="store_true", help="show the numbers and stop")
    parser.add_argument("--markdown", type=Path, help="write a table of the results")
    options = parser.parse_args()
    for mutant in MUTANTS:
        mutated_text(mutant)
    numbers = options.only or list(range(0, len(MUTANTS), options.every))
    if options.list:
        for number in numbers:
            print(f"{number:4d}  {MUTANTS[number].file}: {MUTANTS[number].name}")
        return
    results = []
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        for number, result in zip(numbers, pool.map(test_mutant, numbers), strict=True):
            results.append(result)
            state = f"{result.mode}: {result.why}" if result.mode else "NOT NOTICED"
            print(f"{number:4d}  {result.mutant.file}: {result.mutant.name}", flush=True)
            print(f"        {state}  ({result.seconds:.0f} s)", flush=True)
    num_missed = sum(not result.mode for result in results)
    print(f"{len(results) - num_missed} of {len(results)} noticed")
    if options.markdown:
        options.markdown.write_text(markdown(results))
    sys.exit(1 if num_missed else 0)


if __name__ == "__main__":
    main()
