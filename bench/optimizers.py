"""The optimizers that are compared: how each is made, what it costs by formula, its state."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.report import INSTALL, BenchError
from bench.shapes import Matrix, Workload
from bench.textbook import TextbookDyKAF
from bench.textbook_soap import TextbookSOAP

Optimizer = torch.optim.Optimizer
Parameters = list[torch.nn.Parameter]

PRECONDITION_FREQUENCY = 10
LR, BETAS, WEIGHT_DECAY = 3e-3, (0.95, 0.95), 0.01
COMMON: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True)
class Spec:
    """One optimizer.

    Attributes:
        make: builds it for parameters and the longest side that keeps a factor.
        module: what must be importable, beside torch.
        products: pairs of products, 2 m n (m + n) flops each, in a plain step.
        refresh: flops of a refresh per cube of a side, decompositions as products take their time.
        takes_stacks: whether a stack of matrices is one parameter; else each matrix is.
    """

    make: Callable[[Parameters, int], Optimizer]
    module: str | None = None
    products: float = 0
    refresh: float = 0
    takes_stacks: bool = False


def with_the_whole_period(optimizer: Optimizer) -> Optimizer:
    """After its first step the schedule is where intervals no longer grow."""

    def go_on(*_: object) -> None:
        for state in optimizer.state.values():
            if "schedule_step" in state:
                state["schedule_step"].fill_(10 * PRECONDITION_FREQUENCY)
        handle.remove()

    handle = optimizer.register_step_post_hook(go_on)
    return optimizer


def dykaf(kind: str = "DyKAF", **options: Any) -> Callable[[Parameters, int], Optimizer]:
    """DyKAF or FISMO as it is from step 100 on."""

    def make(parameters: Parameters, max_precond_dim: int) -> Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim == ndim], "batch_dims": ndim - 2}
            for ndim in sorted({p.ndim for p in parameters})
        ]
        optimizer: Optimizer = getattr(importlib.import_module("dykaf"), kind)(
            groups,
            **COMMON,
            precondition_frequency=PRECONDITION_FREQUENCY,
            max_precond_dim=max_precond_dim,
            **options,
        )
        return with_the_whole_period(optimizer)

    return make


def on_aten(
    make: Callable[[Parameters, int], Optimizer],
) -> Callable[[Parameters, int], Optimizer]:
    """The same, served by torch's own operations."""

    def make_on_aten(parameters: Parameters, max_precond_dim: int) -> Optimizer:
        optimizer = make(parameters, max_precond_dim)
        aten_alone = importlib.import_module("dykaf.ops").aten_alone
        optimizer.step = aten_alone()(optimizer.step)  # type: ignore[method-assign]  # of this one
        return optimizer

    return make_on_aten


def textbook(
    kind: type[TextbookDyKAF] | type[TextbookSOAP],
) -> Callable[[Parameters, int], Optimizer]:
    def make(parameters: Parameters, max_precond_dim: int) -> Optimizer:
        return kind(
            parameters,
            **COMMON,
            precondition_frequency=PRECONDITION_FREQUENCY,
            max_precond_dim=max_precond_dim,
        )

    return make


def adamw(parameters: Parameters, max_precond_dim: int) -> Optimizer:
    return torch.optim.AdamW(parameters, **COMMON, fused=True)


def muon(parameters: Parameters, max_precond_dim: int) -> Optimizer:
    return torch.optim.Muon(parameters, lr=LR, weight_decay=WEIGHT_DECAY)


def soap_pytorch_optimizer(parameters: Parameters, max_precond_dim: int) -> Optimizer:
    optimizer: Optimizer = importlib.import_module("pytorch_optimizer").SOAP(
        parameters,
        **COMMON,
        precondition_frequency=PRECONDITION_FREQUENCY,
        max_precondition_dim=max_precond_dim,
    )
    return optimizer


def soap_heavyball(mode: str | None) -> Callable[[Parameters, int], Optimizer]:
    """HeavyBall's SOAP; it reads the mode of torch.compile from a global at each step."""

    def make(parameters: Parameters, max_precond_dim: int) -> Optimizer:
        heavyball = importlib.import_module("heavyball")
        optimizer: Optimizer = heavyball.SOAP(
            parameters,
            **COMMON,
            shampoo_beta=BETAS[1],
            precondition_frequency=PRECONDITION_FREQUENCY,
            max_precond_dim=max_precond_dim,
            merge_dims=False,
        )

        def set_mode(*_: object) -> None:
            heavyball.utils.compile_mode = mode

        optimizer.register_step_pre_hook(set_mode)
        return optimizer

    return make


def dykaf_spec(products: float, **options: Any) -> Spec:
    return Spec(dykaf(**options), "dykaf", products, refresh=14, takes_stacks=True)


