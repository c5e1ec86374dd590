"""Gradients to the owners of matrices, and updates back to the shards, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dykaf import ops
from dykaf.distributed.cut import Box
from dykaf.distributed.plan import Plan, Spread, Team
from dykaf.distributed.wire import Swap
from dykaf.options import StepOptions
from dykaf.state import State
from dykaf.work import Entry

# Of gradients that an owner gets at one time, unless a single parameter's are more.
BUCKET_BYTES = 2**25
# Exchanges of gradients that are under way while a bucket is worked on.
NUM_AHEAD = 2
# In place of a matrix's step with its update: its first gradient is yet to come or was this one, or
# it could not be updated.
NO_UPDATE, FAILED = 0, -1


class Taken(NamedTuple):
    """A sharded parameter in a step."""

    param: Tensor
    spread: Spread
    shard: Tensor
    grad: Tensor | None  # of the shard, contiguous; None: zero
    differs: bool = False  # the gradient's placements from the parameter's


@dataclass
class ShardEntry(Entry):
    """What this rank works on of a sharded parameter."""

    taken: Taken | None = None

    def new_state(self) -> State:
        """Zero state of all that this rank owns of the parameter."""
        assert self.taken is not None
        return self.taken.spread.new_state(self.taken.shard)


class Piece(NamedTuple):
    """A part of a matrix."""

    spread: Spread
    matrix: int
    box: Box  # in the matrix's coordinates
    chunk: slice  # of the part's elements

    @property
    def numel(self) -> int:
        """Of the chunk."""
        return int(self.chunk.stop - self.chunk.start)


@dataclass
class Bucket:
    """What is exchanged together; every list of lists is by the other rank."""

    team: Team
    dtype: torch.dtype
    spreads: list[Spread] = field(default_factory=list)  # of which this rank owns something
    grads_out: list[list[Piece]] = field(default_factory=list)
    grads_in: list[list[Piece]] = field(default_factory=list)
    updates_out: list[list[Piece]] = field(default_factory=list)
    updates_in: list[list[Piece]] = field(default_factory=list)
    copies_out: list[list[Piece]] = field(default_factory=list)
    copies_in: list[list[Piece]] = field(default_factory=list)
    # Whether anything goes from one rank to another, on any of them.
    sends_grads: bool = False
    sends_updates: bool = False
    sends_copies: bool = False

    def __post_init__(self) -> None:
        ways_out = (self.grads_out, self.updates_out, self.copies_out)
        for routes in (*ways_out, self.grads_in, self.updates_in, self.copies_in):
            routes.extend([] for _ in self.team.ranks)

    @property
    def own_dtype(self) -> torch.dtype:
        """Of updates: the state's."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def add(self, spread: Spread, owner: int) -> None:
        """Takes what an owner has of a parameter."""
        me = self.team.rank
        if owner == me:
            self.spreads.append(spread)
        for matrix, other in enumerate(spread.owners):
            if other != owner:
                continue
            for box, ranks in spread.cut.holders(matrix).items():
                piece = Piece(spread, matrix, box, slice(0, box.numel))
                sender = spread.sender(matrix, ranks)
                self.sends_grads |= sender != owner
                self.sends_updates |= ranks != [owner]
                self.sends_copies |= len(ranks) > 1
                if sender == me:
                    self.grads_out[owner].append(piece)
                if owner == me:
                    self.grads_in[sender].append(piece)
                if me in ranks or owner == me:
                    self._add_update(piece, owner, ranks)

    def _add_update(self, piece: Piece, owner: int, ranks: Sequence[int]) -> None:
        """From the owner to the holders, a chunk to each, and of it a copy to the others."""
        me = self.team.rank
        numel, count = piece.box.numel, len(ranks)
        for place, rank in enumerate(ranks):
            chunk = slice(numel * place // count, numel * (place + 1) // count)
            part = piece._replace(chunk=chunk)
            if owner == me:
                self.updates_out[rank].append(part)
            if rank == me:
                self.updates_in[owner].append(part)
                for other in ranks:
                    if other != me:
                        self.copies_out[other].append(part)
            elif me in ranks:
                self.copies_in[rank].append(part)


def buckets_of(plan: Plan) -> list[Bucket]:
    """The buckets of a plan, the same on all ranks of a team and in one order."""
    found: list[Bucket] = []
    for team in plan.teams:
        filled: dict[tuple[str, int], Bucket] = {}
        taken: dict[tuple[int, torch.dtype], int] = {}
        for spread in plan.by_id.values():
            if spread.team is not team or not spread.owners or spread.stays:
                continue
            dtype = spread.dtype
            size = dtype.itemsize * spread.layout.m * spread.layout.n
            for owner in sorted(set(spread.owners)):
                before = taken.get((owner, dtype), 0)
                taken[owner, dtype] = before + size * spread.owners.count(owner)
                key = (str(dtype), before // BUCKET_BYTES)
                if key not in filled:
                    filled[key] = Bucket(team, dtype)
                filled[key].add(spread, owner)
        found += [filled[key] for key in sorted(filled)]
    return found


def entries_of(taken: Taken, tensors: Tensor, grads: Tensor, with_master: bool) -> list[ShardEntry]:
    """An entry for each run of successive matrices that this rank owns.

    Args:
        taken: the parameter.
        tensors: what is to be updated of all these matrices, one after the other.
        grads: of ``tensors``.
        with_master: whether the step keeps the master copy.
    """
    spread = taken.spread
    entries = []
    for first, place, count in spread.runs:
        part = slice(place, place + count)
        layout = spread.layout_of(count, with_master)
        entries.append(
            ShardEntry(
                param=taken.param,
                tensor=tensors[part].view(layout.shape),
                grad=grads[part].view(layout.shape),
                layout=layout,
                index=spread.index,
                name=spread.name,
                first=first,
                part=part if spread.layout.batch else None,
                taken=taken,
            )
        )
    return entries


class BucketStep:
    """One step of a bucket.

    Args:
        bucket: its routes.
        taken: the sharded parameters with a gradient on any rank, by their places in the optimizer.
        states: of all parameters.
    """

    def __init__(
        self, bucket: Bucket, taken: Mapping[int, Taken], states: Mapping[Tensor, State]
    ) -> None:
        self._bucket = bucket
        self._taken = taken
        self._states = states
        self._swap: Swap | None = None
        self._stand_ins: dict[int, Tensor] = {}
        self._failed: set[tuple[int, int]] = set()
        self._updates: Swap | None = None

    def _present(self, pieces: Iterable[Piece]) -> list[Piece]:
        return [piece for piece in pieces if piece.spread.index in self._taken]

    def _state(self, spread: Spread) -> State:
        return self._states.get(self._taken[spread.index].param, {})

    @property
    def _device(self) -> torch.device:
        return next(iter(self._taken.values())).shard.device

    def _others(self, pieces: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
        """Of all ranks but this one."""
        me = self._bucket.team.rank
        return [[] if rank == me else self._present(some) for rank, some in enumerate(pieces)]

    def _mine(self, pieces: Sequence[Sequence[Piece]]) -> list[Piece]:
        return self._present(pieces[self._bucket.team.rank])

    def send_grads(self) -> None:
        """Starts to send this rank's parts of the gradients to the owners."""
        bucket = self._bucket
        if bucket.sends_grads:
            outgoing = [[self._grad(p) for p in some] for some in self._others(bucket.grads_out)]
            incoming = [[p.box.numel for p in some] for some in self._others(bucket.grads_in)]
            self._swap = Swap(bucket.team, outgoing, incoming, bucket.dtype)

    def _grad(self, piece: Piece) -> Tensor:
        taken = self._taken[piece.spread.index]
        if taken.grad is None:
            return taken.shard.new_zeros(piece.box.size)
        return piece.spread.cut.local_part(taken.grad, self._bucket.team.rank, piece.matrix)

    def entries(self) -> list[ShardEntry]:
        """The whole matrices that this rank owns, with their gradients, once these are there.

        An entry's tensor is zero and stands for the parameter: a step at the rate -1 without decay
        leaves the update there.
        """
        bucket = self._bucket
        mine = [spread for spread in bucket.spreads if spread.index in self._taken]
        wholes = {
            spread.index: torch.zeros(
                (len(spread.owned), *spread.cut.matrix_shape),
                dtype=bucket.own_dtype,
                device=self._device,
            )
            for spread in mine
        }
        pieces = [(p, self._grad(p)) for p in self._mine(bucket.grads_in)]
        if self._swap is not None:
            received, self._swap = self._swap.wait(self._device), None
            for some, values in zip(self._others(bucket.grads_in), received, strict=True):
                pieces += zip(some, values, strict=True)
        for piece, value in pieces:
            place = piece.spread.owned.index(piece.matrix)
            whole = piece.box.within(wholes[piece.spread.index][place])
            whole.copy_(value.view(piece.box.size))
        entries = []
        for spread in mine:
            stand_in = torch.zeros_like(wholes[spread.index])
            self._stand_ins[spread.index] = stand_in
            taken = self._taken[spread.index]
            entries += entries_of(taken, stand_in, wholes[spread.index], with_master=False)
        return entries

    def note_failed(self, entry: Entry) -> None:
        """Of matrices that could not be updated."""
        last = entry.first + entry.layout.count
        self._failed.update((entry.index, matrix) for matrix in range(entry.first, last))

    def note_all_failed(self) -> list[str]:
        """Of all that this rank owns here; their names."""
        mine = [spread for spread in self._bucket.spreads if spread.index in self._taken]
        self._failed.update((spread.index, matrix) for spread in mine for matrix in spread.owned)
        return [spread.name for spread in mine]

    def send_updates(self) -> None:
        """Starts to send the updates, each behind the step that it is of."""
        bucket = self._bucket
        if bucket.sends_updates:
            outgoing = [
                [_with_step(self._header(p), self._update(p)) for p in some]
                for some in self._others(bucket.updates_out)
            ]
            incoming = [[1 + p.numel for p in some] for some in self._others(bucket.updates_in)]
            self._updates = Swap(bucket.team, outgoing, incoming, bucket.own_dtype)

    def _header(self, piece: Piece) -> Tensor:
        index = piece.spread.index
        dtype = self._bucket.own_dtype
        if (index, piece.matrix) in self._failed:
            return torch.full((), FAILED, dtype=dtype, device=self._device)
        place = piece.spread.owned.index(piece.matrix)
        return self._state(piece.spread)["step"].reshape(-1)[place].to(dtype)

    def _update(self, piece: Piece) -> Tensor:
        if piece.spread.index not in self._stand_ins:  # there was no memory for it
            shard = self._taken[piece.spread.index].shard
            return shard.new_zeros(piece.numel, dtype=self._bucket.own_dtype)
        place = piece.spread.owned.index(piece.matrix)
        update = piece.box.within(self._stand_ins[piece.spread.index][place])
        return update.reshape(-1)[piece.chunk]

    def apply(self, options: Callable[[int], StepOptions]) -> list[str]:
        """Updates this rank's shards; waits for the updates of the other ranks.

        Replicas get chunks from the owner, which they pass on to each other: no rank sends more
        than its own shard's size for copies.

        Args:
            options: of a group, by its place.

        Returns:
            the names of parameters that an owner could not update.
        """
        bucket = self._bucket
        pieces = [(p, self._header(p), self._update(p)) for p in self._mine(bucket.updates_in)]
        self._stand_ins = {}
        if self._updates is not None:
            received, self._updates = self._updates.wait(self._device), None
            for some, values in zip(self._others(bucket.updates_in), received, strict=True):
                pieces += [(p, x[0], x[1:]) for p, x in zip(some, values, strict=True)]
        if not bucket.sends_copies:
            return self._apply(pieces, options)
        mine = {(p.spread.index, p.matrix): _with_step(step, x) for p, step, x in pieces}
        outgoing = [
            [mine[p.spread.index, p.matrix] for p in self._present(some)]
            for some in bucket.copies_out
        ]
        copied = [self._present(some) for some in bucket.copies_in]
        incoming = [[1 + p.numel for p in some] for some in copied]
        copies = Swap(bucket.team, outgoing, incoming, bucket.own_dtype).wait(self._device)
        for some, values in zip(copied, copies, strict=True):
            pieces += [(p, x[0], x[1:]) for p, x in zip(some, values, strict=True)]
        return self._apply(_joined(pieces), options)

    def _apply(
        self,
        pieces: Sequence[tuple[Piece, Tensor, Tensor]],
        options: Callable[[int], StepOptions],
    ) -> list[str]:
        if not pieces:
            return []
        steps = torch.stack([step for _, step, _ in pieces]).float()
        failed = []
        by_group: dict[int, list[tuple[Piece, Tensor, Tensor]]] = {}
        for (piece, _, update), step, number in zip(pieces, steps, steps.tolist(), strict=True):
            if number == FAILED:
                failed.append(piece.spread.name)
            elif number != NO_UPDATE:
                found = by_group.setdefault(piece.spread.group_idx, [])
                found.append((piece, step, update.contiguous()))
        for group_idx, some_pieces in by_group.items():
            self._apply_group(some_pieces, options(group_idx))
        return failed

    def _apply_group(
        self, pieces: Sequence[tuple[Piece, Tensor, Tensor]], options: StepOptions
    ) -> None:
        me = self._bucket.team.rank
        params, updates, states, streams, places = [], [], [], [], []
        for piece, step, update in pieces:
            spread = piece.spread
            params.append(spread.cut.local_part(self._taken[spread.index].shard, me, piece.matrix))
            updates.append(update)
            state = {"step": step}
            if spread.layout.master:
                master = self._state(spread)["master"]
                state["master"] = spread.cut.local_part(master, me, piece.matrix)
            states.append(state)
            streams.append((spread.index << 32) + piece.matrix)
            places.append(spread.place(piece.matrix))
        ops.apply_update_(params, updates, states, streams, options, places)


def _with_step(step: Tensor, update: Tensor) -> Tensor:
    return torch.cat([step.view(1), update])


def _joined(chunks: Sequence[tuple[Piece, Tensor, Tensor]]) -> list[tuple[Piece, Tensor, Tensor]]:
    """Parts of matrices from their chunks."""
    by_part: dict[tuple[int, int], list[tuple[Piece, Tensor, Tensor]]] = {}
    for chunk in chunks:
        by_part.setdefault((chunk[0].spread.index, chunk[0].matrix), []).append(chunk)
    joined = []
    for some in by_part.values():
        some.sort(key=lambda chunk: int(chunk[0].chunk.start))
        piece, step, _ = some[0]
        joined.append((piece, step, torch.cat([update for _, _, update in some])))
    return joined
