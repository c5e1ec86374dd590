"""Steps in a CUDA graph: `--backend cuda`, or `aten` and `simt`, where one is only announced."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
from optim_helpers import bits, gradient, params_of, run
from test_gpu import everything, on_hardware, parameters
from torch import Tensor

from dykaf import DyKAF
from dykaf.work import check_capture

pytestmark = pytest.mark.skipif(
    "not __import__('backends').is_gpu()", reason="not with --backend cpu"
)


def capturable(**options: Any) -> DyKAF:
    """With a group of its own for each kind of matrix, after the steps that a capture needs."""
    params = parameters()[:-1]
    groups = [{"params": params[:2]}, {"params": params[2:], "max_precond_dim": 5}]
    optimizer = DyKAF(groups, **{"precondition_frequency": 3, **options})
    run(optimizer, range(2))
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sides": "both", "integrator": "ksl", "refresh_schedule": "fixed"},
        {"second_moment": "rank_one"},
        {"sides": "both", "second_moment": "factored", "integrator": "bug"},
        {"sides": "both", "orthogonalize": 0, "nesterov": False},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_steps_without_refreshes_and_refreshes_are_steps(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture records, run at once; on_hardware tests replay it."""
    whole, parts = capturable(**options), capturable(**options)
    run(whole, range(2, 14))
    for step in range(2, 14):
        refreshes = [parts.state[p]["refreshes"].clone() for p in params_of(parts)[:2]]
        with monkeypatch.context() as context:
            context.setattr("dykaf.engine.is_capturing", lambda: True)
            run(parts, range(step, step + 1))
        for param, before in zip(params_of(parts), refreshes, strict=False):
            assert torch.equal(parts.state[param]["refreshes"], before)
        parts.refresh()
    assert everything(parts) == everything(whole)
    for mine, theirs in zip(params_of(parts)[:2], params_of(whole)[:2], strict=True):
        for key in ("next_refresh", "refreshes", "schedule_step"):
            assert torch.equal(parts.state[mine][key], whole.state[theirs][key]), key
    assert float(whole.state[params_of(whole)[0]]["refreshes"].sum()) > 6


def test_refresh_passes_over_matrices_without_a_gradient() -> None:
    params = parameters()
    optimizer = DyKAF(params)
    params[0].grad = gradient(params[0], 0, 0)
    params[1].grad = torch.zeros_like(params[1])
    optimizer.step()
    optimizer.refresh()
    assert optimizer.state[params[0]]["schedule_step"] == 1
    assert optimizer.state[params[1]]["schedule_step"] == 0
    assert not optimizer.state[params[2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "raise"}, 'expected nonfinite="skip" or "propagate", got "raise", for whi'),
    ],
)
def test_options_that_a_graph_cannot_hold(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = capturable(**options)
    monkeypatch.setattr("dykaf.engine.is_capturing", lambda: True)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=f"step in a CUDA graph: {message}"):
        optimizer.step()
    assert everything(optimizer) == before


def test_a_graph_holds_no_work_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched there would run at once, and not when the graph is replayed."""
    params = parameters()[:1]
    optimizer = DyKAF(params)
    run(optimizer, range(1))
    (item,) = optimizer._collect()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    check_capture([item._replace(device=torch.device("cuda", 0))], optimizer.state, True, False)
    with pytest.raises(RuntimeError, match=r"parameters on the captured GPU, got .* on cuda:1"):
        check_capture([item._replace(device=torch.device("cuda", 1))], optimizer.state, True, False)


def test_a_graph_holds_no_first_gradient_and_no_skinny_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters()
    optimizer = DyKAF(params, nonfinite="propagate")

    def refused(param: Tensor, grad: Tensor, message: str) -> None:
        param.grad = grad
        with monkeypatch.context() as context, pytest.raises(RuntimeError) as caught:
            context.setattr("dykaf.engine.is_capturing", lambda: True)
            optimizer.step()
        param.grad = None
        assert str(caught.value) == f"step in a CUDA graph: expected {message}"

    name = "param_groups[0]['params']"
    no_step = "a step before the capture, got none"
    first = gradient(params[0], 0, 0)
    refused(params[0], first, f"{no_step} with a gradient of {name}[0]")
    refused(params[2], gradient(params[2], 0, 2), f"{no_step} with a gradient of {name}[2]")
    assert not optimizer.state[params[0]] and not optimizer.state[params[2]]
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    refused(params[0], first, f"{no_step} with a gradient of {name}[0]")
    run(optimizer, range(1))
    for param in params:
        param.grad = None
    skinny = gradient(params[-1], 0, 0)
    refused(params[-1], skinny, f"skinny_rank=0, got 32, which applies to {name}[5]")
    optimizer.param_groups[0]["nonfinite"] = "skip"  # whose count a replay must not start anew
    refused(params[0], first, no_step)


@on_hardware
def test_a_replayed_graph_steps_as_steps_do() -> None:
    whole, replayed = capturable(), capturable()
    lr = torch.tensor(0.25, device=backends.device())
    for group in [*whole.param_groups, *replayed.param_groups]:
        group["lr"] = lr
    graph = torch.cuda.CUDAGraph()
    before = everything(replayed)
    with torch.cuda.graph(graph):
        replayed.step()
    assert everything(replayed) == before
    for step in range(2, 14):
        lr.fill_(0.25 / step)
        for idx, param in enumerate(params_of(replayed)):
            param.grad.copy_(gradient(param, step, idx))
        graph.replay()
        replayed.refresh()
        run(whole, range(step, step + 1))
    assert everything(replayed) == everything(whole)
    params_of(replayed)[2].grad.fill_(float("nan"))
    graph.replay()
    assert replayed.skipped_steps == 1
    assert [bits(param) for param in params_of(replayed)] == [bits(p) for p in params_of(whole)]
