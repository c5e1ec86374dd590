"""Which backend the tests run on: pytest --backend cpu (default), aten, simt or cuda.

simt: the CUDA backend over the host executor, in the package of tests/simt/extension.py, which
takes tensors on the CPU for tensors on a GPU. cuda: a GPU. aten: torch's own operations, on tensors
on the CPU, which are treated as those on a GPU are: no host waits. aten-cuda: those on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dykaf import _C, ops
from dykaf.state import HOST_KEYS

NAMES = ("cpu", "aten", "aten-cuda", "simt", "cuda")
BACKEND = "cpu"  # set by conftest.py from the option
OPS = (
    "grad_max",
    "rotate",
    "adam_update_",
    "orthogonalize_",
    "apply_update_",
    "factor_update_",
    "initialize_",
    "refresh_basis_",
    "step_",
)


def select(name: str) -> None:
    """Sets the backend and checks that the package at hand has it; changes ops for "cuda"."""
    global BACKEND
    BACKEND = name
    expected = {"cpu": "cpu", "simt": "cuda", "cuda": "cuda"}.get(name, "aten")
    if expected == "aten":
        os.environ["DYKAF_BACKEND"] = "aten"  # of processes that tests start
        _C.use_aten_alone(True)
    found = ops.backend_of(torch.zeros(1, device=device()))
    if found != expected:
        raise RuntimeError(f"--backend {name}: the imported dykaf runs these tensors on {found}")


def device() -> torch.device:
    return torch.device("cuda" if on_hardware() else "cpu")


def on_hardware() -> bool:
    return BACKEND.endswith("cuda")


def is_aten() -> bool:
    return BACKEND.startswith("aten")


def is_gpu() -> bool:
    return BACKEND != "cpu"


def takes_float64() -> bool:
    return BACKEND not in ("simt", "cuda")


def through_gpu(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` for tensors on the CPU: copied to the GPU, and what it changed or returned back."""

    def to_gpu(value: Any, copies: list[tuple[Tensor, Tensor]], key: str = "") -> Any:
        if isinstance(value, Tensor):
            if key in HOST_KEYS or value.device.type != "cpu":
                return value
            copies.append((value, value.to("cuda")))
            return copies[-1][1]
        if isinstance(value, dict):
            return {name: to_gpu(item, copies, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(to_gpu(item, copies) for item in value)
        return value

    @functools.wraps(op)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []
        result = op(*to_gpu(args, copies), **to_gpu(kwargs, copies))
        for original, copy in copies:
            original.copy_(copy)
        if isinstance(result, Tensor):
            return result.cpu()
        return result and [tensor.cpu() for tensor in result]

    return wrapped
