"""State as it is saved: whole arrays as DTensors, free of who owns what, and back.

An array of the parameter's shape has the parameter's placements, other arrays are cut by rows over
the team, and the few numbers of a matrix are plain tensors, equal on all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dykaf.distributed.cut import Box, Cut, copies, cut_by_rows
from dykaf.distributed.plan import Spread, Team
from dykaf.distributed.wire import Swap
from dykaf.state import HOST_KEYS, State

# Of whole arrays that are moved at one time, per rank.
BATCH_BYTES = 2**26


class Array(NamedTuple):
    """A state tensor of a parameter."""

    spread: Spread
    key: str
    dtype: torch.dtype
    cut: Cut  # as it is saved
    owners: tuple[int, ...]  # of each of its matrices
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.dtype.itemsize * math.prod(self.cut.shape)

    def blank(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for some of it."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def moves(spread: Spread, key: str) -> bool:
    """Whether an array is with owners, and not like the parameter where its shards are."""
    return key != "master" and (len(spread.owners) > 0 or spread.is_number(key))


def arrays_of(spread: Spread, device: torch.device, to: int | None = None) -> list[Array]:
    """The arrays that move.

    Args:
        spread: of the parameter.
        device: of its shards.
        to: the rank that is to have all of a parameter that is not a DTensor; None: every one.
    """
    arrays = []
    num_batch, size = len(spread.layout.batch), spread.team.size
    owners = spread.owners
    if not owners:
        first = next(rank for rank, box in enumerate(spread.cut.boxes) if box.numel > 0)
        owners = (first,)
    for key, (shape, dtype) in spread.layout.shapes().items():
        if not moves(spread, key):
            continue
        if spread.mesh is None:
            cut = copies(shape, num_batch, size, to)
        elif spread.is_number(key):
            cut = copies(shape, num_batch, size)
        elif shape == spread.cut.shape:
            cut = spread.cut
        else:
            cut = cut_by_rows(shape, num_batch, size)
        place = torch.device("cpu") if key in HOST_KEYS else device
        arrays.append(Array(spread, key, dtype, cut, owners, place))
    return arrays


def batches(arrays: Iterable[Array]) -> Iterator[list[Array]]:
    """Arrays of one team and dtype, of about BATCH_BYTES for each rank."""

    def kind(array: Array) -> tuple[tuple[int, ...], str]:
        return array.spread.team.ranks, str(array.dtype)

    for _, alike in itertools.groupby(sorted(arrays, key=kind), kind):
        batch: list[Array] = []
        for array in alike:
            batch.append(array)
            if sum(some.nbytes for some in batch) >= BATCH_BYTES * array.spread.team.size:
                yield batch
                batch = []
        if batch:
            yield batch


class Piece(NamedTuple):
    """A part of one matrix of an array."""

    array: Array
    matrix: int
    box: Box


def _moved(
    team: Team, routes: Iterable[tuple[int, int, Piece]], read: Callable[[Piece], Tensor]
) -> Iterator[tuple[Piece, Tensor]]:
    """Sends pieces; gives those that this rank receives, with their values.

    Args:
        team: of all of them.
        routes: the sender and the receiver of each piece, in one order on all ranks.
        read: the values of a piece that this rank sends.
    """
    outgoing: list[list[Tensor]] = [[] for _ in team.ranks]
    incoming: list[list[Piece]] = [[] for _ in team.ranks]
    dtype = None
    for sender, receiver, piece in routes:
        dtype = piece.array.dtype
        if sender == receiver == team.rank:
            yield piece, read(piece)
        elif sender == team.rank:
            outgoing[receiver].append(read(piece).to(team.device))
        elif receiver == team.rank:
            incoming[sender].append(piece)
    if dtype is None:
        return
    sizes = [[piece.box.numel for piece in some] for some in incoming]
    received = Swap(team, outgoing, sizes, dtype).wait(team.device)
    for some, values in zip(incoming, received, strict=True):
        for piece, value in zip(some, values, strict=True):
            yield piece, value.view(piece.box.size)


def at_rest(
    states: Mapping[Spread, State], devices: Mapping[Spread, torch.device], to: int | None = None
) -> dict[Spread, State]:
    """The states as they are saved; all ranks together.

    Args:
        states: what this rank has of each parameter; {} for nothing.
        devices: of the shards.
        to: see :func:`arrays_of`.
    """
    found: dict[Spread, State] = {spread: {} for spread in states}
    arrays = [array for spread in states for array in arrays_of(spread, devices[spread], to)]
    for batch in batches(arrays):
        team = batch[0].spread.team
        blanks = {
            (array.spread, array.key): array.blank(array.cut.boxes[team.rank].size)
            for array in batch
        }

        def read(piece: Piece) -> Tensor:
            spread, key = piece.array.spread, piece.array.key
            value = states[spread][key]
            place = spread.owned.index(piece.matrix)
            return piece.box.within(value[place] if spread.layout.batch else value)

        routes = (
            (owner, rank, Piece(array, matrix, box))
            for array in batch
            for matrix, owner in enumerate(array.owners)
            for box, ranks in array.cut.holders(matrix).items()
            for rank in ranks
        )
        for piece, value in _moved(team, routes, read):
            local = blanks[piece.array.spread, piece.array.key]
            piece.array.cut.local_part(local, team.rank, piece.matrix).copy_(value)
        for array in batch:
            local = blanks[array.spread, array.key]
            if to is None or to == team.rank or array.spread.mesh is not None:
                found[array.spread][array.key] = _as_saved(array, local)
    for spread, state in states.items():
        for key, (shape, _) in spread.layout.shapes().items():
            if key in state and not moves(spread, key):
                value = state[key].view(spread.box.size)
                found[spread][key] = value if spread.mesh is None else _like(spread, value, shape)
        if found[spread]:
            found[spread] = {key: found[spread][key] for key in spread.layout.shapes()}
    return found


def _as_saved(array: Array, local: Tensor) -> Tensor:
    spread = array.spread
    if spread.mesh is None or spread.is_number(array.key):
        return local
    if array.cut is spread.cut:
        return _like(spread, local, array.cut.shape)
    return DTensor.from_local(
        local,
        spread.team.mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size(array.cut.shape),
        stride=_strides(array.cut.shape),
    )


def _like(spread: Spread, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    assert spread.mesh is not None
    return DTensor.from_local(
        local,
        spread.mesh,
        spread.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=_strides(shape),
    )


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def at_work(
    saved: Mapping[Spread, Mapping[str, Tensor]], devices: Mapping[Spread, torch.device]
) -> dict[Spread, State]:
    """What this rank keeps of saved states; all ranks together.

    Args:
        saved: DTensors, or whole tensors that are the same on all ranks.
        devices: of the shards.
    """
    found: dict[Spread, State] = {
        spread: {} if spread.owned else spread.empty_state(devices[spread]) for spread in saved
    }
    arrays = []
    for spread, state in saved.items():
        device = devices[spread]
        for array in arrays_of(spread, device):
            value = state[array.key]
            if not isinstance(value, DTensor):
                arrays.append(array._replace(cut=_whole(array)))
            elif _lies_as(array, value):
                arrays.append(array)
            else:
                arrays.append(array._replace(cut=_whole(array)))
                state = {**state, array.key: value.full_tensor()}
            if spread.owned:
                batch = (len(spread.owned),) if spread.layout.batch else ()
                tail = array.cut.matrix_shape
                found[spread][array.key] = array.blank((*batch, *tail))
        saved = {**saved, spread: state}
        for key in spread.layout.shapes():
            if not moves(spread, key):
                local = _local_like(spread, state[key])
                if spread.owned or key == "master":
                    found[spread][key] = local.to(device).contiguous().clone()
    for batch_of in batches(arrays):
        _fill(batch_of, saved, found)
    return found


def _fill(
    batch: Sequence[Array],
    saved: Mapping[Spread, Mapping[str, Tensor]],
    found: Mapping[Spread, State],
) -> None:
    team = batch[0].spread.team

    def read(piece: Piece) -> Tensor:
        value = saved[piece.array.spread][piece.array.key]
        local = value.to_local() if isinstance(value, DTensor) else value
        return piece.array.cut.local_part(local, team.rank, piece.matrix)

    def sender(owner: int, matrix: int, ranks: Sequence[int]) -> int:
        return owner if owner in ranks else ranks[matrix % len(ranks)]

    routes = (
        (sender(owner, matrix, ranks), owner, Piece(array, matrix, box))
        for array in batch
        for matrix, owner in _receivers(array)
        for box, ranks in array.cut.holders(matrix).items()
    )
    for piece, value in _moved(team, routes, read):
        spread = piece.array.spread
        whole = found[spread][piece.array.key]
        place = spread.owned.index(piece.matrix)
        piece.box.within(whole[place] if spread.layout.batch else whole).copy_(value)


def _receivers(array: Array) -> Iterator[tuple[int, int]]:
    """Each matrix with those that keep it: its owner, or all that hold a part of it."""
    if array.spread.owners:
        yield from enumerate(array.owners)
    else:
        for rank, box in enumerate(array.spread.cut.boxes):
            if box.numel > 0:
                yield 0, rank


def _whole(array: Array) -> Cut:
    return copies(array.cut.shape, array.cut.num_batch, array.spread.team.size)


def _lies_as(array: Array, value: DTensor) -> bool:
    spread = array.spread
    if array.cut is spread.cut:
        return value.device_mesh == spread.mesh and value.placements == spread.placements
    same = value.device_mesh == spread.team.mesh and tuple(value.placements) == (Shard(0),)
    return spread.mesh is not None and not spread.is_number(array.key) and same


def _local_like(spread: Spread, value: Tensor) -> Tensor:
    """This rank's shard of an array of the parameter's shape."""
    if isinstance(value, DTensor):
        if value.device_mesh == spread.mesh and value.placements == spread.placements:
            return value.to_local()
        value = value.full_tensor()
    return spread.box.within(value)
