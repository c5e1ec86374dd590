"""Checks of parameters and gradients, and how messages name them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dykaf import ops
from dykaf.distributed import is_dtensor
from dykaf.state import PARAM_DTYPES


def param_name(group: Mapping[str, Any], group_idx: int, idx: int) -> str:
    """The name of a parameter in messages and reports: its own, or its place."""
    names = group.get("param_names")
    return names[idx] if names is not None else f"param_groups[{group_idx}]['params'][{idx}]"


def named_alike_(param_group: dict[str, Any], group_idx: int, has_names: bool) -> None:
    """Gives a new group names, or takes them, as the groups before it: torch takes no mixture.

    Args:
        param_group: is changed in place where all of its parameters differ in that.
        group_idx: its place.
        has_names: whether those before it do.
    """
    params = param_group["params"]
    if isinstance(params, set):
        return  # torch refuses it
    params = [params] if isinstance(params, Tensor) else list(params)
    param_group["params"] = params
    names = param_group.get("param_names")
    if names is not None and len(names) != len(params):
        raise ValueError(f"param_names: expected {len(params)} of them, got {len(names)}")
    if has_names and not params:
        param_group["param_names"] = []
    is_named = [isinstance(param, tuple) for param in params]
    if has_names and "param_names" not in param_group and not any(is_named):
        param_group["params"] = [
            (param_name({}, group_idx, idx), param) for idx, param in enumerate(params)
        ]
    elif not has_names:
        param_group.pop("param_names", None)
        if all(is_named):
            param_group["params"] = [param for _, param in params]


def is_fake(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the parameters are fake tensors; models are so as a whole."""
    params = (param for group in param_groups for param in group["params"])
    return isinstance(next(params, None), FakeTensor)


def warn(message: str) -> None:
    """Warns at the line of the user's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_within(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_within(module_name: str) -> bool:
    return module_name.partition(".")[0] in ("dykaf", "torch")


def is_capturing() -> bool:
    """Whether the current stream is captured in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_has_gradients(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warns of a first step without a gradient.

    Raises:
        RuntimeError: under torch.distributed, where what shards a model has probably replaced the
            parameters.
    """
    params = [param for group in param_groups for param in group["params"]]
    num_trainable = sum(param.requires_grad for param in params)
    if num_trainable and dist.is_available() and dist.is_initialized():
        raise RuntimeError(
            f"step: expected gradients of the optimizer's parameters, got none of {num_trainable}; "
            "fully_shard and parallelize_module put others in the model: make the optimizer after "
            "them, from model.parameters()"
        )
    warn(
        f"step: found no gradient on any of the optimizer's {len(params)} parameters, "
        f"{num_trainable} of which require one: nothing was trained. A model that was wrapped or "
        "converted later (PEFT, quantization) has others: make the optimizer after that"
    )


def warn_of_zero_redundancy() -> None:
    """Warns where ZeroRedundancyOptimizer makes the optimizer, which it does with a part of it."""
    frame = sys._getframe()
    for _ in range(8):
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            warn(
                "ZeroRedundancyOptimizer gives whole parameters to ranks, and steps differ from "
                "those of one process by where refreshes and roundings fall; "
                "DyKAF(..., process_group=torch.distributed.group.WORLD) shares each matrix's work "
                "and state itself, to the same bits"
            )
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def check_param(name: str, param: Tensor) -> None:
    """Checks a parameter that is added.

    As with torch.optim, frozen ones may be of any kind, and those without memory yet on any device:
    :func:`check_usable` sees them at their first step.

    Raises:
        ValueError: naming ``name``, what was expected and what came.
    """
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{name}: expected a parameter in its own shape, got one that FullyShardedDataParallel "
            "has flattened, in which no matrix can be seen; "
            "torch.distributed.fsdp.fully_shard keeps shapes"
        )
    is_fake = isinstance(param, FakeTensor)
    if not is_fake:
        _check_plain(name, param)
    if param.requires_grad:
        _check_form(name, param)
        if not (is_fake or is_lazy(param) or param.is_meta or is_dtensor(param)):
            ops.backend_of(param, name)  # raises for a tensor without memory


def check_usable(name: str, param: Tensor) -> None:
    """Checks a parameter with a gradient before its first step in the present form.

    Raises:
        ValueError: naming ``name``, what was expected and what came.
    """
    _check_plain(name, param)
    _check_form(name, param)
    ops.backend_of(param, name)  # raises for a tensor without memory


def _check_form(name: str, param: Tensor) -> None:
    if param.dtype not in PARAM_DTYPES:
        expected = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise ValueError(f"{name}: expected dtypes {expected}, got {param.dtype}")
    if param.layout != torch.strided:
        raise ValueError(f"{name}: expected dense tensors, got {param.layout} on {param.device}")
    strides = () if is_lazy(param) else zip(param.stride(), param.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in strides):
        raise ValueError(
            f"{name}: expected tensors whose elements do not share memory, "
            f"got shape {tuple(param.shape)} with strides {param.stride()}"
        )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Checks that ``grad`` is dense and of the kind of ``param``.

    Raises:
        ValueError: naming ``name``, what was expected and what came.
    """
    _check_plain(f"gradient of {name}", grad)
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {name}: expected a dense tensor, got {grad.layout}")
    if is_dtensor(grad) != is_dtensor(param):
        expected, got = ("a DTensor" if is_dtensor(x) else "a plain tensor" for x in (param, grad))
        raise ValueError(f"gradient of {name}: expected {expected} as the parameter, got {got}")
    if grad.dtype != param.dtype or grad.device != param.device or grad.shape != param.shape:
        raise ValueError(
            f"gradient of {name}: expected {_describe(param)} as the parameter, "
            f"got {_describe(grad)}"
        )


def _check_plain(name: str, tensor: Tensor) -> None:
    # DTensor's like look dense, but the memory they show is not theirs; a fake one has none.
    is_wrapper = is_traceable_wrapper_subclass(tensor) and not is_dtensor(tensor)
    if is_wrapper or isinstance(tensor, FakeTensor):
        raise ValueError(f"{name}: expected plain tensors, got {type(tensor).__name__}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
