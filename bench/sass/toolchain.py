"""Compiles the kernels and takes them apart: nvcc, ptxas's report, nvdisasm."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FLAGS = [
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage",
    "-cubin",
]
NUM_JOBS = 2
DISASSEMBLER = "nvidia-cuda-nvdisasm==13.2.78"  # reads what nvcc 13.0 writes


class ToolError(Exception):
    """A tool is missing, or a compilation failed or warned."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel."""

    registers: int
    shared_bytes: int  # static
    stack_bytes: int
    spill_bytes: int

    @property
    def defects(self) -> list[str]:
        found = {"stack frame": self.stack_bytes, "spills": self.spill_bytes}
        return [f"{name} of {size} bytes" for name, size in found.items() if size]


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return Path(found) if found else None


def find_nvdisasm() -> Path | None:
    """Looks beside nvcc, on PATH, and in the packages of the running Python."""
    nvcc = find_nvcc()
    places = [nvcc.resolve().parent / "nvdisasm"] if nvcc else []
    places += [Path(p) / "nvidia/cu13/bin/nvdisasm" for p in sys.path]
    on_path = shutil.which("nvdisasm")
    if on_path:
        places.append(Path(on_path))
    return next((p for p in places if os.access(p, os.X_OK)), None)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def parse_report(text: str) -> dict[str, Resources]:
    """Reads what `ptxas -v` prints of each kernel."""
    found = {}
    for part in text.split("Compiling entry function ")[1:]:

        def number(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        name = part.split("'")[1]
        found[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            shared_bytes=number(r"(\d+) bytes smem"),
            stack_bytes=number(r"(\d+) bytes stack frame") + number(r"(\d+) bytes lmem"),
            spill_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        )
    return found


@dataclass(frozen=True)
class Unit:
    """One source compiled for one architecture."""

    source: str
    arch: int
    resources: dict[str, Resources]
    listing: str


def compile_unit(csrc: Path, source: Path, arch: int, out: Path) -> Unit:
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        raise ToolError("nvcc is not on PATH and not in CUDA_HOME/bin")
    if nvdisasm is None:
        raise ToolError(f"nvdisasm not found: pip install {DISASSEMBLER}")
    cubin = out / f"{source.stem}.sm_{arch}.cubin"
    includes = [f"-I{csrc}", f"-I{csrc / 'include'}"]
    report = run([str(nvcc), *FLAGS, *includes, f"-arch=sm_{arch}", "-o", str(cubin), str(source)])
    # ptxas's own warnings are not errors to nvcc.
    if warnings := [line for line in report.splitlines() if "warning" in line.lower()]:
        raise ToolError(f"{source.name}, sm_{arch}:\n" + "\n".join(warnings))
    listing = run([str(nvdisasm), "-c", str(cubin)])
    return Unit(source.name, arch, parse_report(report), listing)


def compile_all(csrc: Path, archs: list[int], out: Path) -> list[Unit]:
    """Compiles every source for every architecture, NUM_JOBS at a time."""
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted((csrc / "cuda" / "kernels").glob("*.cu"))
    tasks = [(csrc, source, arch, out) for arch in archs for source in sources]
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        return list(pool.map(lambda task: compile_unit(*task), tasks))
