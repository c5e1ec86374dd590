"""What a step works on, and what of it a CUDA graph can hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dykaf import ops
from dykaf.checks import check_usable, warn
from dykaf.options import check_options, rules_of
from dykaf.state import Layout, State, changed_options, check_state, new_state


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


@dataclass
class Entry:
    """What a step works on of one parameter."""

    param: Tensor  # the key of its state
    tensor: Tensor  # what is updated: the parameter, or what this rank has of it
    grad: Tensor  # of it, contiguous
    layout: Layout  # of it
    index: int  # of the parameter in the whole optimizer
    name: str
    first: int = 0  # of its matrices in the whole parameter
    part: slice | None = None  # of its matrices in the state; None: all
    place: ops.Place = (0, 0, 0)
    group: Mapping[str, Any] | None = None  # of it, where the work is of several groups

    def new_state(self) -> State:
        """Zero state of all that this process has of the parameter."""
        return new_state(self.param, self.layout)

    def state(self, states: Mapping[Tensor, State]) -> State:
        """What of the parameter's state belongs to ``tensor``."""
        state = states[self.param]
        if self.part is None and self.layout.master == ("master" in state):
            return state
        found = {key: state[key] for key in self.layout.shapes()}
        if self.part is None:
            return found
        if "master" in found:
            found["master"] = found["master"].view(-1, *self.tensor.shape[1:])
        return {key: value[self.part] for key, value in found.items()}


_ALL = slice(None)
_NOTHING = torch.empty(0, device="cpu")
Runs = Sequence[tuple[Mapping[str, Any], int]]


class GroupWork(NamedTuple):
    """What a step works on of a group, or of several that differ in rates alone, on one device."""

    group: dict[str, Any]  # the first of them
    device: torch.device
    on_gpu: bool  # or any device, and what the backend "aten" serves: the host waits for nothing
    entries: list[Entry]
    has_tensors: bool = True
    stands_in: bool = False  # updates are left in zero tensors, for shards that are elsewhere

    def takes(self, group: Mapping[str, Any]) -> bool:
        """Whether the work of another group may come with it: rates on the CPU may differ."""
        if group is self.group:
            return True
        is_on_gpu = [
            isinstance(one["lr"], Tensor) and ops.backend_of(one["lr"]) != "cpu"
            for one in (group, self.group)
        ]
        shared = rules_of(self.group).keys() - {"lr", "weight_decay"}
        return not any(is_on_gpu) and all(group[name] == self.group[name] for name in shared)

    def runs(self, part: slice = _ALL) -> Runs:
        """The groups of a part of its entries, each with how many follow each other."""
        groups = [entry.group or self.group for entry in self.entries[part]]
        return [(next(run), 1 + sum(1 for _ in run)) for _, run in itertools.groupby(groups, id)]

    def without_tensors(self) -> GroupWork:
        """What of it may be kept after the step: gradients and parameters are for users to free."""
        if not self.has_tensors:
            return self
        entries = [
            Entry(_NOTHING, _NOTHING, _NOTHING, e.layout, e.index, e.name, group=e.group)
            for e in self.entries
        ]
        return self._replace(entries=entries, has_tensors=False)

    def owner(self, matrix_idx: int) -> Entry:
        """The entry that a matrix is, or is part of."""
        return [entry for entry in self.entries for _ in range(entry.layout.count)][matrix_idx]

    def grad_maxima(self) -> Tensor:
        """The largest magnitude in the gradient of each matrix, NaN where one is not finite."""
        counts = [entry.layout.count for entry in self.entries]
        return ops.grad_max([entry.grad for entry in self.entries], counts)

    def gpu_inputs(self, skip: Tensor | None, amp_scale: Tensor | None) -> dict[str, Tensor]:
        """What the GPU reads by itself in a step, of these and lr."""
        inputs = {"skip": skip, "amp_scale": amp_scale, "lr": self.group["lr"]}
        dtypes = {"skip": torch.int32, "amp_scale": torch.float32, "lr": torch.float32}
        return {
            name: value.to(self.device, dtypes[name], non_blocking=True).reshape(1)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and ops.backend_of(value) != "cpu"
        }


class NewStates:
    """Makes states that do not exist yet, within a ``with`` statement.

    Takes them back if an exception leaves it before ``started`` is filled with 1. (A generator
    would be interrupted where nothing is taken back.)
    """

    def __init__(self, states: MutableMapping[Tensor, State]) -> None:
        self._states = states
        self.started = torch.zeros(1, device="cpu")
        self._new: list[Tensor] = []

    def make(self, work: Sequence[GroupWork]) -> None:
        """Makes the missing states of ``work``."""
        for item in work:
            for entry in item.entries:
                if not self._states.get(entry.param):
                    self._new.append(entry.param)
                    self._states[entry.param] = entry.new_state()

    def drop(self, entries: Iterable[Entry]) -> None:
        """Takes those back that the step could not update.

        Of a stack of which other matrices were updated these are zero again.
        """
        for entry in entries:
            if not any(entry.param is made for made in self._new):
                continue
            if entry.part is None:
                self._states.pop(entry.param, None)
                continue
            for key, value in entry.state(self._states).items():
                if key != "master":
                    value.zero_()

    def __enter__(self) -> NewStates:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is not None and not self.started:
            for param in self._new:
                self._states.pop(param, None)


