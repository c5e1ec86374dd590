"""The operations of the optimizer, each over a list of parameters in one call.

All tensors of a call are on one device, but for what :mod:`dykaf.state` keeps on the host.
States are the dictionaries of :mod:`dykaf.state`; tensors named ``grads``, ``inputs`` or
``updates`` are contiguous, ``[batch, m, n]``, in the state's dtype unless said otherwise. All raise
``ValueError``, naming the tensor, what was expected and what came, before anything has changed.
Formulas: docs/algorithm.md; source: Yudin et al., arXiv 2511.06477.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dykaf import _C, products
from dykaf.options import StepOptions
from dykaf.products import ProductRule
from dykaf.state import State

# Where the elements of a shard are in the whole matrix, whose random bits they take for stochastic
# rounding: runs of ``run`` elements that start ``stride`` apart, from ``first`` on; run 0: all.
Place = tuple[int, int, int]  # first, run, stride
Rates = tuple[int, float, float]  # number of parameters, their lr and weight_decay

_C.use_aten_alone(os.environ.get("DYKAF_BACKEND") == "aten")


def backend_of(tensor: Tensor, name: str = "tensor") -> str:
    """The backend that serves a parameter, gradient or state tensor.

    Returns:
        "cpu", "cuda" (hand-written kernels, where they were built; not for float64), or "aten":
        torch's own operations, for all else.

    Raises:
        ValueError: naming ``name``, for a tensor without memory.
    """
    return _C.backend_of(tensor, name)


@contextlib.contextmanager
def aten_alone() -> Iterator[None]:
    """Within it the backend "aten" serves all tensors, as with the environment DYKAF_BACKEND=aten.

    For comparisons; a state is the same on every backend. The choice holds for all threads.
    """
    before = _C.use_aten_alone(True)
    try:
        yield
    finally:
        _C.use_aten_alone(before)


def set_product_rules(rules: Sequence[ProductRule]) -> None:
    """From now on these say which products cuBLAS computes on a GPU; the first that fits decides.

    A step keeps the rules that it was planned with. The same rules give the same bits.
    """
    _C.use_products(rules)


def use_products(path: str | Path | None = None) -> None:
    """:func:`set_product_rules` with those of a file as :mod:`dykaf.products` describes it.

    Args:
        path: the file; None: the package's own.

    Raises:
        ValueError: naming the line that is no rule.
    """
    set_product_rules(products.read(path or products.DEFAULT_FILE))


use_products(os.environ.get("DYKAF_PRODUCTS"))


def has_cublas() -> bool:
    """Whether torch has loaded a cuBLAS that can be called; else the kernels compute all."""
    return _C.has_library()


def grad_max(grads: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The largest magnitude in each gradient.

    Args:
        grads: contiguous tensors of any floating dtype.
        counts: the number of equal parts (matrices of a stack) in each gradient.

    Returns:
        float64 ``[sum(counts)]``; NaN for a part with an entry that is not finite.
    """
    return _C.grad_max(grads, counts)


def rotate(
    inputs: Sequence[Tensor], states: Sequence[State], into_basis: bool, options: StepOptions
) -> list[Tensor]:
    """``Q_L^T X Q_R`` of each input X, or with ``into_basis=False`` its inverse ``Q_L X Q_R^T``."""
    return _C.rotate(inputs, states, into_basis, options)


def adam_update_(
    grads: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> list[Tensor]:
    """Advances step, exp_avg, the second moment and update_rms in place with rotated gradients.

    Returns:
        the bias-corrected updates D in the basis, before lr.
    """
    return _C.adam_update_(grads, states, options)


def orthogonalize_(
    updates: Sequence[Tensor], states: Sequence[State], options: StepOptions
) -> None:
    """Newton-Schulz steps towards the nearest orthogonal matrix, times 0.2 sqrt(max(m, n)).

    Args:
        updates: changed in place; in the basis or out of it, for the steps commute with rotations.
        states: of matrices with factors, none of them skinny; ``update_rms`` is set.
        options: the group's; ``orthogonalize`` is the number of steps, and 0 changes nothing.

    Source: Jordan et al. 2024 (Muon) for the coefficients.
    """
    _C.orthogonalize_(updates, states, options)


def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    states: Sequence[State],
    streams: Sequence[int],
    options: StepOptions,
    places: Sequence[Place] = (),
) -> None:
    """``W <- W (1 - lr weight_decay) - lr update`` in place, for parameters of any strides.

    Args:
        params: float64, float32, bfloat16 or float16.
        updates: in original coordinates.
        states: ``step`` is read, and ``master`` changed in place where there is one.
        streams: per parameter a number that names its random bits for stochastic rounding; matrix i
            of a stack has the one that is i larger.
        options: lr, weight_decay and seed are read.
        places: of parameters that are shards, one each; () for whole ones.
    """
    _C.apply_update_(params, updates, states, streams, options, places)


def factor_update_(grads: Sequence[Tensor], states: Sequence[State], options: StepOptions) -> None:
    """Advances L, R and rho in place by one integrator step with rotated gradients."""
    _C.factor_update_(grads, states, options)


def initialize_(
    grads: Sequence[Tensor],
    states: Sequence[State],
    offsets: Sequence[tuple[int, int]],
    options: StepOptions,
) -> None:
    """Sets factors, bases and refresh dates in place from the first gradients.

    Args:
        grads: unrotated gradients; one that is all zero changes nothing.
        states: zero, as :func:`dykaf.state.new_state` makes them.
        offsets: places of the left and the right side in the refresh period.
        options: the group's.
    """
    _C.initialize_(grads, states, offsets, options)


