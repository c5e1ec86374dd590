"""What two GPUs can do at best and what has been measured on them, each number with its source.

Data sheets, measurements that others published, assumptions, and the host's time, which was
measured on a CPU: nothing was measured with this package on a GPU. A rate is in useful flops (two
per multiply-add) per second.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

DATA_SHEET, MEASURED, ASSUMED = "data sheet", "published measurement", "assumption"
MEASURED_HERE = "measured on a CPU"
PRECISIONS = ("highest", "high", "medium")
FLOAT = 4  # bytes


class Figure(NamedTuple):
    """A number that is not counted here, in SI units."""

    value: float
    kind: str
    source: str


class Tile(NamedTuple):
    """A block of csrc/cuda/kernels/gemm_tile.cuh and the part of it that one of its warps owns."""

    name: str
    m: int
    n: int
    warp_m: int
    warp_n: int

    @property
    def l2_intensity(self) -> float:
        """Flops per byte of operands that a block asks of L2: float32, past L1 (cp.async.cg)."""
        return 2 * self.m * self.n / (FLOAT * (self.m + self.n))

    @property
    def shared_intensity(self) -> float:
        """Flops per byte through shared memory: stored once, read by each warp for its part."""
        warps = (self.m // self.warp_m) * (self.n // self.warp_n)
        moved = self.m + self.n + warps * (self.warp_m + self.warp_n)
        return 2 * self.m * self.n / (FLOAT * moved)


LARGE, MEDIUM = Tile("128x128", 128, 128, 64, 64), Tile("64x64", 64, 64, 32, 32)
WIDE, TALL = Tile("16x64", 16, 64, 16, 16), Tile("64x16", 64, 16, 16, 16)

NVIDIA = "NVIDIA data sheet, SXM, dense"
LUO = "Luo et al., arXiv 2402.13499 and 2501.12084: mma.sync reaches 62.9% of it, mean over types"
FA2 = (
    "FlashAttention-2, mma.sync, reaches 35% of an H100 (Shah et al., arXiv 2407.08608): 0.35 / "
    "0.629 of what the instruction can; taken for the products here"
)
BENCHES = "github.com/te42kyfo/gpu-benches"
L2_DOUBT = "the same die (the text there says 5.x TB/s of H100s; the larger one is taken)"
TORCH_H100 = "torch 2.7 on an H100 80GB HBM3, github.com/zzc0721/torch-performance-test-data #79"
TORCH_A100 = "torch 2.8 on an A100-PCIE-40GB, github.com/zzc0721/torch-performance-test-data #108"
CUTLASS = (
    "a TMA and wgmma kernel of CUTLASS at 85.5% of cuBLAS, FP16, H100 "
    "(github.com/waynehacking8/blackwell-tensorcore-kernels)"
)
EIGH = (
    "Wang et al., Extracting the Potential of Emerging Hardware Accelerators for Symmetric "
    "Eigenvalue Decomposition: less than 3% of an H100 is used"
)
QR = (
    "torch.linalg.qr, 16 x 16, H100: 60 us (github.com/pytorch/pytorch #173788), the least of a "
    "column in that list; 128 x 32: 189 us"
)
QR_LOOP = "github.com/pytorch/pytorch #143281: Q of a batch is formed matrix by matrix, 26 us each"
HOST = "python -m bench host, 500 parameters, the CUDA backend with its kernels stubbed"
CHOLESKY = "torch.cholesky by cuSOLVER, GPU not named (github.com/pytorch/pytorch #173515)"


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        clock: Hz, at boost.
        peaks: of the tensor cores by type of operand, and "float32" without them.
        mma_sync: the share of the tensor cores' peak that mma.sync can reach.
        reached: the share of what bounds a product here that a good kernel with mma.sync reaches.
        dram: bytes per second; copied: the share of it that a copy reaches.
        l2: bytes per second.
        library: square products of this size by cuBLAS through torch, by type of operand.
        wgmma: the share of cuBLAS that a hand-written kernel of that instruction reaches; None: it
            has none.
        memory: bytes.
    """

    name: str
    arch: int
    processors: int
    clock: float
    peaks: dict[str, Figure]
    mma_sync: Figure
    reached: Figure
    dram: Figure
    copied: Figure
    l2: Figure
    library: dict[str, tuple[tuple[int, float], ...]]
    library_source: str
    wgmma: Figure | None
    memory: float = 80e9

    @property
    def shared(self) -> float:
        """Bytes per second of all shared memories: 128 a cycle each (CUDA C++ Programming
        Guide)."""
        return 128 * self.processors * self.clock

    def product_rate(self, precision: str, tile: Tile) -> float:
        """The most that a product of csrc/cuda can reach: the least of three ceilings."""
        return min(self.ceilings(precision, tile).values())

    def ceilings(self, precision: str, tile: Tile) -> dict[str, float]:
        """By what sets them. "highest" runs three products on the same operands (and its warps own
        half as much of a large block, which does not bind)."""
        peak = self.peaks["bfloat16" if precision == "medium" else "TF32"].value
        passes = 3 if precision == "highest" else 1
        return {
            "mma.sync": self.mma_sync.value * peak / passes,
            "L2": self.l2.value * tile.l2_intensity,
            "shared memory": self.shared * tile.shared_intensity,
        }

    def library_rate(self, operands: str, m: float, n: float, k: float, count: float = 1) -> float:
        """Of `count` products of this size in one call.

        Between the published sizes on a log-log line by the cube root of all multiply-adds, which
        takes long and batched products as the square ones of equal work: an assumption.
        """
        size: float = (m * n * k * count) ** (1 / 3)
        table = self.library[operands]
        if size <= table[0][0]:  # falls with the work: a call has a least time
            return table[0][1] * math.pow(size / table[0][0], 2)
        for (low, low_rate), (high, high_rate) in itertools.pairwise(table):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return low_rate * math.pow(high_rate / low_rate, share)
        return table[-1][1]

    def qr_seconds(self, columns: int) -> float:
        """One Householder decomposition with Q: column after column. An H100's, for all."""
        return max(QR_MATRIX.value, QR_COLUMN.value * columns)

    def eigh_seconds(self, n: int) -> float:
        """At least: 9 n^3 flops at the most that was seen, and no less than a QR of that size."""
        rate = EIGH_SHARE.value * self.peaks["float32"].value
        return max(9.0 * n**3 / rate, self.qr_seconds(n))

    def cholesky_seconds(self, n: int) -> float:
        """Of one matrix, on a log-log line between the published sizes."""
        table = CHOLESKY_SECONDS
        for (low, low_time), (high, high_time) in itertools.pairwise(table):
            if n <= high or high == table[-1][0]:
                share = max(0.0, math.log(n / low) / math.log(high / low))
                return low_time * math.pow(high_time / low_time, share)
        raise AssertionError