def make_fake_states(
    param_groups: Sequence[Mapping[str, Any]], states: MutableMapping[Tensor, State]
) -> None:
    """Makes the state that a step on fake tensors leaves."""
    for group in param_groups:
        check_options(group)
        for param in group["params"]:
            has_gradient = param.grad is not None and param.numel() > 0
            if isinstance(param, FakeTensor) and has_gradient and not states.get(param):
                with param.fake_mode:
                    states[param] = new_state(param, Layout.of(param, group))


class Waiting:
    """Matrices on a GPU that have seen zero gradients alone.

    The host starts a matrix at its first gradient that is not zero, and would have to wait for the
    GPU in every step to know it. It looks at the maxima one step later instead, when they are
    there, and the matrix starts at the gradient after (``next_refresh`` -1; -2: not yet).
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, torch.cuda.Event | None, list[tuple[Tensor, int]]]] = []

    def note(self, jobs: Sequence[ops.StepJob], places: Sequence[Sequence[int]]) -> None:
        """Takes the maxima of the waiting matrices, by their places in each job, of this step."""
        for job, indices in zip(jobs, places, strict=True):
            if not indices:
                continue
            dates = [
                date
                for state in job.states
                for date in state.get("next_refresh", torch.zeros(1, 2)).view(-1, 2)
            ]
            maxima, event = to_host(job.grad_max)
            self._seen.append((maxima, event, [(dates[idx], idx) for idx in indices]))

    def settle(self) -> None:
        """Marks those whose last gradient was not zero."""
        for maxima, event, matrices in self._seen:
            if event is not None:
                event.synchronize()
            for date, idx in matrices:
                if maxima[idx] != 0:
                    date.fill_(-1)
        self._seen = []


def to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """What the host is to read later, and the event after which it can without a wait.

    No event: it can now, or on a GPU other than CUDA's it waits.
    """
    if not value.is_cuda:
        return value, None
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()
    return host, event


def found_at(places: Sequence[Sequence[int]], jobs: Sequence[Sequence[Entry]]) -> list[Entry]:
    """Entries given by their places in each job."""
    pairs = zip(places, jobs, strict=True)
    return [entries[idx] for indices, entries in pairs for idx in indices]


def tell(stayed: Sequence[str], failed: Sequence[str], cause: BaseException | None = None) -> None:
    """Says what a step that has changed something could not do.

    Args:
        stayed: the names of parameters whose old basis stayed.
        failed: of those that could not be updated.
        cause: of that, if it is known.

    Raises:
        RuntimeError: naming parameters that could not be updated.
    """
    if stayed:
        warn(
            f"refresh of {', '.join(dict.fromkeys(stayed))} failed: the old basis stays "
            "(refresh_fallbacks in diagnostics() counts it)"
        )
    if failed:
        raise RuntimeError(
            f"step: could not update {', '.join(dict.fromkeys(failed))}, which are as before; all "
            "other parameters were updated"
        ) from cause


def check_capture(
    work: Sequence[GroupWork], states: Mapping[Tensor, State], counts_skips: bool, is_shared: bool
) -> None:
    """Checks that replays of a captured step would be right.

    Args:
        work: of the step.
        states: of the parameters.
        counts_skips: whether a step has made the count of skipped ones, which a replay must not
            start anew.
        is_shared: whether parameters are sharded.

    Raises:
        RuntimeError: naming what is not so.
    """
    if is_shared:
        _refuse("parameters that are not sharded", "sharded ones")
    for item in work:
        if not item.on_gpu:
            _refuse("parameters on the GPU", f"{item.entries[0].name} on {item.device}")
        if item.device.type == "cuda" and item.device.index != torch.cuda.current_device():
            _refuse("parameters on the captured GPU", f"{item.entries[0].name} on {item.device}")
        if item.group.get("roots") == "exact":
            _refuse("roots='tracked'", "'exact', for which the CPU must wait")
        if item.group["nonfinite"] == "raise":
            _refuse('nonfinite="skip" or "propagate"', '"raise", for which the CPU must wait')
        if item.group["nonfinite"] == "skip" and not counts_skips:
            _refuse("a step before the capture", "none")
        for entry in item.entries:
            rank = entry.layout.skinny_rank
            if rank:
                _refuse("skinny_rank=0", f"{rank}, which applies to {entry.name}")
            state = states.get(entry.param)
            if not state or ("next_refresh" in state and not (state["next_refresh"] > 0).all()):
                _refuse("a step before the capture", f"none with a gradient of {entry.name}")


def _refuse(expected: str, got: str) -> NoReturn:
    raise RuntimeError(f"step in a CUDA graph: expected {expected}, got {got}")