def refresh_basis_(states: Sequence[State], side: str, options: StepOptions) -> None:
    """One power iteration with orthonormalisation of the bases of ``side``, "left" or "right".

    L or R, exp_avg and the second moment follow in place. Where the iteration fails the old basis
    stays, and refresh_fallbacks counts it.
    """
    _C.refresh_basis_(states, side, options)


def refresh_due_(
    states: Sequence[State],
    offsets: Sequence[tuple[int, int]],
    options: StepOptions,
    kept: Sequence[Tensor] = (),
    full: Sequence[Tensor] = (),
) -> None:
    """Counts a step of each matrix that has had its first gradient, and refreshes what is due then.

    Args:
        states: changed in place.
        offsets: see :func:`initialize_`.
        options: the group's.
        kept: see :class:`StepJob`.
        full: see :class:`StepJob`.
    """
    _C.refresh_due_(states, offsets, options, kept, full)


class StepJob(NamedTuple):
    """The step of some parameters of one group on one device.

    Attributes:
        params: of any strides.
        grads: contiguous, of the parameters' dtypes, read only.
        grad_max: what :func:`grad_max` returned for these gradients.
        states: changed in place.
        streams: see :func:`apply_update_`.
        offsets: see :func:`initialize_`.
        options: the group's.
        skip: on a GPU, int32 ``[1]``: where it is not 0 the step changes nothing.
        amp_scale: on a GPU, float32 ``[1]``: gradients are divided by it.
        lr: on a GPU, float32 ``[1]``: used in place of the option.
        refresh: False leaves out :func:`refresh_due_`.
        kept: tensors of the optimizer's in bfloat16; they are copied to ``full`` before the job's
            step and back after it.
        full: tensors of ``states``, without values, which other jobs may use too.
        places: see :func:`apply_update_`.
        rates: of runs of parameters, in place of the options'; () for these.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    grad_max: Tensor
    states: Sequence[State]
    streams: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    options: StepOptions
    skip: Tensor | None = None
    amp_scale: Tensor | None = None
    lr: Tensor | None = None
    refresh: bool = True
    kept: Sequence[Tensor] = ()
    full: Sequence[Tensor] = ()
    places: Sequence[Place] = ()
    rates: Sequence[Rates] = ()


class StepInputs(NamedTuple):
    """What of a :class:`StepJob` may differ in the next step of the same parameters."""

    options: StepOptions
    skip: Tensor | None = None
    amp_scale: Tensor | None = None
    lr: Tensor | None = None
    refresh: bool = True
    rates: Sequence[Rates] = ()


class StepReport(NamedTuple):
    """What a step could not do for parameters or matrices of each job, by their places."""

    failed: list[list[int]]  # parameters not updated; they and their state are as before
    stayed: list[list[int]]  # parameters updated, but an old basis stayed
    waiting: list[list[int]]  # matrices on a GPU that have seen zero gradients alone


class Jobs:
    """The jobs of one step, and of those after it that find all as it was.

    Args:
        jobs: of one step; all is checked here.
    """

    def __init__(self, jobs: Sequence[StepJob]) -> None:
        self._jobs = _C.Jobs(jobs)

    def run(self, started: Tensor | None = None) -> StepReport:
        """The whole step of all jobs, in place: all of the above in their order.

        What can fail for lack of memory comes first, the first gradients included: an exception
        means that all is as before. No signal is seen while it runs.

        Args:
            started: a tensor on the CPU, filled with 1 before the first change that stays: an
                exception after that, such as a KeyboardInterrupt, comes after the step.

        Returns:
            what failed later, and what waits for a first gradient.
        """
        return StepReport(*self._jobs.run(_started(started)))

    def keep(
        self,
        groups: list[list[Tensor]],
        states: Mapping[Tensor, State],
        places: Sequence[Sequence[int]],
    ) -> bool:
        """Lets go of all tensors; what is left are their addresses, for the next step.

        Args:
            groups: the parameters of all groups.
            states: by parameter.
            places: of each job's parameters among those of all groups.

        Returns:
            whether addresses are enough: not for what "aten" serves, for parameters that are not
            contiguous, and for factors and bases in bfloat16.
        """
        return self._jobs.keep(groups, states, places)

    def grad_max(
        self, groups: list[list[Tensor]], states: Mapping[Tensor, State]
    ) -> list[Tensor] | None:
        """What :func:`grad_max` gives for the new gradients of each job, which are held until then.

        Returns:
            None where parameters, state or which of them have gradients are not as they were.
        """
        return self._jobs.grad_max(groups, states)

    def let_go(self) -> None:
        """Lets go of the new gradients."""
        self._jobs.let_go()

    def run_again(self, inputs: Sequence[StepInputs], started: Tensor | None = None) -> StepReport:
        """As :meth:`run`, with the gradients that :meth:`grad_max` has seen."""
        return StepReport(*self._jobs.run_again(inputs, _started(started)))


def _started(started: Tensor | None) -> Tensor:
    return torch.zeros(1, device="cpu") if started is None else started


def step_(*args: Any, **kwargs: Any) -> None:
    """:meth:`Jobs.run` of one :class:`StepJob`, given by its fields.

    Raises:
        RuntimeError: naming parameters that could not be updated.
    """
    report = Jobs([StepJob(*args, **kwargs)]).run()
    if report.failed[0]:
        raise RuntimeError(f"step_: could not update the parameters {report.failed[0]}")
