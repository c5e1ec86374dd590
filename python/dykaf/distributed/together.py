"""A step of many processes: each matrix is worked on by its owner."""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

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
from dykaf.distributed.plan import OPTIONS, Plan, Spread, Team, Teams
from dykaf.distributed.wire import agree_max
from dykaf.nonfinite import POLICIES, culprit_flag
from dykaf.options import StepOptions, step_options
from dykaf.state import State, shape_of
from dykaf.work import Entry, GroupWork


class BucketPart(Part):
    """A bucket of matrices.

    Its updates go out at the end even if they could not be made: the other ranks wait for them.
    """

    def __init__(
        self,
        step: BucketStep,
        work_of: Callable[[Iterable[ShardEntry], bool], list[GroupWork]],
        errors: list[Exception],
        failed: list[str],
    ) -> None:
        self._step = step
        self._work_of = work_of
        self._errors = errors
        self._failed = failed

    # Made when they are asked for: within the context, as they may need more memory than there is.
    # (mypy would have attributes, as they are in Part.)
    @cached_property
    def work(self) -> list[GroupWork]:  # type: ignore[override]
        """Whole matrices with their gradients."""
        return self._work_of(self._step.entries(), True)

    @cached_property
    def maxima(self) -> list[Tensor]:  # type: ignore[override]
        """Of each item's gradients."""
        return [item.grad_maxima() for item in self.work]

    def note_failed(self, entries: Sequence[Entry]) -> None:
        """The other ranks hear of them too."""
        for entry in entries:
            self._step.note_failed(entry)

    def end(self, exception: BaseException | None) -> bool:
        """The other ranks get what there is, or hear that there is nothing."""
        if exception is not None:
            if not isinstance(exception, Exception):
                return False
            self._errors.append(exception)
            self._failed += self._step.note_all_failed()
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

    def end(self, exception: BaseException | None) -> bool:
        """The buckets come after it, whatever happened here."""
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
        self._taken: dict[int, Taken] = {}  # by place in the optimizer
        self._errors: list[Exception] = []
        self._consolidated: dict[Tensor, State] | None = None
        self._gathers = False
        self._failed: list[str] = []

    def prepare(
        self,
        param_groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, State],
        loaded: Collection[Tensor] | None = None,
    ) -> None:
        """Makes a plan if there is none for these parameters and options; all ranks together."""
        self._groups, self._states = param_groups, states
        self.release()
        with_state = states if loaded is None else loaded
        key = [
            (
                *(group[option] for option in OPTIONS),
                *(
                    _Key(param, param.requires_grad or param in with_state)
                    for param in group["params"]
                ),
            )
            for group in param_groups
        ]
        if key == self._key:
            return
        former = {}
        if self.plan is not None and loaded is None:
            former = {id(p): spread for p in states if (spread := self.plan.of(p)) is not None}
        names, teams = {}, {}
        for group_idx, group in enumerate(param_groups):
            for idx, param in enumerate(group["params"]):
                names[id(param)] = param_name(group, group_idx, idx)
                # A frozen parameter that never moved has no part in anything.
                is_out = not (param.requires_grad or param in with_state)
                if is_out or is_lazy(param) or param.numel() == 0:
                    continue
                if isinstance(param, DTensor):
                    teams[id(param)] = self._teams.of_mesh(param.device_mesh)
                elif self.process_group is not None:
                    teams[id(param)] = self._teams.of_group(self.process_group, param.device.type)
        plan = Plan(param_groups, names, teams, former)
        for param, state in states.items():
            spread = plan.of(param)
            if spread is not None:
                spread.check(state)
        self.plan, self._key = plan, key
        self._buckets = buckets_of(plan)

    def release(self) -> None:
        """Lets go of what a step has held."""
        self._taken, self._errors, self._failed = {}, [], []

    def of(self, param: Tensor) -> Spread | None:
        """How a parameter is spread."""
        return None if self.plan is None else self.plan.of(param)

    def take(self, param: Tensor) -> None:
        """Takes a sharded parameter with or without a gradient into the step."""
        spread = self.of(param)
        assert spread is not None
        grad, differs = param.grad, False
        if isinstance(grad, DTensor):
            differs = tuple(grad.placements) != spread.placements
            grad = local_of(grad)
        if grad is not None:
            grad = grad.resolve_neg().contiguous()
        self._taken[spread.index] = Taken(param, spread, local_of(param), grad, differs)

    def agree(self, flags: Sequence[int]) -> list[int]:
        """The largest of each flag over all ranks, with those of the shards.

        A parameter that has a gradient on no rank leaves the step. Gradients whose placements are
        not their parameter's, such as partial sums, get these.

        Raises:
            RuntimeError: on all ranks for such a gradient that some of them lack.
        """
        if self.plan is None:
            return list(flags)
        flags = self._with_shards(flags)
        wanted: list[Taken] = []
        for turn in range(2):
            for team in self.plan.teams:
                if turn == 0:
                    flags, seen = self._see(team, flags)
                    wanted += seen
                elif self.plan.passes[team] > 1:
                    flags = agree_max(team, flags)
        self._taken = {taken.spread.index: taken for taken in wanted}
        return flags

    def _with_shards(self, flags: Sequence[int]) -> list[int]:
        flags = list(flags)
        with_grad = [taken for taken in self._taken.values() if taken.grad is not None]
        for device in {taken.shard.device for taken in with_grad}:
            some = [taken for taken in with_grad if taken.shard.device == device]
            grads = [taken.grad for taken in some if taken.grad is not None]
            maxima = ops.grad_max(grads, [1] * len(some))
            for taken, is_finite in zip(some, maxima.isfinite().tolist(), strict=True):
                policy = self._groups[taken.spread.group_idx]["nonfinite"]
                if policy in POLICIES and not is_finite:
                    place = POLICIES.index(policy)
                    flags[place] = max(flags[place], culprit_flag(taken.spread.index))
        return flags

    def _see(self, team: Team, flags: Sequence[int]) -> tuple[list[int], list[Taken]]:
        """The flags of a team, and its parameters that have a gradient on any rank."""
        assert self.plan is not None
        spreads = [spread for spread in self.plan.by_id.values() if spread.team is team]
        # None of them where this rank could not take part (``refused``).
        mine = [self._taken.get(spread.index) for spread in spreads]
        is_there = [some is not None and some.grad is not None for some in mine]
        differs = [some is not None and some.differs for some in mine]
        numbers = [*is_there, *(not there for there in is_there), *differs]
        found = agree_max(team, [*flags, *map(int, numbers)])
        flags, seen = found[: len(flags)], found[len(flags) :]
        count = len(spreads)
        wanted = []
        for place, taken in enumerate(mine):
            some_have, some_lack, some_differ = seen[place::count]
            if some_differ and some_lack:
                raise RuntimeError(
                    f"gradient of {spreads[place].name}: expected one on all ranks, where its "
                    "placements are not the parameter's, got none on some"
                )
            if some_have and taken is not None:
                wanted.append(_redistributed(taken) if some_differ else taken)
        return flags, wanted

    def parts(self, work: list[GroupWork], maxima: list[Tensor]) -> Iterator[Part]:
        """First what stays on this rank, while the first gradients travel; then each bucket."""
        self._consolidated = None
        for param, spread, shard, *_ in self._taken.values():
            if not spread.owned and param not in self._states:
                # Every rank has an entry for every parameter: checkpoints ask for it.
                self._states[param] = spread.new_state(shard)
        teams = {taken.spread.team for taken in self._taken.values()}
        steps = [
            BucketStep(bucket, self._taken, self._states)
            for bucket in self._buckets
            if bucket.team in teams
        ]
        for step in steps[:NUM_AHEAD]:
            step.send_grads()
        entries = [entry for some in self._taken.values() for entry in _entries_here(some)]
        here = self._work_of(entries)
        maxima = maxima + [item.grad_maxima() for item in here]
        yield LocalPart(work + here, maxima, self._errors, self._failed)
        for place, step in enumerate(steps):
            for ahead in steps[place + NUM_AHEAD : place + NUM_AHEAD + 1]:
                ahead.send_grads()
            yield BucketPart(step, self._work_of, self._errors, self._failed)
            if place > 0:
                self._failed += steps[place - 1].apply(self._options)
        if steps:
            self._failed += steps[-1].apply(self._options)

    def _options(self, group_idx: int) -> StepOptions:
        return step_options(self._groups[group_idx])

    def _work_of(self, entries: Iterable[ShardEntry], stands_in: bool = False) -> list[GroupWork]:
        """Entries by group and device."""
        found: dict[tuple[int, torch.device], GroupWork] = {}
        for entry in entries:
            assert entry.taken is not None
            group_idx, device = entry.taken.spread.group_idx, entry.tensor.device
            if (group_idx, device) not in found:
                work = GroupWork(self._groups[group_idx], device, False, [], stands_in=stands_in)
                found[group_idx, device] = work
            found[group_idx, device].entries.append(entry)
        return list(found.values())

    def describe(self) -> str:
        """Who works on what."""
        return describe(self.plan) if self.plan is not None else super().describe()

    def consolidate(self, to: int | None) -> None:
        """Gathers the state of parameters that are shared over the group."""
        if to is not None and self.plan is not None and self._has_dtensors():
            raise ValueError(
                f"to: expected None, for all ranks gather the state of DTensors together, got {to}"
            )
        self._gathers = to is None
        if to is not None:
            params = [param for group in self._groups for param in group["params"]]
            of_group = [param for param in params if self._is_of_group(param)]
            gathered = self._saved(self._with_state(of_group, together=True), to)
            is_here = self.process_group is not None and to == dist.get_rank(self.process_group)
            self._consolidated = gathered if is_here else None

    def at_rest(self, state_dict: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
        """A state_dict with the state of sharded parameters as it is saved; all ranks together.

        Raises:
            RuntimeError: where the state of parameters of the group has not been gathered here.
        """
        spread = [param for param in params if self.of(param) is not None]
        # Under a group a rank may be alone here, to be told so.
        may_be_alone = self.process_group is not None and not self._gathers
        spread = self._with_state(spread, together=not may_be_alone)
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

    def _has_dtensors(self) -> bool:
        assert self.plan is not None
        return any(spread.mesh is not None for spread in self.plan.by_id.values())

    def _with_state(self, params: Sequence[Tensor], together: bool) -> list[Tensor]:
        """Those of sharded parameters that have state.

        Args:
            params: sharded ones.
            together: whether all ranks ask: what has state on any of them, and could not be made
                here when memory ended, is zero here then.
        """
        if self.plan is None or not together:
            return [param for param in params if param in self._states]
        found = []
        for team in self.plan.teams:
            some = {p: s for p in params if (s := self.of(p)) is not None and s.team is team}
            seen = agree_max(team, [int(param in self._states) for param in some])
            for (param, spread), is_there in zip(some.items(), seen, strict=True):
                if is_there:
                    found.append(param)
                    if param not in self._states:
                        self._states[param] = spread.new_state(local_of(param))
        return found

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

    def failed(self) -> tuple[list[str], Exception | None]:
        """The names of parameters that the step could not update, on any rank, and why if on this.

        Lets go of what the step has held.
        """
        failed, error = self._failed, self._errors[0] if self._errors else None
        self.release()
        return failed, error


class _Key:
    """A parameter as a plan sees it: the tensor itself, not one that has its id by now."""

    def __init__(self, param: Tensor, takes_part: bool) -> None:
        self._param = param
        mesh = (param.device_mesh, param.placements) if isinstance(param, DTensor) else None
        self._form = (mesh, shape_of(param), param.dtype, param.device, takes_part)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key):
            return NotImplemented
        return self._param is other._param and self._form == other._form

    __hash__ = None  # type: ignore[assignment]  # compared alone


def _redistributed(taken: Taken) -> Taken:
    grad = taken.param.grad
    assert isinstance(grad, DTensor)
    placed = grad.redistribute(placements=taken.spread.placements)
    return taken._replace(grad=local_of(placed).resolve_neg().contiguous())


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
