"""What the optimizers of this package share: all of a step but the formulas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from dykaf.kept import Kept
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
    Runs,
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
        self._kept: Kept | None = None

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
        captured = is_capturing()
        kept, maxima = self._take_kept(captured)
        sharing = self._prepare() if kept is None else self._sharing
        if kept is not None:
            work = kept.work
        else:
            work = self._collect()
            if not (work or self.state or sharing.is_shared):
                check_has_gradients(self.param_groups)
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
                if kept is not None:
                    kept.let_go()
                    self._kept = kept
                return loss

        if kept is not None:
            stayed, failed = self._run_kept(kept, skip)
        else:
            self._waiting.settle()
            stayed, failed = self._run(sharing, work, maxima, skip, refresh=not captured)
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

    def _run(
        self,
        sharing: Alone,
        work: list[GroupWork],
        maxima: list[Tensor],
        skip: Tensor | None,
        refresh: bool,
    ) -> tuple[list[str], list[str]]:
        """Does a step, part by part.

        Returns:
            the names of parameters whose old basis stayed, and of those that were not updated.
        """
        offsets = self._stagger_offsets()
        stayed: list[str] = []
        failed: list[str] = []
        for part in sharing.parts(work, maxima):
            with part, NewStates(self.state) as new:
                new.make(part.work)
                descriptions, entries = self._jobs(part, offsets, skip, refresh)
                jobs = ops.Jobs(descriptions)
                report = jobs.run(new.started)
                not_done = found_at(report.failed, entries)
                new.drop(not_done)
                part.note_failed(not_done)
                self._waiting.note(descriptions, report.waiting)
                stayed += [entry.name for entry in found_at(report.stayed, entries)]
                failed += [entry.name for entry in not_done]
                is_usual = refresh and not (sharing.is_shared or failed or any(report.waiting))
                if is_usual and len(descriptions) == len(work) > 0:
                    self._kept = Kept.of(jobs, work, self.param_groups, self.state)
        return stayed, failed

    def _take_kept(self, captured: bool) -> tuple[Kept | None, list[Tensor]]:
        """What the last step left, if it serves this one, and the maxima of its gradients."""
        kept, self._kept = self._kept, None
        maxima = None
        if kept is not None and not captured:
            maxima = kept.grad_maxima(self.param_groups, self.state)
        return (None, []) if maxima is None else (kept, maxima)

    def _run_kept(self, kept: Kept, skip: Tensor | None) -> tuple[list[str], list[str]]:
        """As :meth:`_run`."""
        inputs = [
            self._step_inputs(item, runs, kept.options_of(item), skip)
            for item, runs in zip(kept.work, kept.runs, strict=True)
        ]
        report = kept.run(inputs)
        if not any(report.failed):
            self._kept = kept
        entries = [item.entries for item in kept.work]
        stayed, failed = found_at(report.stayed, entries), found_at(report.failed, entries)
        return [entry.name for entry in stayed], [entry.name for entry in failed]

    def _jobs(
        self, part: Part, offsets: list[tuple[int, int]], skip: Tensor | None, refresh: bool
    ) -> tuple[list[ops.StepJob], list[list[Entry]]]:
        """What the step is to do, and the entries of each job; changes nothing."""
        jobs: list[ops.StepJob] = []
        found: list[list[Entry]] = []
        for item, grad_max in zip(part.work, part.maxima, strict=True):
            options = step_options(item.group, lr=0.0)
            num_done = 0
            for some in passes([entry.state(self.state) for entry in item.entries]):
                entries = item.entries[some.part]
                num_matrices = sum(entry.layout.count for entry in entries)
                inputs = self._step_inputs(item, item.runs(some.part), options, skip, refresh)
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
                        kept=some.kept,
                        full=some.full,
                        places=[entry.place for entry in entries],
                        **inputs._asdict(),
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
        try:
            return self._found_work()
        except Exception:
            self._sharing.agree(REFUSED)  # the other ranks raise too
            self._sharing.release()
            raise

    def _found_work(self) -> list[GroupWork]:
        work: list[GroupWork] = []
        num_params = 0
        for group_idx, group in enumerate(self.param_groups):
            check_options(group)
            by_device = {item.device: item for item in work if item.takes(group)}
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
                        work.append(by_device[device])
                    grad = param.grad.resolve_neg().contiguous()
                    by_device[device].entries.append(
                        Entry(param, param, grad, layout, num_params + idx, name, group=group)
                    )
            num_params += len(group["params"])
        return work

    # GradScaler leaves its scale and its verdict on the gradients on the optimizer.
    def _step_inputs(
        self,
        item: GroupWork,
        runs: Runs,
        options: StepOptions,
        skip: Tensor | None,
        refresh: bool = True,
    ) -> ops.StepInputs:
        scale = getattr(self, "grad_scale", None)
        gpu_inputs = item.gpu_inputs(skip, scale) if item.on_gpu else {}
        options = options.copy()
        rates: list[ops.Rates] = []
        if item.stands_in:
            options.update({"lr": -1.0, "weight_decay": 0.0})
        else:
            # What the GPU reads is not for the host to wait for.
            on_gpu = "lr" in gpu_inputs
            rates = [
                (count, 0.0 if on_gpu else float(group["lr"]), float(group["weight_decay"]))
                for group, count in runs
            ]
        if scale is not None and "amp_scale" not in gpu_inputs:
            options["grad_scale"] /= float(scale)
        return ops.StepInputs(options, refresh=refresh, rates=rates, **gpu_inputs)

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
