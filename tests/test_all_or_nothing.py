"""An interruption of a step, wherever it comes, finds all as before or all as after.

tests/test_out_of_memory.py has the same of every allocation of the CUDA backend.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import backends
import pytest
import torch
from optim_helpers import params_of
from torch import nn

import dykaf
from dykaf import DyKAF

pytestmark = pytest.mark.usefixtures("each_optimizer")

# One line in this many is interrupted; 1 takes a minute.
EVERY = int(os.environ.get("INTERRUPT_EVERY", "4"))
PACKAGE = dykaf.__path__[0]
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16 in passes": {"state_dtype": "bfloat16"},
    "master": {"low_precision": "master"},
}


def make(form: str, num_steps: int) -> DyKAF:
    dtype = torch.bfloat16 if form == "master" else torch.float32
    shapes = [(6, 4), (2, 80), (5, 3), (5,)]
    params = [nn.Parameter(torch.ones(s, dtype=dtype, device=backends.device())) for s in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}]
    optimizer = DyKAF(groups, skinny_rank=4, precondition_frequency=2, **FORMS[form])
    for step in range(num_steps):
        set_gradients(optimizer, step)
        optimizer.step()
    set_gradients(optimizer, num_steps)
    return optimizer


def set_gradients(optimizer: DyKAF, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def snapshot(optimizer: DyKAF) -> list[Any]:
    params = params_of(optimizer)
    states = [
        {key: value.tolist() for key, value in optimizer.state.get(param, {}).items()}
        for param in params
    ]
    return [[param.tolist() for param in params], states]


def interrupt(step: Callable[[], object], line: int) -> bool:
    """Runs `step`, with a KeyboardInterrupt before the given line of the package; False: it has
    fewer lines."""
    left = line

    def local(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_an_interruption_at_each_line(
    form: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "passes" in form:
        monkeypatch.setattr("dykaf.narrow.MAX_PASS_BYTES", 1500)
    start = make(form, num_steps)
    before = snapshot(start)
    after = copy.deepcopy(start)
    for param, other in zip(params_of(start), params_of(after), strict=True):
        other.grad = param.grad
    after.step()
    expected = snapshot(after)
    assert before != expected
    found: dict[str, int] = {"before": 0, "after": 0}
    line = 0
    while True:
        optimizer = copy.deepcopy(start)
        for param, other in zip(params_of(start), params_of(optimizer), strict=True):
            other.grad = param.grad
        was_interrupted = interrupt(optimizer.step, line)
        state = snapshot(optimizer)
        if not was_interrupted:
            break
        assert state in (before, expected), line
        found["before" if state == before else "after"] += 1
        line += EVERY
    assert state == expected
    assert found["before"] > 100 // EVERY and found["after"] > 0


@pytest.mark.of_dykaf
def test_a_refresh_that_cannot_be_done_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that is not finite has no eigenvectors: the basis stays, and training goes on."""
    optimizer = make("default", 3)
    param = params_of(optimizer)[0]
    state = optimizer.state[param]
    side = "L" if "L" in state else "R"
    state[side].fill_(float("nan"))
    state["next_refresh"].fill_(int(state["schedule_step"]) + 1)
    basis, fallbacks = state[f"Q_{side}"].clone(), int(state["refresh_fallbacks"])
    if backends.is_gpu():  # by a flag, for which nobody waits
        optimizer.step()
    else:
        with pytest.warns(UserWarning, match=r"refresh of .*\[0\] failed: the old basis stays"):
            optimizer.step()
    assert int(state["refresh_fallbacks"]) == fallbacks + 1
    assert torch.equal(state[f"Q_{side}"], basis)
    assert all(bool(p.isfinite().all()) for p in params_of(optimizer))


@pytest.mark.parametrize("run", ["run", "run_again"])
def test_a_matrix_that_cannot_be_updated_is_named(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the operations report: the others were updated."""
    optimizer = make("default", 3)
    if run == "run" or backends.is_aten():
        optimizer._kept = None
        run = "run"
    names = [f"param_groups[0]['params'][{idx}]" for idx in range(2)]
    done = getattr(dykaf.ops.Jobs, run)

    def with_a_failure(*args: Any) -> Any:
        report = done(*args)
        return report._replace(failed=[[1], *report.failed[1:]])

    monkeypatch.setattr(dykaf.ops.Jobs, run, with_a_failure)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert names[1] in str(error.value) and names[0] not in str(error.value)
    assert "as before; all other parameters were updated" in str(error.value)
