"""Factors and bases that are kept in bfloat16 and computed with in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dykaf.state import State

KEYS = ("L", "R", "Q_L", "Q_R", "basis", "core")
# Full copies that are there at one time, unless a single parameter's are larger.
MAX_PASS_BYTES = 2**29


def _narrow(state: State) -> dict[str, Tensor]:
    return {key: state[key] for key in KEYS if key in state and state[key].dtype == torch.bfloat16}


def widened(state: State) -> State:
    """``state`` with copies in full of what is kept in bfloat16."""
    narrow = _narrow(state)
    if not narrow:
        return state
    dtype = state["exp_avg"].dtype
    return {**state, **{key: value.to(dtype) for key, value in narrow.items()}}


def passes(states: Sequence[State]) -> Iterator[slice]:
    """Consecutive parts of ``states`` whose full copies fit into ``MAX_PASS_BYTES``."""
    begin = used = 0
    for idx, state in enumerate(states):
        size = state["exp_avg"].element_size()
        needed = sum(size * value.numel() for value in _narrow(state).values())
        if used > 0 and used + needed > MAX_PASS_BYTES:
            yield slice(begin, idx)
            begin, used = idx, 0
        used += needed
    yield slice(begin, len(states))


@contextmanager
def in_full(states: Sequence[State]) -> Iterator[list[State]]:
    """The states with nothing in bfloat16; at the end the copies are rounded back, to nearest."""
    wide = [widened(state) for state in states]
    yield wide
    pairs = [
        (value, full[key])
        for state, full in zip(states, wide, strict=True)
        for key, value in _narrow(state).items()
    ]
    if pairs:
        torch._foreach_copy_([value for value, _ in pairs], [full for _, full in pairs])
