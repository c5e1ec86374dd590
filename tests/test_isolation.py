"""Nothing that torch is told outside reaches the arithmetic, and nothing leaks out of a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import backends
import pytest
import torch
from optim_helpers import Bits, bits, gradient, params_of, randn, state_bits
from torch import Tensor, nn

from dykaf import DyKAF

pytestmark = pytest.mark.usefixtures("each_optimizer")

STEPS = 4 if backends.is_gpu() else 25
# Dense (one large enough for BLAS to use threads), one side over max_precond_dim, skinny, a vector.
SHAPES = [(12, 9), (9, 130), (130, 9), (2, 80), (80, 2), (7,)]
if not backends.is_gpu():
    SHAPES.append((96, 80))
OPTIONS: dict[str, dict[str, Any]] = {
    "highest": {"matmul_precision": "highest"},
    "medium": {"matmul_precision": "medium"},
    "bfloat16 state": {"matmul_precision": "highest", "state_dtype": "bfloat16"},
    "ksl medium": {"matmul_precision": "medium", "integrator": "ksl"},
    "bug factored": {
        "matmul_precision": "highest",
        "integrator": "bug",
        "init": "rank_one",
        "second_moment": "factored",
    },
}


def make(**options: Any) -> DyKAF:
    params = [
        nn.Parameter(randn(*shape, seed=idx, dtype=torch.float32).to(backends.device()))
        for idx, shape in enumerate(SHAPES)
    ]
    return DyKAF(params, max_precond_dim=100, skinny_rank=4, precondition_frequency=3, **options)


@pytest.fixture(scope="module")
def grads() -> list[list[Tensor]]:
    """Of every step, made outside of everything that the tests set."""
    params = params_of(make())
    return [
        [gradient(param, step, idx) for idx, param in enumerate(params)] for step in range(STEPS)
    ]


def run(optimizer: DyKAF, grads: list[list[Tensor]]) -> None:
    for step_grads in grads:
        for param, grad in zip(params_of(optimizer), step_grads, strict=True):
            param.grad = grad
        optimizer.step()


def outcome(optimizer: DyKAF) -> list[tuple[Bits, dict[str, Bits]]]:
    params = [bits(param) for param in params_of(optimizer)]
    return list(zip(params, state_bits(optimizer), strict=True))


PLAIN: dict[tuple[type, str], list[tuple[Bits, dict[str, Bits]]]] = {}  # by class and case


@pytest.fixture(params=OPTIONS)
def case(request: pytest.FixtureRequest, grads: list[list[Tensor]]) -> str:
    """Whose plain run is known."""
    if (DyKAF, request.param) not in PLAIN:
        optimizer = make(**OPTIONS[request.param])
        run(optimizer, grads)
        PLAIN[DyKAF, request.param] = outcome(optimizer)
        refreshes = [
            state["refreshes"].sum() for state in optimizer.state.values() if "rho" in state
        ]
        assert all(int(count) > 0 for count in refreshes)
    return request.param


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Fills memory that nobody has set with NaN, too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast(backends.device().type, torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "precision medium": lambda: precision("medium"),
    "precision high": lambda: precision("high"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_bits_are_those_of_a_plain_run(
    case: str, context: str, grads: list[list[Tensor]]
) -> None:
    """Half of the steps within, the others outside: what was made within serves there."""
    for first in (0, STEPS // 2):
        optimizer = make(**OPTIONS[case])
        run(optimizer, grads[:first])
        with CONTEXTS[context]():
            run(optimizer, grads[first : STEPS - 1])
        run(optimizer, grads[STEPS - 1 :])
        assert outcome(optimizer) == PLAIN[DyKAF, case]


def test_diagnostics_under_autocast(case: str, grads: list[list[Tensor]]) -> None:
    optimizer = make(**OPTIONS[case])
    run(optimizer, grads)
    expected = optimizer.diagnostics()
    with CONTEXTS["autocast"]():
        assert optimizer.diagnostics() == expected


def settings() -> list[object]:
    """What torch computes float32 products with."""
    found: list[object] = [
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_num_threads(),
    ]
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        matmul = getattr(backend, "matmul", None)
        found.append(getattr(matmul, "fp32_precision", None))
    return found


def test_torch_is_told_nothing_while_a_step_runs(case: str, grads: list[list[Tensor]]) -> None:
    """Neither what another thread sees during the steps, nor what is there after them."""
    for setting in ("highest", "medium"):
        with precision(setting):
            expected = settings()
            seen: list[list[object]] = []
            done = threading.Event()

            def watch(seen: list[list[object]] = seen, done: threading.Event = done) -> None:
                while not done.is_set():
                    seen.append(settings())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                optimizer = make(**OPTIONS[case])
                run(optimizer, grads)
            finally:
                done.set()
                watcher.join()
            assert settings() == expected
            assert len(seen) > 10
            assert all(other == expected for other in seen)
            assert outcome(optimizer) == PLAIN[DyKAF, case]


def test_optimizers_of_several_threads(grads: list[list[Tensor]]) -> None:
    """Each with its own precision, at the same time."""
    optimizers = {
        (name, copy): make(**OPTIONS[name]) for copy in range(2) for name in ("medium", "highest")
    }
    expected = {}
    for name in ("medium", "highest"):
        alone = make(**OPTIONS[name])
        run(alone, grads)
        expected[name] = outcome(alone)
    threads = [
        threading.Thread(target=run, args=(optimizer, grads)) for optimizer in optimizers.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (name, _), optimizer in optimizers.items():
        assert outcome(optimizer) == expected[name]
