"""What a step works on, and what of it a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dykaf import ops
from dykaf.checks import check_usable
from dykaf.state import Layout, State, changed_options, check_state


class Layouts:
    """The layouts of parameters, checked and made anew when what decides them has changed.

    They are kept by the parameter's id: a reference would keep alive what the user has replaced,
    and a weak one would forbid torch.utils.swap_tensors.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[tuple[object, ...], Layout]] = {}

    def of(
        self,
        name: str,
        param: Tensor,
        state: State,
        group: Mapping[str, Any],
        structure: tuple[object, ...],
    ) -> Layout:
        """The layout of a parameter with a gradient.

        Args:
            name: of the parameter.
            param: is checked to be one that a step can serve.
            state: of the parameter, empty if it has none yet; is checked to fit.
            group: the parameter's.
            structure: the values of STRUCTURAL_OPTIONS in ``group``.

        Raises:
            ValueError: naming the parameter, what was expected and what came.
        """
        key = (*structure, param.shape, param.dtype, param.device, type(param))
        before, layout = self.by_id.get(id(param), (None, None))
        if layout is None or before != key:
            check_usable(name, param)
            layout = Layout.of(param, group)
            if state:
                check_state(name, state, layout, changed_options(before or structure, structure))
            self.by_id[id(param)] = (key, layout)
        return layout

    def keep(self, params: Iterable[Tensor]) -> None:
        """Forgets all other parameters."""
        for gone in self.by_id.keys() - {id(param) for param in params}:
            del self.by_id[gone]


class GroupWork(NamedTuple):
    """The parameters of a group with a gradient on one device, and what a step needs of each."""

    group: dict[str, Any]
    device: torch.device
    on_gpu: bool
    params: list[Tensor]
    grads: list[Tensor]  # contiguous
    layouts: list[Layout]
    indices: list[int]  # places in the whole optimizer
    names: list[str]

    def owner(self, matrix_idx: int) -> str:
        """The name of the parameter that a matrix is, or is part of."""
        names = zip(self.names, self.layouts, strict=True)
        return [name for name, layout in names for _ in range(layout.count)][matrix_idx]

    def gpu_inputs(self, skip: Tensor | None, amp_scale: Tensor | None) -> dict[str, Tensor]:
        """What the GPU reads by itself in a step, of these and lr."""
        inputs = {"skip": skip, "amp_scale": amp_scale, "lr": self.group["lr"]}
        dtypes = {"skip": torch.int32, "amp_scale": torch.float32, "lr": torch.float32}
        return {
            name: value.to(self.device, dtypes[name], non_blocking=True).reshape(1)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and ops.backend_of(value) == "cuda"
        }


def check_capture(
    work: Sequence[GroupWork], states: Mapping[Tensor, State], counts_skips: bool
) -> None:
    """Checks that replays of a captured step would be right.

    Args:
        work: of the step.
        states: of the parameters.
        counts_skips: whether a step has made the count of skipped ones, which a replay must not
            start anew.

    Raises:
        RuntimeError: naming what is not so.
    """
    for item in work:
        if not item.on_gpu:
            _refuse("parameters on the GPU", f"{item.names[0]} on {item.device}")
        if item.device.type == "cuda" and item.device.index != torch.cuda.current_device():
            _refuse("parameters on the captured GPU", f"{item.names[0]} on {item.device}")
        if item.group["nonfinite"] == "raise":
            _refuse('nonfinite="skip" or "propagate"', '"raise", for which the CPU must wait')
        if item.group["nonfinite"] == "skip" and not counts_skips:
            _refuse("a step before the capture", "none")
        if item.group["factor_update_every"] != 1:
            _refuse("factor_update_every=1", str(item.group["factor_update_every"]))
        for name, param, layout in zip(item.names, item.params, item.layouts, strict=True):
            if layout.skinny_rank:
                _refuse("skinny_rank=0", f"{layout.skinny_rank}, which applies to {name}")
            state = states.get(param)
            if not state or ("next_refresh" in state and not state["next_refresh"].all()):
                _refuse("a step before the capture", f"none with a gradient of {name}")


def _refuse(expected: str, got: str) -> NoReturn:
    raise RuntimeError(f"step in a CUDA graph: expected {expected}, got {got}")
