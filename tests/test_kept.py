"""A step that finds all as it was does what one does that reads everything anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
from optim_helpers import params_of
from torch import Tensor, nn

import dykaf
from dykaf.kept import Kept
from dykaf.work import Layouts

SHAPES = [(6, 4), (2, 80), (3, 5, 4), (5,), (4, 6), ()]
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "both sides": {"sides": "both", "orthogonalize": 0},
    "no factors": {"sides": "none"},
    "compact": {"second_moment": "factored"},
    "bfloat16": {"low_precision": "stochastic"},
    "master": {"low_precision": "master"},
}


def make(form: str = "default") -> dykaf.DyKAF:
    dtype = torch.bfloat16 if form in ("bfloat16", "master") else torch.float32
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(backends.device(), dtype))
        for shape in SHAPES
    ]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2, "weight_decay": 0.1}]
    return dykaf.DyKAF(
        groups, skinny_rank=4, precondition_frequency=3, batch_dims=None, **FORMS[form]
    )


def set_gradients(optimizer: dykaf.DyKAF, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def values(optimizer: dykaf.DyKAF) -> list[Any]:
    params = params_of(optimizer)
    states = [
        {key: value.tolist() for key, value in optimizer.state.get(param, {}).items()}
        for param in params
    ]
    return [[param.tolist() for param in params], states, optimizer.skipped_steps]


def both(form: str, change: Callable[[dykaf.DyKAF, int], object], num_steps: int = 9) -> int:
    """Steps with what is kept and without, `change` before each; how many of the former kept."""
    kept, anew = make(form), make(form)
    num_kept = 0
    for step in range(num_steps):
        for optimizer in (kept, anew):
            set_gradients(optimizer, step)
            change(optimizer, step)
        anew._kept = None
        before = kept._kept
        kept.step()
        anew.step()
        num_kept += before is not None and kept._kept is before
        assert values(kept) == values(anew)
    return num_kept


def nothing(optimizer: dykaf.DyKAF, step: int) -> None:
    pass


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_a_step_that_reads_all(form: str) -> None:
    assert both(form, nothing) == 8


def test_a_kept_step_reads_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make()
    for step in range(4):
        set_gradients(optimizer, step)
        optimizer.step()
    calls: list[object] = []
    of = Layouts.of
    monkeypatch.setattr(Layouts, "of", lambda *args: calls.append(args) or of(*args))
    set_gradients(optimizer, 4)
    optimizer.step()
    assert not calls
    optimizer._kept = None
    set_gradients(optimizer, 5)
    optimizer.step()
    assert len(calls) >= len(SHAPES)


def rates(optimizer: dykaf.DyKAF, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + step)


def options(optimizer: dykaf.DyKAF, step: int) -> None:
    first = optimizer.param_groups[0]
    first["betas"] = (0.9 - 0.01 * step, 0.95)
    first["weight_decay"] = 0.01 * step
    first["orthogonalize"] = step % 4
    first["maximize"] = step % 2 == 1


def not_finite(optimizer: dykaf.DyKAF, step: int) -> None:
    if step in (3, 4, 7):
        params_of(optimizer)[step % 4].grad.view(-1)[0] = float("nan")


@pytest.mark.parametrize("change", [rates, options, not_finite])
@pytest.mark.filterwarnings("ignore:gradient of")
def test_what_may_change_from_step_to_step(change: Callable[[dykaf.DyKAF, int], object]) -> None:
    assert both("default", change) > 3


def no_gradient(optimizer: dykaf.DyKAF) -> None:
    params_of(optimizer)[1].grad = None


def strided_gradient(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    param.grad = param.grad.t().contiguous().t()


def negative_gradient(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    param.grad = torch._neg_view(param.grad)


def moved_parameter(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    param.data = param.data.clone()


def moved_state(optimizer: dykaf.DyKAF) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def another_state_tensor(optimizer: dykaf.DyKAF) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg"] = state["exp_avg"] + 1


def another_state(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}


def no_state(optimizer: dykaf.DyKAF) -> None:
    del optimizer.state[params_of(optimizer)[0]]


def another_parameter(optimizer: dykaf.DyKAF) -> None:
    param = optimizer.param_groups[0]["params"][0]
    new = nn.Parameter(param.detach() + 1)
    new.grad = param.grad
    optimizer.param_groups[0]["params"][0] = new


def another_order(optimizer: dykaf.DyKAF) -> None:
    optimizer.param_groups[0]["params"].reverse()


def another_group(optimizer: dykaf.DyKAF) -> None:
    new = nn.Parameter(torch.ones(3, 4, device=backends.device()))
    new.grad = torch.full_like(new, 0.5)
    optimizer.add_param_group({"params": [new]})


def group_copied(optimizer: dykaf.DyKAF) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 1.0}


def group_gone(optimizer: dykaf.DyKAF) -> None:
    del optimizer.param_groups[1]


def period(optimizer: dykaf.DyKAF) -> None:
    for group in optimizer.param_groups:
        group["precondition_frequency"] = 50


def swapped(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    other = nn.Parameter(param.detach().clone())
    other.grad = param.grad
    param.grad = None
    torch.utils.swap_tensors(param, other)


CHANGES = [
    *(no_gradient, strided_gradient, negative_gradient, moved_parameter, moved_state),
    *(another_state_tensor, another_state, no_state, another_parameter, another_order),
    *(another_group, group_copied, group_gone, period, swapped),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_has_changed_is_noticed(change: Callable[[dykaf.DyKAF], object]) -> None:
    both("default", lambda optimizer, step: change(optimizer) if step == 5 else None)


def test_another_backend_is_noticed() -> None:
    optimizer, other = make(), make()
    for step in range(6):
        for each in (optimizer, other):
            set_gradients(each, step)
        optimizer.step()
        other._kept = None
        other.step()
    if backends.is_aten():
        return
    set_gradients(optimizer, 6)
    before = optimizer._kept
    with dykaf.ops.aten_alone():
        optimizer.step()
        assert optimizer._kept is not before


@pytest.mark.parametrize("what", ["betas", "max_precond_dim", "nonfinite"])
def test_bad_options_are_refused_as_ever(what: str) -> None:
    optimizer = make()
    for step in range(4):
        set_gradients(optimizer, step)
        optimizer.step()
    set_gradients(optimizer, 4)
    optimizer.param_groups[1][what] = -1
    before = values(optimizer)
    with pytest.raises(ValueError, match=what):
        optimizer.step()
    assert values(optimizer) == before


def test_bad_gradients_are_refused_as_ever() -> None:
    optimizer = make()
    for step in range(4):
        set_gradients(optimizer, step)
        optimizer.step()
    set_gradients(optimizer, 4)
    param = params_of(optimizer)[0]
    param.grad = None
    param.grad = torch.zeros(param.shape, device=param.device).to_sparse()
    before = values(optimizer)
    with pytest.raises(ValueError, match="expected a dense tensor"):
        optimizer.step()
    assert values(optimizer) == before


def reshaped_parameter(optimizer: dykaf.DyKAF) -> None:
    param = params_of(optimizer)[0]
    grad, param.grad = param.grad, None
    param.data = param.data.view(4, 6)
    param.grad = grad.view(4, 6)


def reshaped_state(optimizer: dykaf.DyKAF) -> None:
    exp_avg = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    exp_avg.data = exp_avg.data.view(4, 6)


def state_of_another_dtype(optimizer: dykaf.DyKAF) -> None:
    """In the same memory."""
    exp_avg = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    exp_avg.data = exp_avg.data.view(torch.int32)


@pytest.mark.parametrize("change", [reshaped_parameter, reshaped_state, state_of_another_dtype])
def test_memory_of_another_form_is_refused(change: Callable[[dykaf.DyKAF], object]) -> None:
    """At the addresses where all else was; as by a step that reads all."""
    messages = []
    for is_kept in (True, False):
        optimizer = make()
        for step in range(5):
            set_gradients(optimizer, step)
            if step < 4:
                optimizer.step()
        change(optimizer)
        if not is_kept:
            optimizer._kept = None
        with pytest.raises(ValueError) as error:
            optimizer.step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_maxima_of_inference_mode_are_plain_tensors() -> None:
    optimizer = make()
    for step in range(4):
        set_gradients(optimizer, step)
        optimizer.step()
    set_gradients(optimizer, 4)
    with torch.inference_mode():
        _, maxima = optimizer._take_kept(captured=False)
    assert not any(value.is_inference() for value in maxima)
    assert maxima


def test_nothing_is_kept_alive() -> None:
    """Gradients, replaced parameters and state are freed at once, as with torch.optim."""
    optimizer = make()
    for step in range(4):
        set_gradients(optimizer, step)
        optimizer.step()
    set_gradients(optimizer, 4)
    optimizer.step()
    assert isinstance(optimizer._kept, Kept)
    param = params_of(optimizer)[0]
    state = optimizer.state[param]
    gone: list[Tensor] = [param.grad, state["exp_avg"], param]
    storages = [tensor.untyped_storage()._weak_ref() for tensor in gone]
    refs = [weakref.ref(tensor) for tensor in gone]
    optimizer.zero_grad()
    del optimizer.state[param], state
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(6, 4))
    del param, gone
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)


@pytest.mark.filterwarnings("ignore:gradient of")
def test_a_skipped_step_keeps_no_gradient_alive() -> None:
    optimizer = make()
    for step in range(5):
        set_gradients(optimizer, step)
        not_finite(optimizer, {4: 3}.get(step, 0))
        optimizer.step()
    grad = weakref.ref(params_of(optimizer)[3].grad)
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None
