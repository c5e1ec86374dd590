"""Reads a kernel's name, and what its machine code says about its speed."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.sass import listing
from bench.sass.listing import Block, Function, Instruction
from bench.sass.machines import ALU_CYCLES, MACHINES, PARTITIONS, WARP_SIZE, occupancy
from bench.sass.toolchain import Resources

# enum GemmForm of dykaf/cuda_library.h and enum MatmulPrecision of dykaf/types.h
FORMS = ("NN", "TN", "NT", "sym NT", "sym TN")
PRECISIONS = ("highest", "high", "medium")
DEPTH_OF_SUM = 256  # kDepthOfSum of csrc/cuda/kernels/gemm.cuh

GEMM_NAME = re.compile(
    r"gemm_kernelINS\w*?9TileShapeI((?:Li\d+E){7})E.*?GemmFormE(\d).*?MatmulPrecisionE(\d)E"
)
KERNEL_NAME = re.compile(r"\d([a-z][a-z_]*)_kernel")  # the digit ends its length
ELEMENT_NAME = re.compile(r"elements_kernelINS\w*?_\d+([A-Z]\w*?)ProblemE")
THREADS = {"factor_scalars": 128, "prepare": 128}
DEFAULT_THREADS = 256


@dataclass(frozen=True)
class GemmShape:
    """The template arguments of gemm_kernel."""

    m: int
    n: int
    k: int
    warp_m: int
    warp_n: int
    stages: int
    min_blocks: int
    form: str
    precision: str

    @property
    def warps(self) -> int:
        return (self.m // self.warp_m) * (self.n // self.warp_n)

    @property
    def expected_hmma(self) -> int:
        """Tensor-core products of a warp in one stage of k."""
        passes = 3 if self.precision == "highest" else 1
        step = 16 if self.precision == "medium" else 8
        return passes * (self.warp_m // 16) * (self.warp_n // 8) * (self.k // step)

    @property
    def dynamic_shared_bytes(self) -> int:
        """SharedLayout::kBytes of csrc/cuda/kernels/gemm_tile.cuh."""

        def tile(length: int, along_k: bool) -> int:
            return length * (self.k + 4) if along_k else self.k * (length + 8)

        ring = self.stages * (
            tile(self.m, along_k=not self.form.endswith("TN"))
            + tile(self.n, along_k=self.form.endswith("NT"))
        )
        return 4 * max(ring, self.m * (self.n + 4))


def parse_gemm(name: str) -> GemmShape | None:
    match = GEMM_NAME.search(name)
    if match is None:
        return None
    numbers = list(map(int, re.findall(r"\d+", match[1])))
    return GemmShape(*numbers, form=FORMS[int(match[2])], precision=PRECISIONS[int(match[3])])


def short_name(name: str) -> str:
    """For a person: `128x128 NN high`, `elements adam`, `blend`."""
    if gemm := parse_gemm(name):
        return f"gemm {gemm.m}x{gemm.n} {gemm.form} {gemm.precision}"
    match = KERNEL_NAME.search(name)
    kernel = match[1] if match else name
    op = ELEMENT_NAME.search(name)
    return f"{kernel} {re.sub('(?<=[a-z])(?=[A-Z][a-z])', ' ', op[1]).lower()}" if op else kernel


def unit_of(op: str) -> str:
    """The class of an instruction that the tables count."""
    for prefix, unit in (
        ("HMMA", "HMMA"),
        ("LDSM", "LDSM"),
        ("LDS", "LDS"),
        ("STS", "STS"),
        ("LDGDEPBAR", "other"),
        ("LDGSTS", "LDGSTS128" if ".128" in op else "LDGSTS32"),
        ("LDG", "global"),
        ("STG", "global"),
        ("LDL", "local"),
        ("STL", "local"),
        ("LD.", "generic"),
        ("ST.", "generic"),
        ("LDC", "other"),
        ("FADD", "fp32"),
        ("FMUL", "fp32"),
        ("FFMA", "fp32"),
        # Multiply-adds of integers share a pipe with floats; what works on uniform registers and
        # what steers has others.
        *((steering, "other") for steering in ("IMAD", "U", "S2", "CS2R", "HFMA2")),
        *((steering, "other") for steering in ("BRA", "BS", "BAR", "NOP", "DEPBAR", "WARPSYNC")),
    ):
        if op.startswith(prefix):
            return unit
    return "alu"  # integer, logic, comparison, conversion


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """By unit; instructions that never run (guard !PT) count as issued alone."""
    return Counter("never" if i.guard == "!PT" else unit_of(i.op) for i in instructions)


@dataclass
class MainLoop:
    """One stage of k of a warp, on the path for aligned matrices."""

    mix: dict[str, float]
    issued: float
    cycles: dict[str, float] = field(default_factory=dict)  # by what it keeps busy

    @property
    def bound(self) -> float:
        """The fraction of the rate of mma.sync that the loop can reach."""
        return self.cycles["tensor"] / max(self.cycles.values())

    @property
    def limit(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)


def is_unaligned(block: Block) -> bool:
    return any(unit_of(i.op) == "LDGSTS32" for i in block)


def main_loop(function: Function, shape: GemmShape, arch: int) -> MainLoop:
    loop = listing.loop_with_most(function, lambda i: i.op.startswith("HMMA"))
    if loop is None:
        raise ValueError(f"no loop with HMMA in {function.name}")
    hot, _ = listing.path_through(function, loop, is_unaligned)
    # The second accumulator takes over once in DEPTH_OF_SUM of k.
    num_sums = shape.warp_m * shape.warp_n // WARP_SIZE
    rare = [b for b in hot if count(b)["fp32"] >= num_sums and not count(b)["HMMA"]]
    mix: Counter[str] = Counter()
    for block in hot:
        weight = shape.k / DEPTH_OF_SUM if block in rare else 1.0
        for unit, number in count(block).items():
            mix[unit] += weight * number
    unrolled = mix["HMMA"] / shape.expected_hmma
    if unrolled != int(unrolled) or not unrolled:
        raise ValueError(f"{mix['HMMA']:g} HMMA, {shape.expected_hmma} expected: {function.name}")
    per_stage = {unit: number / unrolled for unit, number in mix.items()}
    result = MainLoop(per_stage, sum(per_stage.values()))

    def stage(unit: str) -> float:
        return per_stage.get(unit, 0)

    # Cycles of one block. A partition runs every fourth warp; shared memory moves 128 bytes a
    # cycle: a warp's LDS takes 1, and 512 bytes by LDSM.x4 or a 16-byte LDGSTS take 4.
    machine = MACHINES[arch]
    warps = shape.warps / PARTITIONS
    moved = stage("LDS") + 4 * stage("LDSM") + 4 * stage("LDGSTS128")
    result.cycles = {
        "tensor": stage("HMMA") * machine.hmma / machine.mma_sync * warps,
        "issue": result.issued * warps,
        "shared": moved * shape.warps,
        "alu": stage("alu") * ALU_CYCLES * warps,
    }
    return result


@dataclass
class Kernel:
    """All that is known of one kernel on one architecture."""

    name: str
    arch: int
    resources: Resources
    shared_bytes: int
    threads: int
    blocks: int
    limit: str
    loop: MainLoop | None  # of a matrix multiplication
    wide: int  # global accesses of 16 bytes per thread
    narrow: int
    local: int


def analyse(function: Function, resources: Resources, arch: int) -> Kernel:
    shape = parse_gemm(function.name)
    name = short_name(function.name)
    threads = shape.warps * WARP_SIZE if shape else THREADS.get(name, DEFAULT_THREADS)
    shared = resources.shared_bytes + (shape.dynamic_shared_bytes if shape else 0)
    blocks, limit = occupancy(MACHINES[arch], resources.registers, threads, shared)
    accesses = [i for i in function.instructions if unit_of(i.op) in ("global", "generic")]
    wide = sum(".128" in i.op for i in accesses)
    return Kernel(
        name,
        arch,
        resources,
        shared,
        threads,
        blocks,
        limit,
        main_loop(function, shape, arch) if shape else None,
        wide,
        len(accesses) - wide,
        count(function.instructions)["local"],
    )
