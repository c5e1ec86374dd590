"""Builds the project's kernels for the host executor, with its checks, and runs them.

    python tests/simt/build.py [--modes release asan tsan] [--seeds N] [--quick]

Each mode is a build of its own in build/simt/<mode>/: release for values and schedules, asan
(AddressSanitizer and UndefinedBehaviorSanitizer) for bounds and alignment, tsan (ThreadSanitizer)
for missing barriers. Only what changed is compiled again. --quick: all checks in the release build,
and those that meet every kernel once in the asan build.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
OUT = ROOT / "build" / "simt"
NUM_JOBS = 2

COMPILER = os.environ.get("CXX", "g++")
HOST_FLAGS = [
    *("-std=c++20", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]
if platform.machine() in ("x86_64", "AMD64"):
    HOST_FLAGS.append("-march=x86-64-v3")
KERNEL_FLAGS = ["-x", "c++", *HOST_FLAGS, "-include", str(SIMT / "cuda_on_host.h")]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{SIMT}"]

MODES = {
    "release": ["-O2"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}

CUDA = ROOT / "csrc" / "cuda"
HOST_FOLDERS = ("library", "plan")  # plain C++: nothing gives it CUDA's names
CUDA_SOURCES = sorted(
    [*CUDA.glob("kernels/*.cu"), *(s for f in HOST_FOLDERS for s in CUDA.glob(f"{f}/*.cpp"))]
)
CHECK_SOURCES = sorted(SIMT.glob("check_*.cpp"))
PROGRAMS = {
    "check_kernels": [*CUDA_SOURCES, SIMT / "cublas_on_host.cpp", *CHECK_SOURCES],
    "test_executor": [SIMT / "test_executor.cpp"],
}

# Under the sanitizers fewer schedules are run: what they look for hardly hangs on the schedule.
NUM_SEEDS = {"release": 3, "asan": 0, "tsan": 0}
QUICK_CHECKS = [
    *("gemm highest medium", "epilogue", "adam", "apply", "step ksl", "skinny step"),
    "library step orthogonalize",
]


@dataclass
class Object:
    """One source file in one mode."""

    source: Path
    mode: str
    folder: Path
    includes: Sequence[str] = tuple(INCLUDES)
    flags: Sequence[str] | None = None  # None: as the source's place asks

    @property
    def path(self) -> Path:
        return self.folder / f"{self.source.name}.o"

    def command(self) -> list[str]:
        is_plain = self.source.parent.name in HOST_FOLDERS
        flags = self.flags or (HOST_FLAGS if is_plain else KERNEL_FLAGS)
        flags = [*flags, *MODES[self.mode], *self.includes, "-MMD", "-c"]
        return [COMPILER, *flags, str(self.source), "-o", str(self.path)]

    def dependencies(self) -> list[Path]:
        """The files that the object was made from; empty if it was not."""
        rule = self.path.with_suffix(".d")
        if not (self.path.exists() and rule.exists()):
            return []
        words = rule.read_text().replace("\\\n", " ").split()[1:]
        return [Path(word) for word in words]

    def is_up_to_date(self) -> bool:
        dependencies = self.dependencies()
        if not dependencies or self.stamp.read_text() != " ".join(self.command()):
            return False
        made = self.path.stat().st_mtime
        return all(path.exists() and path.stat().st_mtime <= made for path in dependencies)

    @property
    def stamp(self) -> Path:
        """Holds the command, which is a dependency as well; written when it succeeded."""
        return self.path.with_suffix(".cmd")

    def compile(self, quiet: bool = False) -> str:
        """Returns what the compiler said if it failed; shows warnings unless `quiet`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text("")
        done = subprocess.run(self.command(), capture_output=True, text=True)
        if done.returncode != 0:
            self.path.unlink(missing_ok=True)
            return done.stderr
        if not quiet:
            sys.stderr.write(done.stderr)
        self.stamp.write_text(" ".join(self.command()))
        return ""


def build(mode: str, program: str) -> Path:
    """Compiles and links what is not up to date; exits on an error."""
    objects = [Object(source, mode, OUT / mode) for source in PROGRAMS[program]]
    binary = OUT / mode / program
    make(objects, binary, MODES[mode])
    return binary


def make(objects: Sequence[Object], binary: Path, link_flags: Sequence[str]) -> None:
    """Compiles and links what is not up to date; exits on an error."""
    old = [obj for obj in objects if not obj.is_up_to_date()]
    # The slowest first.
    old.sort(key=lambda obj: not obj.source.name.startswith("gemm_"))
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        for obj, errors in zip(old, pool.map(Object.compile, old), strict=True):
            if errors:
                sys.exit(f"{obj.source}: does not compile ({obj.mode})\n{errors}")
    # Another program may have compiled some of the objects.
    newest = max(obj.path.stat().st_mtime for obj in objects)
    if not binary.exists() or binary.stat().st_mtime < newest:
        link([obj.path for obj in objects], binary, link_flags)


def link(paths: Sequence[Path], binary: Path, link_flags: Sequence[str]) -> None:
    """Exits on an error."""
    binary.unlink(missing_ok=True)  # a process may have it mapped
    command = [COMPILER, "-pthread", *map(str, paths), *link_flags, "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{binary}: does not link\n{done.stderr}")


def run(binary: Path, arguments: Sequence[str]) -> int:
    """Runs a program and shows its output where something went wrong."""
    start = time.monotonic()
    done = subprocess.run(
        [str(binary), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **SANITIZER_OPTIONS},
    )
    lines = done.stdout.splitlines()
    num_right = sum(line.startswith("ok ") for line in lines)
    state = "ok" if done.returncode == 0 else f"FAILED (exit code {done.returncode})"
    seconds = time.monotonic() - start
    print(f"{binary.relative_to(OUT)}: {state}, {num_right} checks, {seconds:.0f} s", flush=True)
    if done.returncode != 0:
        print("\n".join(line for line in lines if not line.startswith("ok ")))
    return done.returncode


def arguments_of(program: str, mode: str, num_seeds: int | None, quick: bool) -> list[str]:
    if program == "test_executor":
        return []
    arguments = [str(NUM_SEEDS[mode] if num_seeds is None else num_seeds)]
    if quick and mode != "release":
        for prefix in QUICK_CHECKS:
            arguments += ["--only", prefix]
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=None)
    parser.add_argument("--seeds", type=int, help="shuffled schedules of each check")
    parser.add_argument("--quick", action="store_true", help="release, and a part of asan")
    options = parser.parse_args()
    modes = options.modes or (["release", "asan"] if options.quick else list(MODES))
    failed = 0
    for mode in modes:
        for program in PROGRAMS:
            start = time.monotonic()
            binary = build(mode, program)
            print(f"{mode}/{program}: built in {time.monotonic() - start:.0f} s", flush=True)
            arguments = arguments_of(program, mode, options.seeds, options.quick)
            failed += run(binary, arguments) != 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
