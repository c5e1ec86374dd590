"""Factors and bases that are kept in bfloat16 and computed with in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dykaf.state import KINDS, State

KEYS = tuple(key for key, kind in KINDS.items() if kind in ("factors", "bases"))
# Full copies that are there at one time, unless a single parameter's are larger.
MAX_PASS_BYTES = 2**29
# Copies start at multiples of this many bytes.
ALIGNMENT = 512


class Pass(NamedTuple):
    """Consecutive states that are computed with at one time."""

    part: slice
    states: list[State]  # with full copies in place of what is kept in bfloat16
    kept: list[Tensor]  # in bfloat16
    full: list[Tensor]  # their copies, which other passes use too: memory without values


def _narrow(state: State) -> dict[str, Tensor]:
    return {key: state[key] for key in KEYS if key in state and state[key].dtype == torch.bfloat16}


def _copy_bytes(state: State) -> int:
    size = state["exp_avg"].element_size()
    sizes = [size * value.numel() for value in _narrow(state).values()]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _slices(needed: Sequence[int]) -> Iterator[slice]:
    """Consecutive parts that fit into ``MAX_PASS_BYTES``."""
    begin = used = 0
    for idx, size in enumerate(needed):
        if used > 0 and used + size > MAX_PASS_BYTES:
            yield slice(begin, idx)
            begin, used = idx, 0
        used += size
    yield slice(begin, len(needed))


def passes(states: Sequence[State]) -> list[Pass]:
    """Cuts ``states``, of one device, into passes; allocates the copies, sets no values."""
    needed = [_copy_bytes(state) for state in states]
    parts = list(_slices(needed))
    size = max((sum(needed[part]) for part in parts), default=0)
    if size == 0:
        return [Pass(part, list(states[part]), [], []) for part in parts]
    memory = torch.empty(size, dtype=torch.uint8, device=states[0]["exp_avg"].device)
    return [_in_memory(part, states[part], memory) for part in parts]


def _in_memory(part: slice, states: Sequence[State], memory: Tensor) -> Pass:
    result = Pass(part, [], [], [])
    begin = 0
    for state in states:
        wide = dict(state)
        for key, value in _narrow(state).items():
            dtype = state["exp_avg"].dtype
            end = begin + value.numel() * dtype.itemsize
            wide[key] = memory[begin:end].view(dtype).view(value.shape)
            begin += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
            result.kept.append(value)
            result.full.append(wide[key])
        result.states.append(wide)
    return result


def widened(state: State) -> State:
    """``state`` with copies in full of what is kept in bfloat16."""
    dtype = state["exp_avg"].dtype
    return {**state, **{key: value.to(dtype) for key, value in _narrow(state).items()}}
