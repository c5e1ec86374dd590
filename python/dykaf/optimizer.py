"""The DyKAF optimizer."""

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
    RULES,
    StepOptions,
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


class DyKAF(Reported, Saved):
    r"""Adam in the eigenbasis of a Kronecker-factored Fisher matrix that an integrator tracks.

    For a weight W (m x n) with gradient G, one step is, t counted after the first gradient:

    .. code-block:: text

        G~         = Q_L^T G Q_R
        exp_avg    = beta1 exp_avg + (1 - beta1) G~
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) G~^2
        N          = beta1 exp_avg / (1 - beta1^t) + (1 - beta1) G~
        D          = N / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        W          = W (1 - lr weight_decay) - lr Q_L orthogonalised(D) Q_R^T
        L, R, rho  = one integrator step towards factor_beta rho^2 L (x) R
                     + (1 - factor_beta) vec(G) vec(G)^T
        Q_L, Q_R   = one power iteration of L, R, when a refresh is due; exp_avg_sq is scaled by
                     what the diagonals of L and R have grown by

    By default a matrix keeps the factor and the basis of its shorter side alone; the other basis is
    the identity. The first gradient of a matrix that is not zero sets the factors and bases and
    updates nothing. Vectors, scalars and matrices with both sides over ``max_precond_dim`` are
    updated by AdamW.
    Tensors of more than two dimensions are stacks of matrices where ``batch_dims`` says so, and
    otherwise matrices, first dimension by the rest.

    Updates are bounded whatever the gradients: orthogonalised, their root mean square by 0.24 lr;
    without, by lr times Adam's own bound, 1 for equal betas (docs/algorithm.md).

    The defaults are what trains best (docs/evidence.md); :func:`dykaf.preset` has the paper's own
    form, SOAP's, Muon's and others.

    Every option is an entry of the parameter group and is read at each step.

    Args:
        params: parameters, named parameters, or groups of either; of dtype float64, float32,
            bfloat16 or float16, on any device. :func:`dykaf.param_groups` makes sensible groups.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of exp_avg and of the second moment, two numbers.
        eps: added to the root of the second moment after bias correction.
        weight_decay: decoupled weight decay.
        factor_beta: decay of the factors; None: ``betas[1]``, as in the paper.
        precondition_frequency: steps between refreshes of a basis.
        max_precond_dim: a side longer than this gets no factor; 0 sends all matrices to AdamW.
        sides: which factors a matrix keeps: "one" (of the shorter side; of a square matrix the
            left), "both", or "none" (there is no basis then).
        skinny_rank: of a matrix with a side at least 16 times the other (LoRA's adapters), the rank
            at which the factor of the long side is kept, the rest of it as a multiple of the
            identity; 0: in full. It applies where the short side is at most, the long side at least
            twice ``skinny_rank``, to the default integrator; the second moment of such a matrix is
            small whatever ``second_moment`` is.
        integrator: "diagonal" (the averages of G G^T and G^T G, as in Shampoo and SOAP; two
            products, not four), "ksl" (Lubich & Oseledets) or "bug" (Ceruti & Lubich, the paper's).
        init: "identity", or "rank_one" from the top singular pair of the first gradient.
        second_moment: "full" [m, n], "rank_one" or "factored" (m + n numbers each), or "none" (the
            update is the momentum; with ``sides="none"`` and ``orthogonalize`` alone).
        nesterov: momentum of matrices as Nesterov's, beta1 exp_avg + (1 - beta1) G~.
        orthogonalize: Newton-Schulz steps on the update of a matrix; 0: none.
        refresh_schedule: "geometric" (often at the start, then every precondition_frequency steps)
            or "fixed".
        rescale_exp_avg_sq: at a refresh, scale the second moment by the change of the factors'
            diagonals.
        refresh_stagger: spread the refreshes over the period.
        matmul_precision: "highest", "high" or "medium" for float32 products, as
            torch.set_float32_matmul_precision; None follows torch's setting.
        batch_dims: leading dimensions that index separate matrices (experts, stacked layers), of
            tensors that have them beside two; None: all but the last two, where none of them is
            longer than either of these.
        state_dtype: of factors and bases: "float32" (float64 for float64 parameters) or "bfloat16",
            half the memory of these; a step then computes with copies in full, at most 512 MiB of
            them, or one parameter's, at a time.
        low_precision: how bfloat16 and float16 parameters are updated: "stochastic" rounding or a
            float32 "master" copy in the state.
        seed: of the stochastic rounding.
        maximize: ascend instead of descend.
        nonfinite: what a NaN or infinite gradient does: "skip" the whole step and count it in
            ``skipped_steps``, "raise" before anything has changed, or "propagate".
        process_group: over which the work on parameters that are equal on all ranks, as with
            DistributedDataParallel, and their state are shared; None: every rank does all. DTensors
            (fully_shard, parallelize_module) need no argument (docs/distributed.md).

    Attributes:
        amp_scaling: False: as with torch.optim.AdamW, GradScaler unscales the gradients, waits for
            the GPU to know whether they are finite, and calls no step where they are not. True, as
            with torch.optim.AdamW(fused=True): its scale and its verdict are taken inside the step,
            without a wait, and count in ``skipped_steps``; gradients are still scaled before the
            step, so call ``scaler.unscale_(optimizer)`` before they are clipped or read.

    Raises:
        ValueError: for an option or parameter that is not as described, naming it.

    Source: Yudin et al., arXiv 2511.06477; docs/algorithm.md lists the deliberate deviations.
    """

    amp_scaling = False
    _process_group: ProcessGroup | None = None  # pickles do without

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = 0.9,
        precondition_frequency: int = 50,
        max_precond_dim: int = 10000,
        sides: str = "one",
        skinny_rank: int = 32,
        integrator: str = "diagonal",
        init: str = "identity",
        second_moment: str = "full",
        nesterov: bool = True,
        orthogonalize: int = 3,
        refresh_schedule: str = "geometric",
        rescale_exp_avg_sq: bool = True,
        refresh_stagger: bool = True,
        matmul_precision: str | None = None,
        batch_dims: int | None = None,
        state_dtype: str = "float32",
        low_precision: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        nonfinite: str = "skip",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name in RULES}
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
        check_new_options({**self.defaults, **param_group})
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


def describe_plan(optimizer: DyKAF) -> str:
    """Which ranks work on what of a sharded optimizer, a line per set of ranks; they call together.

    Args:
        optimizer: whose parameters are sharded as they will be.
    """
    return optimizer._prepare().describe()