def of(value: float, kind: str, source: str) -> Figure:
    return Figure(value, kind, source)


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="H100",
            arch=90,
            processors=132,
            clock=1.83e9,
            peaks={
                "TF32": of(494.7e12, DATA_SHEET, NVIDIA),
                "bfloat16": of(989.4e12, DATA_SHEET, NVIDIA),
                "float32": of(66.9e12, DATA_SHEET, NVIDIA),
            },
            mma_sync=of(0.629, MEASURED, LUO),
            reached=of(0.35 / 0.629, ASSUMED, FA2),
            dram=of(3.35e12, DATA_SHEET, NVIDIA),
            copied=of(1704 / 2039, MEASURED, f"gpu-stream of {BENCHES}: an H100 PCIe"),
            l2=of(9.7e12, MEASURED, f"gpu-l2-cache of {BENCHES}: an H200, {L2_DOUBT}"),
            library={
                "float32": ((1024, 37.39e12), (2048, 49.58e12), (4096, 51.88e12)),
                "TF32": ((1024, 119.6e12), (2048, 334.99e12), (4096, 402.15e12)),
                "bfloat16": ((1024, 176.62e12), (2048, 676.59e12), (4096, 788.72e12)),
            },
            library_source=TORCH_H100,
            wgmma=of(0.855, MEASURED, CUTLASS),
        ),
        Device(
            name="A100",
            arch=80,
            processors=108,
            clock=1.41e9,
            peaks={
                "TF32": of(156e12, DATA_SHEET, NVIDIA),
                "bfloat16": of(312e12, DATA_SHEET, NVIDIA),
                "float32": of(19.5e12, DATA_SHEET, NVIDIA),
            },
            mma_sync=of(1.0, ASSUMED, "no lower rate is known: the peak is that instruction's"),
            reached=of(108.32 / 156, ASSUMED, f"cuBLAS's own share of the peak ({TORCH_A100})"),
            dram=of(2.039e12, DATA_SHEET, NVIDIA),
            copied=of(1732 / 2039, MEASURED, f"gpu-stream of {BENCHES}: an A100 80GB"),
            l2=of(5.4e12, MEASURED, f"gpu-l2-cache of {BENCHES}: an A100 80GB"),
            library={
                "float32": ((1024, 8.99e12), (2048, 9.69e12), (4096, 15.52e12), (8192, 17.56e12)),
                "TF32": ((1024, 61.02e12), (2048, 90.82e12), (4096, 108.32e12)),
                "bfloat16": ((1024, 94.89e12), (2048, 138.46e12), (4096, 234.14e12)),
            },
            library_source=TORCH_A100,
            wgmma=None,
        ),
    )
}

