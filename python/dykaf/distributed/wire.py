"""Tensors from every rank of a team to every other, in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dykaf.distributed.plan import Team


class Swap:
    """An exchange under way.

    Args:
        team: all its ranks make the same exchange.
        outgoing: what goes to each rank, of dtype ``dtype`` and any shapes and strides.
        incoming: the numbers of elements of what comes from each rank.
        dtype: of the exchange.
    """

    def __init__(
        self,
        team: Team,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        pieces = [piece.reshape(-1) for to_rank in outgoing for piece in to_rank]
        empty = torch.empty(0, dtype=dtype, device=team.device)
        self._incoming = incoming
        self._sent = torch.cat([*pieces, empty.to(pieces[0].device)]) if pieces else empty
        self._sent = self._sent.to(team.device)  # of offloaded parameters
        sizes = [sum(from_rank) for from_rank in incoming]
        self._received = torch.empty(sum(sizes), dtype=dtype, device=team.device)
        self._work = dist.all_to_all_single(
            self._received,
            self._sent,
            sizes,
            [sum(piece.numel() for piece in to_rank) for to_rank in outgoing],
            group=team.group,
            async_op=True,
        )

    def wait(self, device: torch.device) -> list[list[Tensor]]:
        """What came from each rank, flat, on ``device``; waits until it is there."""
        self._work.wait()
        received = self._received.to(device)
        sizes = [size for from_rank in self._incoming for size in from_rank]
        flat = iter(torch.split(received, sizes))
        return [[next(flat) for _ in from_rank] for from_rank in self._incoming]


def agree_max(team: Team, numbers: Sequence[int]) -> list[int]:
    """The largest of each number over the team; waits for it."""
    flags = torch.tensor(numbers, dtype=torch.int32, device=team.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=team.group)
    result: list[int] = flags.tolist()
    return result
