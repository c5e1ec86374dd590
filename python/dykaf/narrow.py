"""Factors and bases that are kept in bfloat16 and computed with in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dykaf.state import KINDS, State

KEYS = tuple(key for key, kind in KINDS.items() if kind in ("factors", "bases"))
# Full copies that are there at one time, unless a single parameter's are larger.
MAX_PASS_BYTES = 2**29


def _narrow(state: State) -> dict[str, Tensor]:
    return {key: state[key] for key in KEYS if key in state and state[key].dtype == torch.bfloat16}


def _widen(states: Sequence[State]) -> tuple[list[State], list[Tensor], list[Tensor]]:
    """The states with copies in full; what was copied, and the copies."""
    wide: list[State] = []
    kept: list[Tensor] = []
    full: list[Tensor] = []
    for state in states:
        narrow = _narrow(state)
        dtype = state["exp_avg"].dtype
        copies = {key: torch.empty_like(value, dtype=dtype) for key, value in narrow.items()}
        wide.append({**state, **copies} if copies else state)
        kept += narrow.values()
        full += copies.values()
    if full:
        torch._foreach_copy_(full, kept)
    return wide, kept, full


def widened(state: State) -> State:
    """``state`` with copies in full of what is kept in bfloat16."""
    return _widen([state])[0][0]


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
    wide, kept, full = _widen(states)
    yield wide
    if full:
        torch._foreach_copy_(kept, full)