LAUNCH = of(2.5e-6, MEASURED, f"gpu-small-kernels of {BENCHES}: an H200, kernels in a queue")
EAGER = of(5e-6, ASSUMED, "host's time of one operation of torch, of Python's or of C++'s")
HOST_MATRIX = of(3.1e-6, MEASURED_HERE, HOST)
HOST_VECTOR = of(1.2e-6, MEASURED_HERE, HOST)
QR_COLUMN = of(60e-6 / 16, MEASURED, QR)
QR_MATRIX = of(26e-6, MEASURED, QR_LOOP)
EIGH_SHARE = of(0.03, MEASURED, EIGH)
CHOLESKY_SECONDS = ((16, 34.8e-6), (128, 108.6e-6), (512, 376.1e-6), (2048, 1954.3e-6))


def figure_rows() -> list[list[str]]:
    """All of them: name, values of both devices or of any, kind and source."""
    devices = list(DEVICES.values())
    rows = [["number", *(d.name for d in devices), "kind", "source"]]

    def add(name: str, form: str, figures: list[Figure | None], scale: float = 1) -> None:
        values = ["-" if f is None else form.format(f.value * scale) for f in figures]
        kinds = list(dict.fromkeys(f.kind for f in figures if f))
        sources = list(dict.fromkeys(f.source for f in figures if f))
        if len(values) == 1:
            values *= len(devices)
        rows.append([name, *values, ", ".join(kinds), "; ".join(sources)])

    peaks = [
        ", ".join(f"{figure.value / 1e12:.4g}" for figure in d.peaks.values()) for d in devices
    ]
    names = ", ".join(devices[0].peaks)
    rows.append([f"peaks: {names}, TFLOP/s", *peaks, DATA_SHEET, NVIDIA])
    add("of the TF32 and bfloat16 peaks, mma.sync", "{:.1%}", [d.mma_sync for d in devices])
    add("of its ceilings, a product", "{:.0%}", [d.reached for d in devices])
    add("memory, TB/s", "{:.4g}", [d.dram for d in devices], 1e-12)
    add("of it, a copy", "{:.0%}", [d.copied for d in devices])
    add("L2, TB/s", "{:.4g}", [d.l2 for d in devices], 1e-12)
    for operands in devices[0].library:
        values = [
            ", ".join(f"{rate / 1e12:.0f} at {size}" for size, rate in d.library[operands])
            for d in devices
        ]
        source = "; ".join(d.library_source for d in devices)
        rows.append([f"cuBLAS, {operands}, TFLOP/s by size", *values, MEASURED, source])
    add("of cuBLAS, a wgmma kernel", "{:.1%}", [d.wgmma for d in devices])
    add("a launch in a queue, us", "{:.3g}", [LAUNCH], 1e6)
    add("an operation of torch, us", "{:.3g}", [EAGER], 1e6)
    add("host, per matrix and step, us", "{:.3g}", [HOST_MATRIX], 1e6)
    add("host, per vector and step, us", "{:.3g}", [HOST_VECTOR], 1e6)
    add("QR, per column, us", "{:.3g}", [QR_COLUMN], 1e6)
    add("QR, per matrix at least, us", "{:.3g}", [QR_MATRIX], 1e6)
    add("eigenvectors, of the float32 peak at most", "{:.0%}", [EIGH_SHARE])
    cholesky = ", ".join(f"{time * 1e6:.0f} at {n}" for n, time in CHOLESKY_SECONDS)
    rows.append(["Cholesky of one matrix, us", *len(devices) * [cholesky], MEASURED, CHOLESKY])
    return rows
