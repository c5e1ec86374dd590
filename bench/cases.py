"""Every operation of dykaf.ops with its inputs, its plain-torch form and its count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dykaf
from bench import composed, counts
from bench.counts import Count
from bench.optimizers import TWO_SIDED
from bench.shapes import Matrix, Shape, Workload
from dykaf import ops
from dykaf.options import StepOptions, step_options
from dykaf.state import State

# Every operation there is: both factors, dense.
DENSE = {**TWO_SIDED, "skinny_rank": 0}
NO_REFRESH = 1 << 40  # a step at which no side is due


def clone(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


class Inputs:
    """What the operations read and change: a workload after its first two gradients.

    Args:
        workload: shapes and max_precond_dim.
        device: "cpu" or "cuda".
        precision: of float32 products.
    """

    def __init__(self, workload: Workload, device: str, precision: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [
                torch.randn(shape, generator=generator, device=device) * scale
                for shape in workload.shapes
            ]

        self.workload = workload
        self.device = device
        self.precision = precision
        self.params, self.grads, self.updates = draw(0.02), draw(1e-3), draw(1.0)
        # Parameters of one shape start from the same state; a first basis is expensive.
        states = {shape: self._state(shape, draw) for shape in dict.fromkeys(workload.shapes)}
        self.states = [clone(states[shape]) for shape in workload.shapes]
        changed = [*self.params, *self.updates]
        self.saved = ([x.clone() for x in changed], [clone(state) for state in self.states])
        self.counts = [x.num_matrices for x in workload.matrices()]
        self.streams = list(range(len(self.params)))
        self.offsets = [(0, 0)] * len(self.params)

    def _state(self, shape: Shape, draw: Callable[[float], list[Tensor]]) -> State:
        place = self.workload.shapes.index(shape)
        param = torch.nn.Parameter(self.params[place].clone())
        group = {"params": [param], "batch_dims": len(shape) - 2}
        optimizer = dykaf.DyKAF([group], max_precond_dim=self.workload.max_precond_dim, **DENSE)
        for grad in (self.grads[place], draw(1e-3)[place]):
            param.grad = grad
            optimizer.step()
        state: State = optimizer.state[param]
        state["next_refresh"].fill_(NO_REFRESH)
        return state

    def restore(self) -> None:
        """Undo every change."""
        tensors, states = self.saved
        torch._foreach_copy_([*self.params, *self.updates], tensors)
        for state, saved in zip(self.states, states, strict=True):
            for key, value in state.items():
                value.copy_(saved[key])

    def options(self, integrator: str, **others: int) -> StepOptions:
        options = {**DENSE, "integrator": integrator, **others}
        optimizer = dykaf.DyKAF(
            [torch.zeros(1)],
            factor_beta=None,
            rescale_exp_avg_sq=False,
            matmul_precision=self.precision,
            **options,
        )
        return step_options(optimizer.param_groups[0], 1.0)


Calls = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        name: the operation, with what distinguishes its rows.
        make: the call of the operation and of its plain-torch form, on given inputs.
        count: flops and bytes for one matrix.
    """

    name: str
    make: Callable[[Inputs], Calls]
    count: Callable[[Matrix], Count]


def both(op: Callable[..., object], plain: Callable[..., object], *arguments: object) -> Calls:
    return partial(op, *arguments), partial(plain, *arguments)


def grad_max(x: Inputs) -> Calls:
    return both(ops.grad_max, composed.grad_max, x.grads, x.counts)


def rotate(x: Inputs, into_basis: bool) -> Calls:
    options = x.options("ksl")
    return both(ops.rotate, composed.rotate, x.grads, x.states, into_basis, options)


def adam_update(x: Inputs) -> Calls:
    return both(ops.adam_update_, composed.adam_update_, x.grads, x.states, x.options("ksl"))


def orthogonalize(x: Inputs) -> Calls:
    options = x.options("ksl", orthogonalize=counts.NEWTON_SCHULZ_STEPS)
    return both(ops.orthogonalize_, composed.orthogonalize_, x.updates, x.states, options)


def apply_update(x: Inputs) -> Calls:
    arguments = (x.params, x.updates, x.states, x.streams, x.options("ksl"))
    return both(ops.apply_update_, composed.apply_update_, *arguments)


def factor_update(x: Inputs, integrator: str) -> Calls:
    options = x.options(integrator)
    return both(ops.factor_update_, composed.factor_update_, x.grads, x.states, options)


