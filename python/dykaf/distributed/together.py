"""A step of many processes: each matrix is worked on by its owner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from dykaf import ops
from dykaf.checks import param_name
from dykaf.distributed.alone import Alone, Part
from dykaf.distributed.checkpoint import at_rest, at_work
from dykaf.distributed.describe import describe
from dykaf.distributed.exchange import (
    NUM_AHEAD,
    Bucket,
    BucketStep,
    ShardEntry,
    Taken,
    buckets_of,
    entries_of,
)
from dykaf.distributed.plan import Plan, Spread, Team, Teams, world
from dykaf.distributed.wire import agree_max
from dykaf.nonfinite import POLICIES, culprit_flag
from dykaf.options import StepOptions, step_options
from dykaf.state import STRUCTURAL_OPTIONS, State
from dykaf.work import Entry, GroupWork


class BucketPart(Part):
    """A bucket of matrices.

    Its updates go out at the end even if they could not be made: the other ranks wait for them.
    """

    def __init__(self, step: BucketStep, work: list[GroupWork], errors: list[Exception]) -> None:
        super().__init__(work, [item.grad_maxima() for item in work])
        self._step = step
        self._errors = errors

    def note_failed(self, entries: Sequence[Entry]) -> None:
        """The other ranks hear of them too."""
        for entry in entries:
            self._step.note_failed(entry)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if exception is not None:
            if not isinstance(exception, Exception):
                return False
            self._errors.append(exception)
            for item in self.work:
                self.note_failed(item.entries)
        self._step.send_updates()
        return True


class LocalPart(Part):
    """What stays on this rank."""

    def __init__(
        self, work: list[GroupWork], maxima: list[Tensor], errors: list[Exception], names: list[str]
    ) -> None:
        super().__init__(work, maxima)
        self._errors = errors
        self._names = names

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if exception is None or not isinstance(exception, Exception):
            return False
        self._errors.append(exception)
        self._names += [entry.name for item in self.work for entry in item.entries]
        return True


class Together(Alone):
    """Steps of an optimizer with sharded parameters.

    Args:
        process_group: over which plain parameters, equal on all its ranks, share work and state;
            None: they are this process's own.
    """

    is_shared = True

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.plan: Plan | None = None
        self._key: object = None
        self._teams = Teams()
        self._buckets: list[Bucket] = []
        self._groups: Sequence[dict[str, Any]] = []
        self._states: MutableMapping[Tensor, State] = {}
        self._taken: list[Taken] = []
        self._errors: list[Exception] = []
        self._consolidated: dict[Tensor, State] | None = None
        self._gathers = False
        self._failed: list[str] = []

    def prepare(
        self, param_groups: Sequence[dict[str, Any]], states: MutableMapping[Tensor, State]
    ) -> None:
        """Makes a plan if there is none for these parameters and options; all ranks together."""
        self._groups, self._states = param_groups, states
        self._taken, self._errors, self._failed = [], [], []
        key = [
            (
                *(group[option] for option in STRUCTURAL_OPTIONS),
                group["orthogonalize"],
                group["precondition_frequency"],
                *(_key_of(param) for param in group["params"]),
            )
            for group in param_groups
        ]
        if key == self._key:
            return
        names, teams = {}, {}
        for group_idx, group in enumerate(param_groups):
            for idx, param in enumerate(group["params"]):
                names[id(param)] = param_name(group, group_idx, idx)
                if param.numel() == 0:
                    continue
                if isinstance(param, DTensor):
                    teams[id(param)] = self._teams.of_mesh(param.device_mesh)
                elif self.process_group is not None and param.requires_grad:
                    teams[id(param)] = self._teams.of_group(self.process_group, param.device.type)
        plan = Plan(param_groups, names, teams, self.plan)
        for group in param_groups:
            for param in group["params"]:
                spread = plan.of(param)
                if spread is not None and param in states:
                    spread.check(states[param])
        self.plan, self._key = plan, key
        self._buckets = buckets_of(plan)

    def of(self, param: Tensor) -> Spread | None:
        """How a parameter is spread."""
        return None if self.plan is None else self.plan.of(param)

    def take(self, param: Tensor) -> None:
        """Takes a sharded parameter with or without a gradient into the step."""
        spread = self.of(param)
        assert spread is not None
        grad = None
        if param.grad is not None:
            grad = param.grad
            if isinstance(grad, DTensor):
                if grad.placements != spread.placements:
                    grad = grad.redistribute(placements=spread.placements)
                grad = local_of(grad)
            grad = grad.resolve_neg().contiguous()
        self._taken.append(Taken(param, spread, local_of(param), grad))

    def agree(self, flags: Sequence[int]) -> list[int]:
        """The largest of each flag over all ranks, with those of the shards.

        A parameter that has a gradient on no rank leaves the step.
        """
        flags = list(flags)
        team = self._widest()
        if team is None:
            return flags
        with_grad = [taken for taken in self._taken if taken.grad is not None]
        for device in {taken.shard.device for taken in with_grad}:
            some = [taken for taken in with_grad if taken.shard.device == device]
            grads = [taken.grad for taken in some if taken.grad is not None]
            maxima = ops.grad_max(grads, [1] * len(some))
            for taken, is_finite in zip(some, maxima.isfinite().tolist(), strict=True):
                policy = taken.spread.group["nonfinite"]
                if policy in POLICIES and not is_finite:
                    place = POLICIES.index(policy)
                    flags[place] = max(flags[place], culprit_flag(taken.spread.index))
        present = [int(taken.grad is not None) for taken in self._taken]
        flags, present = _split(agree_max(team, flags + present), len(flags))
        self._taken = [t for t, is_there in zip(self._taken, present, strict=True) if is_there]
        return flags

    def _widest(self) -> Team | None:
        """The team that all others of this rank are parts of, or the whole world."""
        teams = [] if self.plan is None else self.plan.teams
        if not teams:
            return None
        widest = max(teams, key=lambda team: team.size)
        if all(set(team.ranks) <= set(widest.ranks) for team in teams):
            return widest
        return self._teams.of_group(world(), widest.device.type)

    def parts(self, work: list[GroupWork], maxima: list[Tensor]) -> Iterator[Part]:
        """First what stays on this rank, while the first gradients travel; then each bucket."""
        self._consolidated = None
        taken = {taken.spread.index: taken for taken in self._taken}
        for param, spread, shard, _ in self._taken:
            if not spread.owned and param not in self._states:
                # Every rank has an entry for every parameter: checkpoints ask for it.
                self._states[param] = spread.new_state(shard)
        steps = [BucketStep(bucket, taken, self._states) for bucket in self._buckets]
        for step in steps[:NUM_AHEAD]:
            step.send_grads()
        here = _work_of([entry for some in self._taken for entry in _entries_here(some)])
        maxima = maxima + [item.grad_maxima() for item in here]
        yield LocalPart(work + here, maxima, self._errors, self._failed)
        for place, step in enumerate(steps):
            for ahead in steps[place + NUM_AHEAD : place + NUM_AHEAD + 1]:
                ahead.send_grads()
            yield BucketPart(step, _work_of(step.entries(), stands_in=True), self._errors)
            if place > 0:
                self._failed += steps[place - 1].apply(self._options)
        if steps:
            self._failed += steps[-1].apply(self._options)

    def _options(self, spread: Spread) -> StepOptions:
        return step_options(spread.group)

    def describe(self) -> str:
        """Who works on what."""
        return describe(self.plan) if self.plan is not None else super().describe()

    def consolidate(self, to: int | None) -> None:
        """Gathers the state of parameters that are shared over the group."""
        self._gathers = to is None
        if to is not None:
            params = [param for param in self._states if self._is_of_group(param)]
            gathered = self._saved(params, to)
            is_here = self.process_group is not None and to == dist.get_rank(self.process_group)
            self._consolidated = gathered if is_here else None

    def at_rest(self, state_dict: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
        """A state_dict with the state of sharded parameters as it is saved; all ranks together.

        Raises:
            RuntimeError: where the state of parameters of the group has not been gathered here.
        """
        spread = [param for param in params if param in self._states and self.of(param) is not None]
        of_group = [param for param in spread if self._is_of_group(param)]
        if self._gathers:
            self._consolidated = self._saved(of_group)
        if self._consolidated is None and of_group:
            raise RuntimeError(
                "state_dict: expected optimizer.consolidate_state_dict(to=...) on all ranks of "
                "process_group before it, and this rank among those that it names (None: all), "
                "got a part of the state here"
            )
        saved = self._saved([param for param in spread if not self._is_of_group(param)])
        saved.update(self._consolidated or {})
        places = {id(param): place for place, param in enumerate(params)}
        state = {**state_dict["state"], **{places[id(p)]: saved[p] for p in spread}}
        # In the same order on all ranks: what gathers a whole one goes through it in its order.
        first = {place: state.pop(place) for place in range(len(params)) if place in state}
        return {**state_dict, "state": {**first, **state}}

    def _is_of_group(self, param: Tensor) -> bool:
        spread = self.of(param)
        return spread is not None and spread.mesh is None

    def _saved(self, params: Sequence[Tensor], to: int | None = None) -> dict[Tensor, State]:
        spreads, devices = self._spreads_of(params)
        states = {spread: self._states[param] for param, spread in spreads.items()}
        saved = at_rest(states, devices, to)
        return {param: saved[spread] for param, spread in spreads.items()}

    def at_work(self, states: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[Tensor, State]:
        """What this rank keeps of the saved states of sharded parameters; all ranks together."""
        self._consolidated = None
        spreads, devices = self._spreads_of(states)
        kept = at_work({spread: states[param] for param, spread in spreads.items()}, devices)
        return {param: kept[spread] for param, spread in spreads.items()}

    def _spreads_of(
        self, params: Iterable[Tensor]
    ) -> tuple[dict[Tensor, Spread], dict[Spread, torch.device]]:
        spreads = {param: spread for param in params if (spread := self.of(param)) is not None}
        return spreads, {spread: local_of(param).device for param, spread in spreads.items()}

    def failed(self) -> list[str]:
        """The names of parameters that the last step could not update, on any rank."""
        self.error = self._errors[0] if self._errors else None
        return self._failed


def _key_of(param: Tensor) -> tuple[object, ...]:
    mesh = (param.device_mesh, param.placements) if isinstance(param, DTensor) else None
    return (id(param), mesh, param.shape, param.dtype, param.device, param.requires_grad)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # torch
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _entries_here(taken: Taken) -> list[ShardEntry]:
    """What is updated where it is."""
    spread, shard = taken.spread, taken.shard
    grad = torch.zeros_like(shard) if taken.grad is None else taken.grad
    if spread.owners:
        if not spread.stays or not spread.owned:
            return []
        shape = (len(spread.owned), *spread.cut.matrix_shape)
        return entries_of(taken, shard.view(shape), grad.view(shape), with_master=True)
    if not spread.owned:
        return []
    entry = ShardEntry(
        param=taken.param,
        tensor=shard,
        grad=grad,
        layout=spread.local_layout,
        index=spread.index,
        name=spread.name,
        place=spread.place(0),
        taken=taken,
    )
    return [entry]


def _work_of(entries: Iterable[ShardEntry], stands_in: bool = False) -> list[GroupWork]:
    """Entries by group and device."""
    found: dict[tuple[int, torch.device], GroupWork] = {}
    for entry in entries:
        assert entry.taken is not None
        group, device = entry.taken.spread.group, entry.tensor.device
        key = (id(group), device)
        if key not in found:
            found[key] = GroupWork(group, device, False, [], stands_in)
        found[key].entries.append(entry)
    return list(found.values())


def _split(numbers: Sequence[int], place: int) -> tuple[list[int], list[int]]:
    return list(numbers[:place]), list(numbers[place:])
