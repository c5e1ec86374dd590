"""The models that are priced, in parameter groups as dykaf.param_groups makes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch

from bench.distributed_models import MODELS, Param
from bench.shapes import SHAPE_SETS

LORA_RANK = 16
# torch.nn.Linear's (out, in) of a layer of Llama-3-8B.
LLAMA_LINEARS = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
LLAMA_LAYERS = 32
LLAMA_PARAMS = 8_030_261_248


class Model(NamedTuple):
    """What an optimizer steps, and the weights beside it that stay as they are."""

    name: str
    params: list[Param]
    dtype: torch.dtype
    frozen_bytes: int = 0

    @property
    def groups(self) -> list[list[Param]]:
        """Matrices, embeddings and heads, vectors."""

        def kind(param: Param) -> tuple[bool, bool]:
            return param.is_adamw, len(param.shape) == 1

        return [list(group) for _, group in groupby(sorted(self.params, key=kind), kind)]


def lora(names: str) -> list[Param]:
    """A [rank, in] and B [out, rank] of each of the layers' linears."""
    params = []
    for name in names.split():
        rows, cols = LLAMA_LINEARS[name]
        params += [Param((LORA_RANK, cols)), Param((rows, LORA_RANK))]
    return LLAMA_LAYERS * params


def adapters(names: str, text: str) -> Callable[[], Model]:
    return lambda: Model(
        f"Llama-3-8B, LoRA of rank {LORA_RANK} on {text}, bfloat16",
        lora(names),
        torch.bfloat16,
        2 * LLAMA_PARAMS,
    )


def shape_set(name: str) -> Model:
    """A set of bench/shapes.py in its own sizes, float32."""
    params = [
        Param(shape, num_batch=len(shape) - 2) for shape in SHAPE_SETS[name].workload("full").shapes
    ]
    return Model(name, params, torch.float32)


PRICED: tuple[Callable[[], Model], ...] = (
    lambda: Model("GPT-2 small, float32", MODELS["GPT-2 small"](), torch.float32),
    lambda: Model("Llama-3-8B, bfloat16", MODELS["Llama-3-8B"](), torch.bfloat16),
    adapters("q v", "q, v"),
    adapters(" ".join(LLAMA_LINEARS), "all linear layers"),
)
