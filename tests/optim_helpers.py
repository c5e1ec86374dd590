"""What the behaviour tests share: repeatable gradients and snapshots that compare bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import backends
import pytest
import torch
from torch import Tensor, nn

from dykaf import FISMO, DyKAF
from dykaf.options import FISMO_FIXED, FISMO_RULES

Bits = tuple[str, tuple[int, ...], bytes]

# Both sides and Adam's own update, refreshed often.
BOTH: dict[str, Any] = {
    "betas": (0.95, 0.95),
    "precondition_frequency": 10,
    "sides": "both",
    "nesterov": False,
    "orthogonalize": 0,
}


class LenientFISMO(FISMO):
    """FISMO in place of a DyKAF: leaves out those of its options that FISMO has not."""

    def __init__(self, params: Any, **options: Any) -> None:
        known = FISMO_RULES.keys() - FISMO_FIXED.keys() | {"process_group"}
        refused = {"integrator", "sides"}  # other values
        refused |= {"orthogonalize"} if options.get("orthogonalize") == 0 else set()
        super().__init__(params, **{key: options[key] for key in options if key in known - refused})


def two_sided(params: Any, **options: Any) -> DyKAF:
    """A DyKAF that keeps both sides, with Adam's own update."""
    return DyKAF(params, **{**BOTH, **options})


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers; the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=seed, dtype=dtype))


def with_stack(
    shapes: list[tuple[int, ...]], stack: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> DyKAF:
    """An optimizer on the backend's device: a parameter of each shape, and in a group of its own a
    stack of matrices, the last one."""
    params = [
        nn.Parameter(randn(*shape, seed=i, dtype=dtype).to(backends.device()))
        for i, shape in enumerate([*shapes, stack])
    ]
    return DyKAF([{"params": params[:-1]}, {"params": params[-1:], "batch_dims": 1}], **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def gradient(param: Tensor, step: int, idx: int) -> Tensor:
    """The gradient of parameter ``idx`` at ``step``, with rows and columns of unequal size."""
    return _gradient(tuple(param.shape), step, idx).to(param.device, param.dtype, copy=True)


@functools.cache
def _gradient(shape: tuple[int, ...], step: int, idx: int) -> Tensor:
    grad = randn(*shape, seed=1000 * step + idx + 1)
    if len(shape) >= 2:
        grad = grad * torch.linspace(0.3, 2, shape[-1], dtype=torch.float64)
        grad = grad + 0.5 * randn(*shape, seed=idx + 500_000)
    return grad


def run(
    optimizer: torch.optim.Optimizer,
    steps: range,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps with ``gradient``; ``before_step`` runs when the gradients are there."""
    for step in steps:
        for idx, param in enumerate(params_of(optimizer)):
            param.grad = gradient(param, step, idx)
        before_step(step)
        optimizer.step()


def bits(tensor: Tensor) -> Bits:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def state_bits(optimizer: torch.optim.Optimizer) -> list[dict[str, Bits]]:
    """The state of each parameter."""
    return [
        {key: bits(value) for key, value in (optimizer.state.get(param) or {}).items()}
        for param in params_of(optimizer)
    ]


def frozen(optimizer: DyKAF) -> dict[str, Any]:
    """Everything that an optimizer holds, as values that compare bit for bit."""
    params = params_of(optimizer)
    return {
        "params": [bits(param) for param in params if not param.is_meta],
        "grads": [
            bits(param.grad)
            for param in params
            if param.grad is not None and param.grad.layout == torch.strided
            if not param.grad.is_meta
        ],
        "state": state_bits(optimizer),
        "groups": [
            {key: repr(value) for key, value in group.items() if key != "params"}
            | {"params": [id(param) for param in group["params"]]}
            for group in optimizer.param_groups
        ],
        "skipped_steps": optimizer.skipped_steps,
    }


def trajectory(optimizer: DyKAF) -> tuple[list[Bits], list[dict[str, Bits]], int]:
    """Parameters, state and skipped steps, to compare one optimizer with another."""
    params = [bits(param) for param in params_of(optimizer)]
    return params, state_bits(optimizer), optimizer.skipped_steps


@contextmanager
def refuses(optimizer: DyKAF, message: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Demands this error, word for word, and that the optimizer is as before, bit for bit."""
    before = frozen(optimizer)
    with pytest.raises(error) as caught:
        yield
    assert str(caught.value) == message
    assert frozen(optimizer) == before
