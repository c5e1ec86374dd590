"""Parameters, gradients and shardings for the tests with several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from optim_helpers import LenientFISMO
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import dykaf
from dykaf.distributed.cut import Box

# Sides that no number of ranks divides, fewer rows than ranks, vectors, a convolution, a stack, a
# skinny adapter and one that AdamW updates.
SHAPES = [(12, 20), (7,), (20, 12), (33, 17), (3, 5), (1, 9), (64,), (4, 3, 3, 2), (2, 80), (90, 4)]
STACKS = [(6, 8, 10), (6, 9)]
OPTIONS: dict[str, Any] = {"precondition_frequency": 5, "max_precond_dim": 60, "skinny_rank": 4}
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "rows": ((0,), [Shard(0)]),
    "columns": ((0,), [Shard(1)]),
    "replicated": ((0,), [Replicate()]),
    "hsdp": ((2, 0), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 0), [Shard(0), Shard(1)]),
    "rows twice": ((2, 0), [Shard(0), Shard(0)]),
    "second and third": ((2, 0), [Shard(1), Shard(2)]),
    "columns and replicated": ((2, 0), [Shard(1), Replicate()]),
}


def skip_without_fsdp(mode: str) -> None:
    """Of torch 2.6: fully_shard records events on streams that a CPU does not have."""
    needs_it = mode.startswith(("fsdp", "hsdp", "offload", "mixed", "fully_shard"))
    if needs_it and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has no fully_shard on a CPU")


def values(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def mesh_of(layout: str) -> DeviceMesh:
    """0 in a shape stands for the ranks that are left."""
    shape, _ = LAYOUTS[layout]
    world = dist.get_world_size()
    sizes = [size or world // max(1, shape[0]) for size in shape]
    return init_device_mesh("cpu", tuple(sizes))


def sharded(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """Of a vector the first dimension is cut where a matrix's second one is."""
    fitting = [
        Shard(min(placement.dim, whole.ndim - 1)) if isinstance(placement, Shard) else placement
        for placement in placements
    ]
    size, start = compute_local_shape_and_global_offset(whole.shape, mesh, fitting)
    return DTensor.from_local(
        Box(tuple(start), tuple(size)).within(whole).contiguous().clone(),
        mesh,
        fitting,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


class Model:
    """Parameters of one layout: that of one process (""), of a group ("group"), or of LAYOUTS."""

    def __init__(self, layout: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.mesh = mesh_of(layout) if layout in LAYOUTS else None
        self.placements = LAYOUTS[layout][1] if layout in LAYOUTS else []
        self.dtype = dtype
        if layout == "group":
            options["process_group"] = dist.group.WORLD
        self.params = [nn.Parameter(self.place(p)) for p in values(SHAPES + STACKS, 1, dtype)]
        num = len(SHAPES)
        groups = [
            {"params": self.params[:num]},
            {"params": self.params[num:], "batch_dims": 1, "lr": 3e-3},
        ]
        kind = LenientFISMO if options.pop("fismo", False) else dykaf.DyKAF
        self.optimizer = kind(groups, **{**OPTIONS, **options})

    def place(self, whole: Tensor) -> Tensor:
        return whole.clone() if self.mesh is None else sharded(whole, self.mesh, self.placements)

    def grads(self, step: int) -> list[Tensor]:
        """Of the whole parameters; the same on all ranks."""
        return values(SHAPES + STACKS, 100 + step, self.dtype)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for param, grad in zip(self.params, self.grads(step), strict=True):
                param.grad = self.place(grad)
            self.optimizer.step()

    def wholes(self) -> list[Tensor]:
        return [whole_of(param.detach()).clone() for param in self.params]


def whole_of(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differing(ours: list[Tensor], others: list[Tensor]) -> list[int]:
    """The places of parameters that are not the same bits."""
    pairs = enumerate(zip(ours, others, strict=True))
    return [place for place, (a, b) in pairs if not torch.equal(a, b)]