TWO_SIDED = {"sides": "both", "nesterov": False, "orthogonalize": 0}
SPECS: dict[str, Spec] = {
    "dykaf": dykaf_spec(5),
    "dykaf-aten": Spec(on_aten(dykaf()), "dykaf", 5, refresh=14, takes_stacks=True),
    "dykaf-plain": dykaf_spec(2, orthogonalize=0),
    "dykaf-both": dykaf_spec(3, **TWO_SIDED),
    "dykaf-ksl": dykaf_spec(4, **TWO_SIDED, integrator="ksl"),
    "dykaf-bug": dykaf_spec(5, **TWO_SIDED, integrator="bug"),
    "dykaf-fixed": dykaf_spec(5, refresh_schedule="fixed"),
    "dykaf-factored": dykaf_spec(5, second_moment="factored"),
    "dykaf-no-skinny": dykaf_spec(5, skinny_rank=0),
    "dykaf-rank-one": dykaf_spec(5, second_moment="rank_one"),
    "fismo": Spec(dykaf("FISMO"), "dykaf", 6, refresh=14, takes_stacks=True),
    "textbook-dykaf": Spec(textbook(TextbookDyKAF), None, 6, refresh=16),
    "textbook-soap": Spec(textbook(TextbookSOAP), None, 4, refresh=12),
    "soap-heavyball": Spec(soap_heavyball(None), "heavyball", 4, refresh=16),
    "soap-heavyball-compiled": Spec(
        soap_heavyball("max-autotune-no-cudagraphs"), "heavyball", 4, refresh=16
    ),
    "soap-pytorch-optimizer": Spec(soap_pytorch_optimizer, "pytorch_optimizer", 4, refresh=14),
    "muon": Spec(muon),
    "adamw": Spec(adamw),
}
# Compiling takes a minute and more per shape; the other two modes are variations.
NOT_BY_DEFAULT = (
    "dykaf-aten",
    "dykaf-fixed",
    "dykaf-no-skinny",
    "dykaf-plain",
    "dykaf-rank-one",
    "soap-heavyball-compiled",
)
DEFAULT_OPTIMIZERS = tuple(name for name in SPECS if name not in NOT_BY_DEFAULT)
BASELINES = ("textbook-dykaf", "textbook-soap", "adamw")
FIRST_BASIS = 30  # flops per cube of a side, decompositions as products take their time
MUON_ITERATIONS = 5


def missing(name: str) -> str | None:
    """Why an optimizer cannot run, in one line; None if it can."""
    module = SPECS[name].module
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        return f"{name}: left out, torch {torch.__version__} has none (2.9 is the first)"
    try:
        if module is not None:
            importlib.import_module(module)
    except ImportError as error:
        return f"{name}: left out, {error} ({INSTALL})"
    return None


def installed(names: list[str], note: Callable[[str], None]) -> list[str]:
    """The optimizers that can run; `note` hears of the others.

    Raises:
        BenchError: if none can.
    """
    reasons = {name: missing(name) for name in dict.fromkeys(names)}
    for reason in filter(None, reasons.values()):
        note(reason)
    found = [name for name, reason in reasons.items() if reason is None]
    if not found:
        raise BenchError("none of these optimizers can be imported")
    return found


def step_flops(name: str, x: Matrix) -> float:
    """Flops of a plain step for one matrix, roughly."""
    m, n = x.m, x.n
    if name == "muon":
        short = min(m, n)
        return MUON_ITERATIONS * (4 * short * m * n + 2 * short**3)
    return SPECS[name].products * 2 * m * n * (m * x.left + n * x.right)


def cubes(x: Matrix) -> float:
    return float(x.m**3 * x.left + x.n**3 * x.right)


def expected_seconds(
    name: str, workload: Workload, num_rounds: int, flops: float, bandwidth: float
) -> float:
    """A rough estimate of `num_rounds` steps from the first one on, at given rates."""
    refreshes = num_rounds / PRECONDITION_FREQUENCY * SPECS[name].refresh
    first = FIRST_BASIS if SPECS[name].refresh else 0
    seconds = 0.0
    for x in workload.matrices():
        plain = step_flops(name, x) / flops + 8 * 4 * x.m * x.n / bandwidth
        seconds += x.num_matrices * (num_rounds * plain + (refreshes + first) * cubes(x) / flops)
    return seconds


def expected_bytes(name: str, workload: Workload) -> float:
    """Parameters, state and the temporaries of a step, roughly; gradients are shared."""
    factors = 1 if SPECS[name].refresh else 0
    floats = sum(
        x.num_matrices * (3 * x.m * x.n + 2 * factors * (x.m**2 * x.left + x.n**2 * x.right))
        for x in workload.matrices()
    )
    largest = max(x.m * x.n + factors * (x.m**2 + x.n**2) for x in workload.matrices())
    return 4.0 * (floats + 6 * largest)


KINDS = (
    ("exp_avg_sq", re.compile("exp_avg_sq")),
    ("exp_avg", re.compile("exp_avg|momentum_buffer")),
    ("bases", re.compile("^basis$|(^|_)Q(_|$)")),
    ("factors", re.compile("^([LR]|core)$|(^|_)GG(_|$)")),
)


def state_tensors(state: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested state, with the nearest key above it."""
    if isinstance(state, Tensor):
        yield key, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from state_tensors(value, str(name))
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from state_tensors(value, key)


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of all state tensors by kind, counted alike for every optimizer."""
    sizes = {name: 0 for name, _ in KINDS} | {"other": 0}
    for state in optimizer.state.values():
        for key, value in state_tensors(state):
            kind = next((name for name, pattern in KINDS if pattern.search(key)), "other")
            sizes[kind] += value.numel() * value.element_size()
    return sizes | {"total": sum(sizes.values())}
