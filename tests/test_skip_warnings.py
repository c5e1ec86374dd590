"""A run that skips its steps says so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import backends
import pytest
import torch
from torch import Tensor, nn

from dykaf import DyKAF

pytestmark = pytest.mark.usefixtures("each_optimizer")


def make(**options: object) -> DyKAF:
    params = {"first": (4, 3), "second": (5,)}
    named = [
        (name, nn.Parameter(torch.ones(shape, device=backends.device())))
        for name, shape in params.items()
    ]
    return DyKAF(named, **options)


def messages(optimizer: DyKAF, gradients: Iterable[float]) -> list[tuple[int, str, str]]:
    """Number of the step, text and file of each warning; only "second" is not 1."""
    found = []
    first, second = (param for group in optimizer.param_groups for param in group["params"])
    for step, value in enumerate(gradients, 1):
        first.grad, second.grad = torch.ones_like(first), torch.full_like(second, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found += [(step, str(warning.message), warning.filename) for warning in caught]
    return found


def steps_of(found: list[tuple[int, str, str]]) -> list[int]:
    """On a GPU the host hears of a step in the next one."""
    return [step - backends.is_gpu() for step, _, _ in found]


def test_the_first_and_each_tenfold_run_of_skipped_steps_is_said() -> None:
    optimizer = make()
    found = messages(optimizer, [math.nan] * 121)
    assert steps_of(found) == [1, 10, 100]
    assert optimizer.skipped_steps == 121
    for (_, text, filename), in_row in zip(found, (1, 10, 100), strict=True):
        assert "gradient of second" in text and f"{in_row - 1} before it" in text
        assert filename == __file__


def test_single_skips_are_said_once() -> None:
    found = messages(make(), [1, math.inf, 1, math.nan, 1, 1, math.inf, 1, 1])
    assert steps_of(found) == [2]


def test_a_run_counts_from_its_own_first_step() -> None:
    found = messages(make(), [math.nan, 1, *[math.nan] * 10, 1])
    assert steps_of(found) == [1, 12]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_nothing_is_said_of_finite_gradients(nonfinite: str) -> None:
    assert messages(make(nonfinite=nonfinite), [1.0] * 12) == []


def test_the_scaler_s_verdict_is_not_said() -> None:
    """It skips steps as a matter of course while it looks for its scale."""
    optimizer = make()
    optimizer.found_inf = torch.ones((), device=backends.device())
    assert messages(optimizer, [1.0] * 12) == []
    assert optimizer.skipped_steps == 12


def refuse(*_: object) -> Tensor:
    raise AssertionError("a tensor was read")


def test_no_step_waits_for_a_matrix_of_zero_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU; it starts one step after the first gradient that is not zero."""
    if not backends.is_gpu():
        pytest.skip("the CPU has every gradient at hand")
    optimizer = make()
    first, second = (param for group in optimizer.param_groups for param in group["params"])

    def step(value: float, guard: Callable[[], None] = lambda: None) -> None:
        first.grad, second.grad = torch.full_like(first, value), torch.ones_like(second)
        guard()
        optimizer.step()
        monkeypatch.undo()

    def forbid_reads() -> None:
        optimizer._skips.hear()
        for name in ("item", "tolist", "cpu", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)

    step(0)
    state = optimizer.state[first]
    factor = state["L"] if "L" in state else state["R"]
    assert state["next_refresh"].tolist() == [-2, -2]
    step(0, forbid_reads)
    step(0.5, forbid_reads)
    assert state["next_refresh"].tolist() == [-2, -2] and not factor.any()
    saved = optimizer.state_dict()["state"][0]["next_refresh"]  # which a resumed run goes by
    assert saved.tolist() == [-1, -1]
    step(0.5)
    assert state["next_refresh"].tolist() == [1, 1]
    assert float(factor.norm()) == pytest.approx(1, rel=1e-5)
    step(0.5, forbid_reads)
    assert float(state["step"]) == 1