def initialize(x: Inputs) -> Calls:
    arguments = (x.grads, x.states, x.offsets, x.options("ksl"))
    return both(ops.initialize_, composed.initialize_, *arguments)


def refresh_basis(x: Inputs) -> Calls:
    options = x.options("ksl")

    def both_sides(refresh: Callable[..., object]) -> None:
        for side in ("left", "right"):
            refresh(x.states, side, options)

    return partial(both_sides, ops.refresh_basis_), partial(both_sides, composed.refresh_basis_)


def step(x: Inputs, integrator: str) -> Calls:
    options = x.options(integrator)
    maxima = ops.grad_max(x.grads, x.counts)
    return (
        lambda: ops.step_(x.params, x.grads, maxima, x.states, x.streams, x.offsets, options),
        lambda: composed.step_(x.params, x.grads, x.states, x.streams, options),
    )


INTEGRATORS = ("ksl", "bug", "diagonal")


def _integrator_case(
    name: str, make: Callable[..., Calls], count: Callable[..., Count], integrator: str
) -> Case:
    return Case(
        f"{name} {integrator}",
        partial(make, integrator=integrator),
        partial(count, integrator=integrator),
    )


CASES = {
    case.name: case
    for case in (
        Case("grad_max", grad_max, counts.grad_max),
        Case("rotate into", partial(rotate, into_basis=True), counts.rotate),
        Case("rotate back", partial(rotate, into_basis=False), counts.rotate),
        Case("adam_update_", adam_update, counts.adam_update),
        Case("orthogonalize_", orthogonalize, counts.orthogonalize),
        Case("apply_update_", apply_update, counts.apply_update),
        *(
            _integrator_case("factor_update_", factor_update, counts.factor_update, integrator)
            for integrator in INTEGRATORS
        ),
        Case("initialize_", initialize, partial(counts.initialize, integrator="ksl")),
        Case("refresh_basis_", refresh_basis, counts.refresh_basis),
        *(_integrator_case("step_", step, counts.step, integrator) for integrator in INTEGRATORS),
    )
}

# Both sides, either side longer than max_precond_dim, and a stack.
CHECK = Workload("check", "", ((24, 16), (16, 24), (48, 16), (16, 48), (2, 8, 12)), 32, 1)
# Both forms round differently, by some tens of units of 6e-8 in products this small.
TOLERANCE = 1e-4


def invariants(x: Inputs, output: object) -> dict[str, Tensor]:
    """Everything a call may change, in original coordinates where bases may differ in sign."""
    found: dict[str, Tensor] = {}
    if isinstance(output, Tensor):
        output = [output]
    if isinstance(output, list):
        found |= {f"output {idx}": value for idx, value in enumerate(output)}
    for idx, (param, state) in enumerate(zip(x.params, x.states, strict=True)):
        found[f"params {idx}"] = param
        found[f"updates {idx}"] = x.updates[idx]
        for key in ("rho", "step", "update_rms"):
            found[f"{key} {idx}"] = state[key]
        found[f"exp_avg_sq {idx}"] = state["exp_avg_sq"]
        (found[f"exp_avg {idx}"],) = composed.rotate(
            [state["exp_avg"]], [state], False, x.options("ksl")
        )
        for key in ("L", "R"):
            if key in state:
                Q = state[f"Q_{key}"]
                found[f"{key} {idx}"] = Q @ state[key] @ Q.mT
                found[f"Q_{key}^T Q_{key} {idx}"] = Q.mT @ Q
    return {key: value.double().clone() for key, value in found.items()}


def check_agreement(case: Case, device: str) -> None:
    """Run an operation and its plain-torch form from the same state.

    Raises:
        ArithmeticError: naming what differs and by how much.
    """
    results = []
    for idx in range(2):
        x = Inputs(CHECK, device, "highest")
        if case.name == "initialize_":
            for state in x.states:  # exp_avg is kept in the basis, whose sign is free
                state["exp_avg"].zero_()
        results.append(invariants(x, case.make(x)[idx]()))
    actual, expected = results
    for key, value in expected.items():
        difference = float((actual[key] - value).norm() / value.norm().clamp_min(1e-30))
        if not difference <= TOLERANCE:
            raise ArithmeticError(
                f"{case.name}: the operation and its plain-torch form differ in {key} "
                f"by {difference:.1e} of its norm, expected at most {TOLERANCE:.0e}"
            )
