"""What the optimizers of this package share: all of a step but the formulas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dykaf import ops
from dykaf.checks import (
    check_grad,
    check_has_gradients,
    check_param,
    is_capturing,
    is_fake,
    named_alike_,
    param_name,
    warn_of_zero_redundancy,
)
from dykaf.diagnostics import Reported
from dykaf.distributed.alone import Alone, Part, sharing_of
from dykaf.narrow import passes
from dykaf.nonfinite import REFUSED, Skips, must_skip
from dykaf.options import (
    StepOptions,
    check_alike,
    check_new_options,
    check_options,
    plain_options,
    step_options,
    with_rate,
)
from dykaf.saving import Saved
from dykaf.schedule import Offsets
from dykaf.state import STRUCTURAL_OPTIONS, Layout, host_entries_
from dykaf.work import (
    Entry,
    GroupWork,
    Layouts,
    NewStates,
    Waiting,
    check_capture,
    found_at,
    make_fake_states,
    tell,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KroneckerOptimizer(Reported, Saved):
    """Runs the steps of an optimizer that keeps Kronecker factors of each weight, and their bases.

    A subclass has the options and their defaults; which formulas a step takes is for these to say.

    Args:
        params: parameters, named parameters, or groups of either.
        defaults: of every option.
        process_group: over which parameters that are equal on all ranks are shared; None: none.

    Raises:
        ValueError: for an option or parameter that cannot be used, naming it.
    """

    amp_scaling = False
    _process_group: ProcessGroup | None = None  # pickles do without

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], process_group: ProcessGroup | None
    ) -> None:
        check_new_options(defaults)
        defaults.update(plain_options(defaults))
        self._incoming, self._arriving = None, {}
        self._skips = Skips()
        self._process_group = process_group
        warn_of_zero_redundancy()
        self._reset_caches()
        super().__init__(params, defaults)

    def _reset_caches(self) -> None:
        if not hasattr(self, "_sharing"):  # owners stay, and what state_dict() is to gather
            self._sharing = Alone()
        self._layouts = Layouts()
        self._offsets = Offsets()
        self._waiting = Waiting()

    @property
    def _step_supports_amp_scaling(self) -> bool:  # what GradScaler, and Lightning, look for
        return self.amp_scaling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose options default to the constructor's.

        Where the other groups hold names and this one does not, its parameters are named by their
        places; where only this one does, its names are dropped.

        Args:
            param_group: parameters and options; ``lr_ratio`` in place of ``lr`` is the group's rate
                over the constructor's.

        Raises:
            ValueError: as the constructor; the optimizer is as it was.
        """
        param_group = with_rate(param_group, self.defaults["lr"])
        options = {**self.defaults, **param_group}
        check_alike(self.defaults, options)
        check_new_options(options)
        num_groups = len(self.param_groups)
        if num_groups:
            named_alike_(param_group, num_groups, "param_names" in self.param_groups[0])
        super().add_param_group(param_group)
        try:
            for idx, param in enumerate(self.param_groups[-1]["params"]):
                check_param(param_name(self.param_groups[-1], num_groups, idx), param)
        except ValueError:
            del self.param_groups[num_groups:]
            raise
        group = self.param_groups[-1]
        group.update(plain_options(group), skipped_steps=0)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    # As torch's own optimizers have it; torch.compiler.disable would import dynamo with dykaf.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> float | Tensor | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is returned as it is.

        Raises:
            ValueError: for an option or gradient that cannot be used, naming it.
            RuntimeError: for a gradient that is not finite under ``nonfinite="raise"``, and for a
                step that a CUDA graph cannot hold.

        In both errors parameters and state are as before the call, as they are when memory ends or
        the step is interrupted; or a RuntimeError names the parameters that are, all others having
        been updated.

        Warns of the first step that is skipped for gradients that are not finite, and each time
        those in a row are ten times as many; and of a refresh that failed, where the old basis
        stays; and of a step without any gradient before the first with one.

        A step on fake tensors makes the state, which is fake too, and nothing else.

        A CUDA graph can hold a step, without its refreshes: see :meth:`refresh`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if is_fake(self.param_groups):
            make_fake_states(self.param_groups, self.state)
            return loss
        sharing = self._prepare()
        try:
            work = self._collect()
        except Exception:
            sharing.agree(REFUSED)  # the other ranks raise too
            sharing.release()
            raise
        if not (work or self.state or sharing.is_shared):
            check_has_gradients(self.param_groups)
        captured = is_capturing()
        if captured:
            check_capture(work, self.state, self._skips.on_gpu is not None, sharing.is_shared)
        maxima = [item.grad_maxima() for item in work]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skip = firsts = None
        on_gpu = all(item.on_gpu and item.group["nonfinite"] != "raise" for item in work)
        if on_gpu and not sharing.is_shared:
            self._skips.hear()
            skip, firsts = self._skips.flag(work, maxima, found_inf)
        else:
            is_skipped, culprit = must_skip(work, maxima, found_inf, sharing.agree, self._name_of)
            self._skips.count(is_skipped, culprit)
            if is_skipped:
                sharing.release()
                return loss

        self._waiting.settle()
        offsets = self._stagger_offsets()
        stayed: list[str] = []
        failed: list[str] = []
        for part in sharing.parts(work, maxima):
            with part, NewStates(self.state) as new:
                new.make(part.work)
                jobs, entries = self._jobs(part, offsets, skip, refresh=not captured)
                report = ops.step_all_(jobs, new.started)
                not_done = found_at(report.failed, entries)
                new.drop(not_done)
                part.note_failed(not_done)
                self._waiting.note(jobs, report.waiting)
                stayed += [entry.name for entry in found_at(report.stayed, entries)]
                failed += [entry.name for entry in not_done]
        if skip is not None:
            self._skips.count_on_gpu(skip, firsts, work, captured)
        elsewhere, cause = sharing.failed()
        tell(stayed, failed + elsewhere, cause)
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Counts a step that a CUDA graph replayed, and refreshes the bases that are due after it.

        :meth:`step` does so by itself, except while a graph is captured: which bases a step
        refreshes is decided on the CPU, and a replay would repeat the choice. Call it after each
        replay of a graph that holds a step, outside of the graph:

        .. code-block:: python

            optimizer.step()  # at least once before the capture
            with torch.cuda.graph(graph):
                model(inputs).backward()
                optimizer.step()
            for batch in batches:
                inputs.copy_(batch)
                graph.replay()
                optimizer.refresh()

        Whether the replayed step was skipped makes no difference. An lr that changes from replay to
        replay must be a tensor on the GPU.
        """
        offsets = self._stagger_offsets()
        first = 0
        for group in self.param_groups:
            by_device: dict[torch.device, list[int]] = {}
            for idx, param in enumerate(group["params"]):
                if self.state.get(param) and self._sharing.of(param) is None:
                    by_device.setdefault(param.device, []).append(idx)
            for indices in by_device.values():
                states = [host_entries_(self.state[group["params"][idx]]) for idx in indices]
                places = [offsets[first + idx] for idx in indices]
                for item in passes(states):
                    ops.refresh_due_(
                        item.states,
                        places[item.part],
                        step_options(group, lr=0.0),
                        item.kept,
                        item.full,
                    )
            first += len(group["params"])

    def _jobs(
        self, part: Part, offsets: list[tuple[int, int]], skip: Tensor | None, refresh: bool
    ) -> tuple[list[ops.StepJob], list[list[Entry]]]:
        """What the step is to do, and the entries of each job; changes nothing."""
        jobs: list[ops.StepJob] = []
        found: list[list[Entry]] = []
        for item, grad_max in zip(part.work, part.maxima, strict=True):
            gpu_inputs = {}
            if item.on_gpu:
                gpu_inputs = item.gpu_inputs(skip, getattr(self, "grad_scale", None))
            options = self._step_options(item, gpu_inputs)
            num_done = 0
            for some in passes([entry.state(self.state) for entry in item.entries]):
                entries = item.entries[some.part]
                num_matrices = sum(entry.layout.count for entry in entries)
                jobs.append(
                    ops.StepJob(
                        [entry.tensor for entry in entries],
                        [entry.grad for entry in entries],
                        grad_max[num_done : num_done + num_matrices],
                        some.states,
                        [(entry.index << 32) + entry.first for entry in entries],
                        [
                            (left + entry.first, right + entry.first)
                            for entry in entries
                            for left, right in [offsets[entry.index]]
                        ],
                        options,
                        refresh=refresh,
                        kept=some.kept,
                        full=some.full,
                        places=[entry.place for entry in entries],
                        **gpu_inputs,
                    )
                )
                found.append(entries)
                num_done += num_matrices
        return jobs, found

    def _prepare(
        self,
        groups: Sequence[dict[str, Any]] | None = None,
        loaded: Collection[Tensor] | None = None,
    ) -> Alone:
        """How processes share the parameters now; all that do come here together.

        Args:
            groups: those that a load brings; None: the optimizer's.
            loaded: the parameters that get state from it.
        """
        groups = self.param_groups if groups is None else groups
        self._sharing = sharing_of(self._sharing, groups, self._process_group)
        self._sharing.prepare(groups, self.state if loaded is None else {}, loaded)
        return self._sharing

    def _name_of(self, index: int) -> str:
        for group_idx, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                return param_name(group, group_idx, index)
            index -= len(group["params"])
        return "a parameter that other ranks have"

    def _collect(self) -> list[GroupWork]:
        """Gathers and checks everything that a step touches; changes nothing."""
        work: list[GroupWork] = []
        num_params = 0
        for group_idx, group in enumerate(self.param_groups):
            check_options(group)
            by_device: dict[torch.device, GroupWork] = {}
            structure = tuple(group[name] for name in STRUCTURAL_OPTIONS)
            for idx, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_grad(param_name(group, group_idx, idx), param, param.grad)
                if self._sharing.of(param) is not None:
                    self._sharing.take(param)
                elif param.grad is not None and param.numel() > 0:
                    name = param_name(group, group_idx, idx)
                    layout = self._layout(name, param, group, structure)
                    device = param.device
                    if device not in by_device:
                        on_gpu = ops.backend_of(param) != "cpu"
                        by_device[device] = GroupWork(group, device, on_gpu, [])
                    grad = param.grad.resolve_neg().contiguous()
                    by_device[device].entries.append(
                        Entry(param, param, grad, layout, num_params + idx, name)
                    )
            num_params += len(group["params"])
            work.extend(by_device.values())
        return work

    # GradScaler leaves its scale and its verdict on the gradients on the optimizer.
    def _step_options(self, item: GroupWork, gpu_inputs: Mapping[str, Tensor]) -> StepOptions:
        scale = getattr(self, "grad_scale", None)
        # What the GPU reads is not for the host to wait for.
        options = step_options(
            item.group,
            grad_scale=1.0 if scale is None or "amp_scale" in gpu_inputs else float(scale),
            lr=0.0 if "lr" in gpu_inputs else float(item.group["lr"]),
        )
        if item.stands_in:
            options.update({"lr": -1.0, "weight_decay": 0.0})
        return options

    def _layout(
        self, name: str, param: Tensor, group: dict[str, Any], structure: tuple[object, ...]
    ) -> Layout:
        state = host_entries_(self.state.get(param, {}))
        return self._layouts.of(name, param, state, group, structure)

    def _stagger_offsets(self) -> list[tuple[int, int]]:
        self._layouts.keep(param for group in self.param_groups for param in group["params"])
        return self._offsets.of(self.param_groups)


def describe_plan(optimizer: KroneckerOptimizer) -> str:
    """Which ranks work on what of a sharded optimizer, a line per set of ranks; they call together.

    Args:
        optimizer: whose parameters are sharded as they will be.
    """
    return optimizer._prepare().describe()
