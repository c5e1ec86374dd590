"""Inputs shared by the tests."""

from __future__ import annotations

from typing import Any

import backends
import optim_helpers
import pytest
import torch
from optim_helpers import BOTH
from tolerances import DEVIATIONS
from torch import Tensor

import dykaf
from dykaf.options import StepOptions, step_options
from dykaf.state import Layout, State, new_state


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deviations", action="store_true", help="print the largest deviations from the reference"
    )
    parser.addoption(
        "--backend", choices=backends.NAMES, default="cpu", help="what test_ops and test_gpu run on"
    )


def pytest_configure(config: pytest.Config) -> None:
    backends.select(config.getoption("--backend"))
    config.addinivalue_line(
        "markers", "of_dykaf: with each_optimizer, of what DyKAF alone has: its options, its values"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def is_meant(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("each_optimizer") != "FISMO" or not item.get_closest_marker("of_dykaf")

    items[:] = [item for item in items if is_meant(item)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--deviations"):
        terminalreporter.section("largest relative deviation from the float64 reference")
        for (test, dtype), deviation in sorted(DEVIATIONS.items()):
            terminalreporter.write_line(f"{test:64} {dtype:8} {deviation:.1e}")


DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 7), (5, 1), (2, 16), (6, 4), (16, 16), (33, 17), (17, 33), (65, 33)]
# Sizes at which the symmetric products switch to panels and the loops to several threads.
LARGE_SHAPES = [(600, 40), (40, 600), (530, 530)]


def shape_id(shape: tuple[int, int]) -> str:
    return "x".join(str(size) for size in shape)


all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
factor_shapes = pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=shape_id)


def doubles(state: State) -> State:
    return {key: value.double().clone() for key, value in state.items()}


class Matrices:
    """Random states of one dtype, as an optimizer with given options would hold them; without
    skinny matrices, which the single operations do not take."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def orthogonal(self, n: int) -> Tensor:
        """Orthogonal to the rounding of the dtype."""
        x = torch.randn(n, n, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(x).Q.to(self.dtype)

    def factor(self, n: int) -> Tensor:
        """Positive definite, unit norm, eigenvalues over two orders of magnitude."""
        Q = self.orthogonal(n).double()
        eigenvalues = torch.logspace(0, -2, n, dtype=torch.float64)
        F = (Q * eigenvalues) @ Q.T
        return ((F + F.T) / (F + F.T).norm()).to(self.dtype)

    def group(self, **kwargs: Any) -> dict[str, Any]:
        options = {**BOTH, "skinny_rank": 0, **kwargs}
        return dykaf.DyKAF([torch.zeros(1)], **options).param_groups[0]

    def options(self, **kwargs: Any) -> StepOptions:
        return step_options(self.group(**kwargs), 1.0)

    def zero_state(self, m: int, n: int, **kwargs: Any) -> State:
        param = torch.zeros(m, n, dtype=self.dtype)
        return new_state(param, Layout.of(param, self.group(**kwargs)))

    def state(self, m: int, n: int, **kwargs: Any) -> State:
        """In the middle of a run: everything random, step 3."""
        state = self.zero_state(m, n, **kwargs)
        state["step"].fill_(3)
        state["exp_avg"].copy_(self.randn(m, n))
        if "next_refresh" in state:  # it has factors
            state["schedule_step"].fill_(3)
            state["rho"].fill_(0.7)
            state["next_refresh"].fill_(1000)
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].copy_(self.randn(m, n).square())
        elif "exp_avg_sq_row" in state:
            state["exp_avg_sq_row"].copy_(self.randn(m).square() + 0.1)
            state["exp_avg_sq_col"].copy_(self.randn(n).square() + 0.1)
            if "exp_avg_sq_scale" in state:
                state["exp_avg_sq_scale"].fill_(0.6)
                for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
                    state[key].div_(state[key].norm())
        for key, size in (("L", m), ("R", n)):
            if key in state:
                state[key].copy_(self.factor(size))
                state[f"Q_{key}"].copy_(self.orthogonal(size))
        return state


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def matrices(request: pytest.FixtureRequest) -> Matrices:
    if not backends.takes_float64() and request.param == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    return Matrices(request.param)


@pytest.fixture(params=["DyKAF", "FISMO"])
def each_optimizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a module's tests with either class in place of its `DyKAF`."""
    if request.param == "FISMO":
        for module in (request.module, optim_helpers):
            if hasattr(module, "DyKAF"):
                monkeypatch.setattr(module, "DyKAF", optim_helpers.LenientFISMO)
    return str(request.param)


@pytest.fixture
def through_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations take tensors on the CPU to a GPU, where they run on one, and back."""
    if backends.on_hardware():
        for name in backends.OPS:
            monkeypatch.setattr(dykaf.ops, name, backends.through_gpu(getattr(dykaf.ops, name)))
