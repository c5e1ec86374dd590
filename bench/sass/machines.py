"""What a multiprocessor offers, by architecture, and how many blocks of a kernel fit on it."""

from dataclasses import dataclass

REGISTER_ALLOCATION = 256  # registers, per warp
WARP_SIZE = 32
PARTITIONS = 4  # schedulers of a multiprocessor; each issues one instruction a cycle
# Integer additions, comparisons, logic, conversions: 64 lanes a cycle and multiprocessor (CUDA C++
# Programming Guide, "Throughput of native arithmetic instructions", 8.0 and 9.0; taken for all).
ALU_CYCLES = 2


@dataclass(frozen=True)
class Machine:
    """A multiprocessor. Limits: CUDA C++ Programming Guide, "Technical specifications per compute
    capability". Rates are in cycles that one instruction of a warp keeps a unit of its partition
    busy.

    Attributes:
        hmma: of a tensor-core product: m16n8k8 TF32 and m16n8k16 bf16 take equally long. From the
            published dense peak with float32 sums: cycles = 1024 multiply-adds / (TF32 peak /
            2 / multiprocessors / boost clock / 4 partitions).
        mma_sync: the share of that peak that mma.sync reaches.
    """

    registers: int
    shared_bytes: int
    block_shared_bytes: int
    warps: int
    blocks: int
    hmma: float
    mma_sync: float = 1.0
    reserved_shared_bytes: int = 1024  # per block, by the system


# Sources of `hmma`, from the vendor's data sheets:
#   80   A100, 156 TFLOP/s at 1.41 GHz on 108: 128 multiply-adds a cycle and partition, 8 cycles.
#   86   A10, 62.5 at 1.695 GHz on 72: 16 cycles. GeForce cards of this architecture take 32.
#   89   L40S, 183 at 2.52 GHz on 142: 16 cycles. GeForce cards take 32.
#   90   H100 SXM, 494.7 at 1.83 GHz on 132: 4 cycles. This is the peak of wgmma; mma.sync was
#        measured at 62.9% of it on average (Luo et al., arXiv 2402.13499 and 2501.12084).
#   100  B200 publishes its peak for tcgen05 alone; 4 cycles for mma.sync is an assumption.
#   120  RTX PRO 6000, 251.9 at 2.617 GHz on 188: 16 cycles. GeForce cards take 32.
MACHINES = {
    80: Machine(65536, 164 << 10, 163 << 10, 64, 32, hmma=8),
    86: Machine(65536, 100 << 10, 99 << 10, 48, 16, hmma=16),
    89: Machine(65536, 100 << 10, 99 << 10, 48, 24, hmma=16),
    90: Machine(65536, 228 << 10, 227 << 10, 64, 32, hmma=4, mma_sync=0.629),
    100: Machine(65536, 228 << 10, 227 << 10, 64, 32, hmma=4),
    120: Machine(65536, 100 << 10, 99 << 10, 48, 24, hmma=16),
}


def occupancy(machine: Machine, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Returns the blocks that fit on a multiprocessor, and what allows no more."""
    warps = -(-threads // WARP_SIZE)
    per_warp = -(-registers * WARP_SIZE // REGISTER_ALLOCATION) * REGISTER_ALLOCATION
    limits = {
        "registers": machine.registers // (per_warp * warps),
        "shared": machine.shared_bytes // (shared + machine.reserved_shared_bytes),
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit
