"""All parameters of real models, as python/dykaf/param_groups.py sorts them, over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from bench.shapes import SHAPE_SETS, Shape


class Param(NamedTuple):
    """A parameter of a model."""

    shape: Shape
    num_batch: int = 0  # leading dimensions that count matrices
    is_adamw: bool = False  # embeddings, heads and vectors (dykaf.param_groups)
    tensor_dim: int | None = 0  # cut by tensor parallelism; None: a copy on each of its ranks


def adamw(*shapes: Shape) -> list[Param]:
    return [Param(s, is_adamw=True, tensor_dim=None if len(s) == 1 else 0) for s in shapes]


def grouped(params: Iterable[Param]) -> list[Param]:
    """In the order of the groups: matrices, embeddings and heads, vectors."""
    return sorted(params, key=lambda param: (param.is_adamw, len(param.shape) == 1))


def gpt2() -> list[Param]:
    """Input and output embedding tied; biases and norms."""
    layer = [Param(shape) for shape in SHAPE_SETS["gpt2"].layer]
    layer += adamw((2304,), (768,), (3072,), (768,), *[(768,)] * 4)
    return grouped(12 * layer + adamw((50257, 768), (1024, 768), (768,), (768,)))


def llama() -> list[Param]:
    """Tensor parallelism cuts o and down by columns, the others by rows."""
    *qkv, out = SHAPE_SETS["llama3-attention"].layer
    *gate_up, down = SHAPE_SETS["llama3-mlp"].layer
    layer = [Param(shape) for shape in (*qkv, *gate_up)]
    layer += [Param(shape, tensor_dim=1) for shape in (out, down)]
    layer += adamw((4096,), (4096,))
    return grouped(32 * layer + adamw((128256, 4096), (128256, 4096), (4096,)))


def qwen3_moe() -> list[Param]:
    """Qwen3-30B-A3B by its published configuration; experts as stacks."""
    width, experts, inner, queries, keys, vocab = 2048, 128, 768, 32 * 128, 4 * 128, 151936
    layer = [Param(s) for s in ((queries, width), (keys, width), (keys, width), (width, queries))]
    layer.append(Param((experts, width)))  # the router
    gate = up = Param((experts, inner, width), num_batch=1)
    layer += [gate, up, Param((experts, width, inner), num_batch=1)]
    layer += adamw((width,), (width,), (128,), (128,))
    return grouped(48 * layer + adamw((vocab, width), (vocab, width), (width,)))


MODELS: dict[str, Callable[[], list[Param]]] = {
    "GPT-2 small": gpt2,
    "Llama-3-8B": llama,
    "Qwen3-30B-A3B": qwen3_moe,
}


class Case(NamedTuple):
    """A model over ranks."""

    model: str
    layout: str
    mesh: tuple[int, int, int]  # replicas, shards by rows, tensor parallelism
    dtype: torch.dtype = torch.float32  # of the parameters

    @property
    def num_ranks(self) -> int:
        return math.prod(self.mesh)

    @property
    def is_plain(self) -> bool:
        """Parameters are equal on all ranks and no DTensors: each has an owner."""
        return self.mesh == (self.num_ranks, 1, 1)


CASES = [
    Case("GPT-2 small", "DDP, process_group", (8, 1, 1)),
    Case("GPT-2 small", "FSDP", (1, 8, 1)),
    Case("Llama-3-8B", "FSDP", (1, 8, 1)),
    Case("Llama-3-8B", "FSDP", (1, 64, 1)),
    Case("Llama-3-8B", "FSDP, bfloat16", (1, 64, 1), torch.bfloat16),
    Case("Llama-3-8B", "HSDP 8 x 8", (8, 8, 1)),
    Case("Llama-3-8B", "FSDP 8, TP 8", (1, 8, 8)),
    Case("Llama-3-8B", "FSDP", (1, 1024, 1)),
    Case("Llama-3-8B", "HSDP 128 x 8", (128, 8, 1)),
    Case("Llama-3-8B", "FSDP 128, TP 8", (1, 128, 8)),
    Case("Qwen3-30B-A3B", "FSDP, by expert", (1, 64, 1)),
]
