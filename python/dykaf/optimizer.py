"""The DyKAF optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dykaf import ops
from dykaf.diagnostics import parameter_diagnostics
from dykaf.options import RULES, check_options, step_options
from dykaf.schedule import stagger_offsets
from dykaf.state import (
    KINDS,
    PARAM_DTYPES,
    STRUCTURAL_OPTIONS,
    Layout,
    State,
    check_state,
    new_state,
)


class _GroupWork(NamedTuple):
    """The parameters of a group that have a gradient, and what a step needs of each."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]  # contiguous
    layouts: list[Layout]
    indices: list[int]  # places in the whole optimizer
    names: list[str]


class DyKAF(Optimizer):
    r"""Adam in the eigenbasis of a Kronecker-factored Fisher matrix that an integrator tracks.

    For a weight W (m x n) with gradient G, one step is, t counted after the first gradient:

    .. code-block:: text

        G~         = Q_L^T G Q_R
        exp_avg    = beta1 exp_avg + (1 - beta1) G~
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) G~^2
        D          = exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        W          = W (1 - lr weight_decay) - lr Q_L D Q_R^T
        L, R, rho  = one projector-splitting step towards factor_beta rho^2 L (x) R
                     + (1 - factor_beta) vec(G) vec(G)^T
        Q_L, Q_R   = one power iteration of L, R, when a refresh is due

    The first gradient of a matrix that is not zero sets the factors and bases and updates nothing.
    Vectors, scalars and matrices with both sides over ``max_precond_dim`` are updated by AdamW.
    Tensors of more than two dimensions are seen as matrices, first dimension by the rest.

    Every option is an entry of the parameter group and is read at each step.

    Args:
        params: parameters, named parameters, or groups of either; on the CPU, of dtype float64,
            float32, bfloat16 or float16. :func:`dykaf.param_groups` makes sensible groups.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of exp_avg and of the second moment.
        eps: added to the root of the second moment after bias correction.
        weight_decay: decoupled weight decay.
        factor_beta: decay of the factors; None: ``betas[1]``.
        precondition_frequency: steps between refreshes of a basis.
        max_precond_dim: a side longer than this gets no factor; 0 sends all matrices to AdamW.
        integrator: "ksl" (Lubich & Oseledets), "bug" (Ceruti & Lubich, the paper's) or "diagonal"
            (the metric reduced to a diagonal power of the other factor; two products, not four).
        metric_power: power of the diagonal metric: 1 the paper's metric, 0 Shampoo's and SOAP's.
        init: "identity", or "rank_one" from the top singular pair of the first gradient.
        second_moment: "full" [m, n], "rank_one" or "factored" (m + n numbers each).
        refresh_schedule: "geometric" (often at the start, then every precondition_frequency steps)
            or "fixed".
        rescale_exp_avg_sq: at a refresh, scale the second moment by the change of the factors'
            diagonals.
        refresh_stagger: spread the refreshes over the period.
        matmul_precision: "highest", "high" or "medium" for float32 products, as
            torch.set_float32_matmul_precision; None follows torch's setting.
        batch_dims: leading dimensions that index separate matrices (experts, stacked layers).
        low_precision: how bfloat16 and float16 parameters are updated: "stochastic" rounding or a
            float32 "master" copy in the state.
        seed: of the stochastic rounding.
        maximize: ascend instead of descend.
        nonfinite: what a NaN or infinite gradient does: "skip" the whole step and count it in
            ``skipped_steps``, "raise" before anything has changed, or "propagate".

    Raises:
        ValueError: for an option or parameter that is not as described, naming it.

    Source: Yudin et al., arXiv 2511.06477; docs/algorithm.md lists the deliberate deviations.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        integrator: str = "ksl",
        metric_power: float = 1.0,
        init: str = "identity",
        second_moment: str = "full",
        refresh_schedule: str = "geometric",
        rescale_exp_avg_sq: bool = False,
        refresh_stagger: bool = True,
        matmul_precision: str | None = None,
        batch_dims: int = 0,
        low_precision: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        nonfinite: str = "skip",
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in RULES}
        check_options(defaults)
        self.skipped_steps = 0
        self._incoming: dict[str, Any] | None = None  # the state_dict that is being loaded
        self._reset_caches()
        super().__init__(params, defaults)

    def _reset_caches(self) -> None:
        self._layouts: dict[Tensor, tuple[tuple[object, ...], Layout]] = {}
        self._offsets: tuple[list[int], list[tuple[int, int]]] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose options default to the constructor's.

        Raises:
            ValueError: as the constructor; the optimizer is as it was.
        """
        options = {**self.defaults, **param_group}
        check_options(options)
        num_groups = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                _check_param(param)
        except ValueError:
            del self.param_groups[num_groups:]
            raise
        self._offsets = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            ValueError: for an option or gradient that cannot be used, naming it.
            RuntimeError: for a gradient that is not finite under ``nonfinite="raise"``.
            In both cases parameters and state are as before the call.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grad_scale, found_inf = self._amp_scale()
        work = self._collect()
        maxima = [
            ops.grad_max(item.grads, [layout.count for layout in item.layouts]) for item in work
        ]
        if found_inf or self._must_skip(work, maxima):
            self.skipped_steps += 1
            return loss

        offsets = self._stagger_offsets()
        for item, grad_max in zip(work, maxima, strict=True):
            ops.step_(
                item.params,
                item.grads,
                grad_max,
                [
                    self._state_of(param, layout)
                    for param, layout in zip(item.params, item.layouts, strict=True)
                ],
                item.indices,
                [offsets[idx] for idx in item.indices],
                step_options(item.group, grad_scale),
            )
        return loss

    def _amp_scale(self) -> tuple[float, bool]:
        """GradScaler leaves its scale and its verdict on the gradients on the optimizer."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        return (
            1.0 if scale is None else float(scale),
            found_inf is not None and bool(found_inf > 0),
        )

    def _collect(self) -> list[_GroupWork]:
        """Gathers and checks everything that a step touches; changes nothing."""
        work = []
        num_params = 0
        for group_idx, group in enumerate(self.param_groups):
            check_options(group)
            item = _GroupWork(group, [], [], [], [], [])
            structure = tuple(group[name] for name in STRUCTURAL_OPTIONS)
            for idx, param in enumerate(group["params"]):
                if param.grad is not None and param.numel() > 0:
                    name = _param_name(group, group_idx, idx)
                    _check_grad(name, param, param.grad)
                    item.params.append(param)
                    item.grads.append(param.grad.resolve_neg().contiguous())
                    item.layouts.append(self._layout(name, param, group, structure))
                    item.indices.append(num_params + idx)
                    item.names.append(name)
            num_params += len(group["params"])
            work.append(item)
        return work

    def _layout(
        self, name: str, param: Tensor, group: dict[str, Any], structure: tuple[object, ...]
    ) -> Layout:
        key = (*structure, param.shape, param.dtype)
        cached = self._layouts.get(param)
        if cached is not None and cached[0] == key:
            return cached[1]
        layout = Layout.of(param, group)
        if self.state.get(param):
            check_state(name, self.state[param], layout)
        self._layouts[param] = (key, layout)
        return layout

    def _state_of(self, param: Tensor, layout: Layout) -> State:
        state: State = self.state[param]
        if not state:
            state.update(new_state(param, layout))
        return state

    @staticmethod
    def _must_skip(work: list[_GroupWork], maxima: list[Tensor]) -> bool:
        skip = False
        for item, grad_max in zip(work, maxima, strict=True):
            policy = item.group["nonfinite"]
            if policy == "propagate" or bool(grad_max.isfinite().all()):
                continue
            if policy == "raise":
                owners = [
                    name
                    for name, layout in zip(item.names, item.layouts, strict=True)
                    for _ in range(layout.count)
                ]
                name = owners[grad_max.isfinite().tolist().index(False)]
                raise RuntimeError(
                    f"gradient of {name}: expected finite values, got NaN or infinity "
                    "(nonfinite='raise'); nothing has changed"
                )
            skip = True
        return skip

    def _stagger_offsets(self) -> list[tuple[int, int]]:
        periods = [group["precondition_frequency"] for group in self.param_groups]
        if self._offsets is None or self._offsets[0] != periods:
            layouts = [
                (Layout.of(param, group), group["precondition_frequency"])
                for group in self.param_groups
                for param in group["params"]
            ]
            self._offsets = (periods, stagger_offsets(layouts))
        return self._offsets[1]

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """How each parameter with state fares, by name; a stack of matrices gives its worst.

        Returns:
            per parameter ``step`` and ``update_rms`` (of the last update, before lr), and with
            factors ``rho`` (the factor scale, in gradient units), ``condition_L``, ``condition_R``
            (largest over smallest diagonal entry in the basis), ``staleness_L``, ``staleness_R``
            (the off-diagonal share of the squared norm), ``orthogonality_L``,
            ``orthogonality_R`` (``||Q^T Q x - x|| / ||x||`` for a fixed x), ``refreshes`` and
            ``refresh_fallbacks``.
            The entry "optimizer" holds ``skipped_steps``.
        """
        report: dict[str, dict[str, float]] = {"optimizer": {"skipped_steps": self.skipped_steps}}
        for group_idx, group in enumerate(self.param_groups):
            for idx, param in enumerate(group["params"]):
                if self.state.get(param):
                    name = _param_name(group, group_idx, idx)
                    report[name] = parameter_diagnostics(self.state[param])
        return report

    def state_bytes(self) -> dict[str, int]:
        """Bytes of state by kind: exp_avg, exp_avg_sq, factors, bases, master, scalars, total."""
        sizes = dict.fromkeys([*KINDS.values(), "scalars"], 0)
        for state in self.state.values():
            for key, value in state.items():
                sizes[KINDS.get(key, "scalars")] += value.numel() * value.element_size()
        sizes["total"] = sum(sizes.values())
        return sizes

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer, with ``skipped_steps``; loads with ``weights_only=True``."""
        return {**super().state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state exactly: unlike torch's own, without a cast to the parameters' dtypes.

        Raises:
            ValueError: for state that does not fit the parameters and options, naming the
                parameter and tensor; the optimizer is as it was.
        """

        def prepare(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            self._incoming = self._checked_state_dict(loaded)
            return self._incoming

        # Registered last, so that it sees what other pre-hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming = None

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``state_dict`` after all checks, with the options that it lacks taken from the groups."""
        groups = state_dict["param_groups"]
        lengths = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != lengths:
            return state_dict  # torch raises its own message
        filled = []
        for group_idx, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            options = dict(saved)
            for name in RULES:
                options.setdefault(name, group[name])
            check_options(options)
            for idx, (param, saved_idx) in enumerate(
                zip(group["params"], saved["params"], strict=True)
            ):
                state = state_dict["state"].get(saved_idx)
                if state:
                    name = _param_name(group, group_idx, idx)
                    check_state(name, state, Layout.of(param, options))
            filled.append(options)
        return {**state_dict, "param_groups": filled}

    def _take_exactly(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces state that torch has cast to the parameters' dtypes."""
        ids = [idx for group in state_dict["param_groups"] for idx in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, idx in zip(params, ids, strict=True):
            if state_dict["state"].get(idx):
                self.state[param] = {
                    name: value.detach()
                    .to(param.device)
                    .clone(memory_format=torch.contiguous_format)
                    for name, value in state_dict["state"][idx].items()
                }
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()
        incoming = getattr(self, "_incoming", None)
        if incoming is not None:
            self._take_exactly(incoming)
        for group in self.param_groups:
            for name in RULES:
                group.setdefault(name, self.defaults[name])
        for param_state in self.state.values():
            # State of torch.optim.AdamW, for parameters without factors.
            if param_state and "update_rms" not in param_state:
                param_state["update_rms"] = torch.zeros_like(param_state["step"])


def _param_name(group: Mapping[str, Any], group_idx: int, idx: int) -> str:
    names = group.get("param_names")
    return names[idx] if names is not None else f"param_groups[{group_idx}]['params'][{idx}]"


def _check_param(param: Tensor) -> None:
    if param.dtype not in PARAM_DTYPES:
        expected = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise ValueError(f"params: expected dtypes {expected}, got {param.dtype}")
    strides = zip(param.stride(), param.shape, strict=True) if param.layout == torch.strided else ()
    if any(stride == 0 and size > 1 for stride, size in strides):
        raise ValueError(
            "params: expected tensors whose elements do not share memory, "
            f"got shape {tuple(param.shape)} with strides {param.stride()}"
        )
    if param.device.type != "cpu" or param.layout != torch.strided:
        raise ValueError(
            "params: expected dense tensors on the CPU (the only backend of this build), "
            f"got {param.layout} on {param.device}"
        )


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {name}: expected a dense tensor, got {grad.layout}")
    if grad.dtype != param.dtype or grad.device != param.device or grad.shape != param.shape:
        raise ValueError(
            f"gradient of {name}: expected {_describe(param)} as the parameter, "
            f"got {_describe(grad)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
