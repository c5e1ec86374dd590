"""The machine: its description, the peak rates that a run is held against, its free memory."""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.timing import seconds

PACKAGES = ("dykaf", "heavyball", "pytorch-optimizer")
SMALL_MACHINE_CORES = 16  # below this a CPU gets the small shape sets by default


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def blas() -> str:
    """The BLAS of this torch, with its version where torch tells it."""
    config = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)", config)
    if mkl:
        return f"MKL {mkl.group(1)}"
    name = re.search(r"BLAS_INFO=(\w+)", config)
    return name.group(1) if name else "unknown"


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str) -> dict[str, str | int | float]:
    """CPU, GPU, threads, load and versions, for the head of a report."""
    head: dict[str, str | int | float] = {"cpu": cpu_model()}
    if device == "cuda":
        head["gpu"] = torch.cuda.get_device_name()
    return head | {
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "blas": blas(),
        **{package: version(package) for package in PACKAGES},
    }


def default_size(device: str) -> str:
    """One of bench.shapes.SIZES that suits the machine."""
    return "small" if device == "cpu" and (os.cpu_count() or 1) < SMALL_MACHINE_CORES else "full"


def available_bytes(device: str) -> int:
    """Memory that can still be allocated on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's float32 matmul precision for a while."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@dataclass(frozen=True)
class Peaks:
    """The fastest rates that plain torch reached in this run."""

    flops: dict[str, float]  # flop/s of a large float32 product, by matmul precision
    bandwidth: float  # bytes/s of a large copy, read and write counted


def measure_peaks(device: str, precisions: Sequence[str], *, tiny: bool = False) -> Peaks:
    """Time a square product and a copy, the fastest of five.

    Args:
        device: "cpu" or "cuda".
        precisions: of torch.set_float32_matmul_precision.
        tiny: small operands, for tests; the rates mean nothing then.
    """
    side = 64 if tiny else 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device)
    flops = {}
    for precision in precisions:
        with matmul_precision(precision):
            torch.mm(a, a)
            best = min(seconds(lambda: torch.mm(a, a), device) for _ in range(5))
        flops[precision] = 2 * side**3 / best
    source = torch.zeros(1 << (12 if tiny else 26), device=device)
    target = torch.ones_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return Peaks(flops, 2 * source.numel() * source.element_size() / best)
