"""What the backend of torch's own operations promises beside its values, on tensors on the CPU.

Its values are those of every backend: `pytest --backend aten` runs their tests over it; and
tests/test_out_of_memory.py has its allocations fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_helpers import randn, run, two_sided
from reference import two_sided_reference
from tolerances import TRAJECTORY, gamma
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dykaf import DyKAF, ops
from dykaf.options import step_options
from dykaf.state import SCALE_KEYS, Layout, new_state

pytestmark = pytest.mark.skipif(
    "__import__('backends').BACKEND not in ('cpu', 'aten')", reason="takes tensors on the CPU"
)

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "ksl": {"integrator": "ksl"},
    "bug, rank-one moments": {"integrator": "bug", "second_moment": "rank_one"},
    "factored moments": {"second_moment": "factored"},
    "one side": {"max_precond_dim": 6},
    "no side": {"max_precond_dim": 0},
    "nesterov": {"nesterov": True},
    "orthogonal": {"orthogonalize": 2, "nesterov": True},
}


@pytest.fixture(autouse=True)
def aten() -> Iterator[None]:
    with ops.aten_alone():
        yield


class Calls(TorchDispatchMode):
    """Counts the operations, without those that only look at memory; may forbid some."""

    def __init__(self, forbidden: tuple[str, ...] = (), no_float64: bool = False) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._forbidden, self._no_float64 = forbidden, no_float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name in self._forbidden:
            raise AssertionError(f"{name} waits for the device")
        if not func.is_view:
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if self._no_float64:
            for output in outputs:
                assert not (isinstance(output, Tensor) and output.dtype == torch.float64), name
        return result


WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


def several(num: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, seed=idx, dtype=dtype) for shape in shapes for idx in range(num)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_launches_do_not_grow_with_the_number_of_parameters(name: str, dtype: torch.dtype) -> None:
    """Matrices, skinny ones, stacks, vectors; with a refresh of both sides in each step."""
    totals = []
    for num in (2, 5):
        params = several(num, (8, 5), (4, 130), (7,), (3, 8, 5), dtype=dtype)
        options = {"precondition_frequency": 1, **FORMS[name]}
        optimizer = DyKAF([{"params": params, "batch_dims": 0}], **options)
        run(optimizer, range(3))
        with Calls() as calls:
            optimizer.step()
        totals.append(calls.counts)
    assert totals[0] == totals[1] and sum(totals[0].values()) > 20


@pytest.mark.parametrize("name", FORMS)
def test_no_host_waits_after_the_first_gradient(name: str) -> None:
    params = several(2, (8, 5), (4, 130), (7,), dtype=torch.bfloat16)
    optimizer = DyKAF(params, precondition_frequency=1, **FORMS[name])
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    run(optimizer, range(2))
    before = [param.clone() for param in params]
    grads = [[randn(*p.shape, seed=9 + s, dtype=p.dtype) for p in params] for s in range(4)]
    with Calls(forbidden=WAITS):
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad
            optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, params, strict=True))


def states_without_float64(params: list[Tensor], group: dict[str, Any]) -> list[dict[str, Tensor]]:
    states = [new_state(param, Layout.of(param, group)) for param in params]
    return [
        {key: value.float() if key in SCALE_KEYS else value for key, value in state.items()}
        for state in states
    ]


def amplification(state: dict[str, Tensor]) -> float:
    """By how much a relative error of the factors turns their eigenvectors: norm over least gap."""
    largest = 1.0
    for key in ("L", "R"):
        if key in state:
            eigenvalues = torch.linalg.eigvalsh(state[key])
            largest = max(largest, float(eigenvalues[-1] / eigenvalues.diff().min()))
    return largest


# What lets errors grow is left out: tests/test_ops.py has its rounding in float32.
@pytest.mark.parametrize("name", [*(name for name in FORMS if name != "orthogonal"), "skinny"])
def test_devices_without_float64(name: str) -> None:
    """As on MPS: the numbers that are float64 elsewhere are float32, and nothing else makes one.

    Against a run in float64, with the error of tests/test_gpu.py's trajectory. The skinny matrix is
    not refreshed, and few directions of its long side come to be known.
    """
    shapes = [(4, 130)] if name == "skinny" else [(8, 5), (7,)]
    params = [randn(*shape, seed=idx, dtype=torch.float32) for idx, shape in enumerate(shapes)]
    twins = [param.double() for param in params]
    options = {"eps": 1e-2, "precondition_frequency": 1000 if name == "skinny" else 3}
    group = DyKAF(twins, **options, **FORMS.get(name, {})).param_groups[0]
    states = states_without_float64(params, group)
    exact = [new_state(twin, Layout.of(twin, group)) for twin in twins]
    offsets = [(0, 0)] * len(params)
    steps = 12
    for step in range(steps):
        grads = [
            (randn(*shape, seed=50 * step + idx) + randn(*shape, seed=idx)).float()
            for idx, shape in enumerate(shapes)
        ]
        maxima = torch.stack([grad.abs().max() for grad in grads])
        arguments = (range(len(params)), offsets, step_options(group, 1.0))
        # At the first gradients decompositions may try float64, on the CPU.
        with Calls(no_float64=step > 0):
            ops.step_(params, grads, maxima, states, *arguments)
        wide = [grad.double() for grad in grads]
        ops.step_(twins, wide, maxima.double(), exact, *arguments)
    for param, twin, state in zip(params, twins, exact, strict=True):
        share = amplification(state) * gamma(2 * sum(param.shape), torch.float32)
        error = float((param - twin).norm()) / param.numel() ** 0.5
        assert error <= steps * (float(group["lr"]) * share + 2**-23)


def test_a_run_goes_on_with_another_backend() -> None:
    """The state is the same; here it changes hands every five steps."""
    shape = (6, 9)
    W = randn(*shape, seed=1)
    param = nn.Parameter(W.clone())
    optimizer = two_sided([param])
    ref = two_sided_reference(W, stagger_offsets=optimizer._stagger_offsets()[0])
    for step in range(30):
        param.grad = randn(*shape, seed=step) + randn(*shape, seed=99)
        ref.step(param.grad)
        if step // 5 % 2:
            optimizer.step()
        else:
            ops._C.use_aten_alone(False)
            assert ops.backend_of(param) == "cpu"
            optimizer.step()
            ops._C.use_aten_alone(True)
    travelled = float((ref.W - W).abs().max())
    assert float((param.detach() - ref.W).abs().max()) <= TRAJECTORY * travelled


def test_a_choice_within_another_leaves_it() -> None:
    tensor = torch.zeros(1)
    with ops.aten_alone(), ops.aten_alone():
        pass
    assert ops.backend_of(tensor) == "aten"  # by the fixture
    before = ops._C.use_aten_alone(False)
    try:
        with ops.aten_alone():
            with ops.aten_alone():
                pass
            assert ops.backend_of(tensor) == "aten"
        assert ops.backend_of(tensor) == "cpu"
    finally:
        ops._C.use_aten_alone(before)


def test_the_choice_of_a_process_and_of_a_part_of_it() -> None:
    code = (
        "import torch, dykaf; from dykaf import ops; x = torch.zeros(1)\n"
        "print(ops.backend_of(x))\n"
        "with ops.aten_alone(): print(ops.backend_of(x))\n"
        "print(ops.backend_of(x))"
    )
    found = {}
    for asked in ("", "aten"):
        env = {**os.environ, "DYKAF_BACKEND": asked}
        result = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        found[asked] = result.stdout.split()
    assert found == {"": ["cpu", "aten", "cpu"], "aten": ["aten", "aten", "aten"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_round_to_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    """Random bits in integer operations on tensors; magnitudes of every kind, infinity and NaN."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (64, 96), generator=generator)
    start = torch.ldexp(torch.randn(64, 96, generator=generator), exponents).to(dtype)
    start[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    update = torch.ldexp(torch.randn(64, 96, generator=generator), exponents - 9)
    group = DyKAF([start], seed=3, lr=0.5).param_groups[0]
    results = []
    for native in (False, True):
        param = start.clone()
        state = new_state(param, Layout.of(param, group))
        state["step"].fill_(7)
        ops._C.use_aten_alone(not native)
        ops.apply_update_([param], [update], [state], [5], step_options(group))
        results.append(param.view(torch.int16))
    ops._C.use_aten_alone(True)
    of_numbers = torch.ones(64, 96, dtype=torch.bool)
    of_numbers[0, 2] = False  # NaN's payload is nobody's
    assert torch.equal(results[0][of_numbers], results[1][of_numbers])
    assert all(bool(result.view(dtype)[0, 2].isnan()) for result in results)
    assert not torch.equal(results[0][of_numbers], start.view(torch.int16)[of_numbers])
