"""What users of torch.optim expect of an optimizer: schedulers, options changed in flight, groups
added late, closures, hooks, missing gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest
import torch
from optim_helpers import (
    bits,
    frozen,
    gradient,
    parameter,
    params_of,
    randn,
    run,
    trajectory,
    two_sided,
)
from reference import two_sided_reference
from torch import Tensor, nn

from dykaf import DyKAF
from dykaf.work import check_capture

pytestmark = pytest.mark.usefixtures("each_optimizer")

# Forty steps amplify a rounding difference by the conditioning of the bases (test_reference.py).
TRAJECTORY = 1e-8


# ---- Schedulers and options in flight ------------------------------------------------------------


def test_lr_scheduler_sets_the_lr_of_the_next_step() -> None:
    scheduled, manual = parameter(6, 4), parameter(6, 4)
    with_scheduler = DyKAF([scheduled], lr=0.1)
    by_hand = DyKAF([manual], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(with_scheduler, gamma=0.5)
    for step in range(8):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**step
        run(with_scheduler, range(step, step + 1))
        run(by_hand, range(step, step + 1))
        scheduler.step()
        assert trajectory(with_scheduler) == trajectory(by_hand)


def test_lr_scheduler_changes_a_tensor_lr_in_place() -> None:
    tensor_param, float_param = parameter(6, 4), parameter(6, 4)
    lr = torch.tensor(0.1, dtype=torch.float64)
    with_tensor = DyKAF([tensor_param], lr=lr)
    with_float = DyKAF([float_param], lr=0.1)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for optimizer in (with_tensor, with_float)
    ]
    for step in range(8):
        run(with_tensor, range(step, step + 1))
        run(with_float, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
        assert trajectory(with_tensor) == trajectory(with_float)
    assert float(lr) == pytest.approx(0.1 / 9, rel=1e-12)


def test_a_scheduler_may_round_an_lr_below_zero() -> None:
    """torch's recursive formula of LinearLR ends within its rounding of 0, on either side."""
    optimizer = DyKAF([parameter(6, 4), parameter(3)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=10)
    for step in range(10):
        run(optimizer, range(step, step + 1))
        scheduler.step()
    assert -1e-16 < optimizer.param_groups[0]["lr"] < 0
    copied = DyKAF([parameter(6, 4), parameter(3)])
    copied.load_state_dict(optimizer.state_dict())
    before = [param.detach().clone() for param in params_of(optimizer)]
    run(optimizer, range(10, 11))
    for param, old in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(param, old)


def test_one_cycle_scheduler_cycles_the_betas() -> None:
    param = parameter(6, 4)
    optimizer = DyKAF([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9
    )
    beta1s = []
    for step in range(9):
        run(optimizer, range(step, step + 1))
        beta1s.append(optimizer.param_groups[0]["betas"][0])
        scheduler.step()
    assert beta1s[0] == 0.9 and min(beta1s) == pytest.approx(0.5)
    assert optimizer.param_groups[0]["betas"][1] == 0.95
    assert bool(param.isfinite().all())


@pytest.mark.of_dykaf
@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        ("lr", 0.03, {"lr": 0.03}),
        ("betas", (0.5, 0.8), {"betas": (0.5, 0.8), "factor_beta": 0.8}),
        ("eps", 0.5, {"eps": 0.5}),
        ("weight_decay", 2.0, {"weight_decay": 2.0}),
        ("factor_beta", 0.5, {"factor_beta": 0.5}),
        ("precondition_frequency", 3, {"precondition_frequency": 3}),
        ("integrator", "bug", {"integrator": "bug"}),
        ("refresh_schedule", "geometric", {"refresh_schedule": "geometric"}),
        ("integrator", "ksl", {"integrator": "ksl"}),
        ("rescale_exp_avg_sq", False, {"rescale_exp_avg_sq": False}),
        ("maximize", True, {"maximize": True}),
    ],
)
def test_options_changed_in_flight(option: str, value: Any, changes: dict[str, Any]) -> None:
    """As the reference with the same change at the same step, and not as without it."""
    options: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 7, "refresh_schedule": "fixed"}
    options["factor_beta"] = None
    param = parameter(6, 4, dtype=torch.float64)
    optimizer = two_sided([param], **options)
    offsets = optimizer._stagger_offsets()[0]
    changed, unchanged = (
        two_sided_reference(param.detach(), stagger_offsets=offsets, **options) for _ in range(2)
    )
    start = param.detach().clone()
    for step in range(40):
        if step == 20:
            optimizer.param_groups[0][option] = value
            for name, new in changes.items():
                assert getattr(changed, name) != new
                setattr(changed, name, new)
        run(optimizer, range(step, step + 1))
        for reference in (changed, unchanged):
            reference.step(gradient(param, step, 0))
    distance = float((changed.W - start).norm())
    assert float((param.detach() - changed.W).norm()) < TRAJECTORY * distance
    assert float((param.detach() - unchanged.W).norm()) > 1e3 * TRAJECTORY * distance


@pytest.mark.of_dykaf
def test_options_of_groups_are_their_own() -> None:
    shapes = [(6, 4), (4, 6)]
    variants: list[dict[str, Any]] = [
        {"lr": 0.1, "integrator": "bug", "second_moment": "factored", "precondition_frequency": 2},
        {"lr": 0.01, "integrator": "diagonal", "maximize": True},
    ]
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 5}
    together = DyKAF(
        [
            {"params": [parameter(*shape)], **options}
            for shape, options in zip(shapes, variants, strict=True)
        ],
        **schedule,
    )
    run(together, range(15))
    for idx, (shape, options) in enumerate(zip(shapes, variants, strict=True)):
        alone = DyKAF([parameter(*shape)], **{**schedule, **options})
        for step in range(15):
            param = params_of(alone)[0]
            param.grad = gradient(param, step, idx)
            alone.step()
        assert bits(params_of(together)[idx]) == bits(params_of(alone)[0])


def test_group_added_in_mid_run() -> None:
    """The old parameter goes on as if nothing had happened, the new one as in an own optimizer."""
    old, old_alone = parameter(6, 4), parameter(6, 4)
    new, new_alone = parameter(4, 5, seed=1), parameter(4, 5, seed=1)
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    optimizer = two_sided([old], **schedule)
    alone = two_sided([old_alone], **schedule)
    late = two_sided([new_alone], lr=0.2, **schedule)
    run(optimizer, range(6))
    optimizer.add_param_group({"params": [new], "lr": 0.2})
    assert optimizer.param_groups[1]["betas"] == (0.95, 0.95)
    run(optimizer, range(6, 20))
    run(alone, range(20))
    for step in range(6, 20):
        new_alone.grad = gradient(new_alone, step, 1)
        late.step()
    assert bits(old) == bits(old_alone)
    assert bits(new) == bits(new_alone)


# ---- Gradients and closures ----------------------------------------------------------------------


def test_parameter_appended_to_a_group_in_mid_run() -> None:
    """Its factors, in the original coordinates, are those of the same matrix alone."""
    optimizer = two_sided([{"params": [parameter(6, 4)]}, {"params": [parameter(5, 3)]}])
    alone = two_sided([parameter(4, 7, dtype=torch.float64)])
    run(optimizer, range(3))
    late = parameter(4, 7, dtype=torch.float64)
    optimizer.param_groups[0]["params"].append(late)
    for step in range(3, 8):
        run(optimizer, range(step, step + 1))
        params_of(alone)[0].grad = late.grad
        alone.step()
    found, expected = optimizer.state[late], alone.state[params_of(alone)[0]]
    for side in "LR":
        factor, reference = (s[f"Q_{side}"] @ s[side] @ s[f"Q_{side}"].T for s in (found, expected))
        torch.testing.assert_close(factor, reference, rtol=0, atol=1e-13)  # of unit norm
    other = optimizer.state[optimizer.param_groups[1]["params"][0]]
    assert (float(found["step"]), float(other["step"])) == (4, 7)


def test_clipped_gradients_are_what_is_used() -> None:
    clipped, plain = parameter(6, 4), parameter(6, 4)
    optimizer, other = DyKAF([clipped]), DyKAF([plain])

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_([clipped], max_norm=0.1)
        plain.grad = clipped.grad.clone()

    for step in range(6):
        run(optimizer, range(step, step + 1), before_step=clip)
        other.step()
        assert float(clipped.grad.norm()) == pytest.approx(0.1, rel=1e-4)
    assert trajectory(optimizer) == trajectory(other)


def test_closure_gives_the_gradient_and_its_loss_is_returned() -> None:
    with_closure, without = parameter(3, 3), parameter(3, 3)
    optimizer, other = DyKAF([with_closure], lr=0.1), DyKAF([without], lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = with_closure.square().sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for step in range(1, 6):
        other.zero_grad()
        expected = without.square().sum()
        expected.backward()
        other.step()
        assert float(optimizer.step(closure).detach()) == float(expected.detach())
        assert len(calls) == step
    assert trajectory(optimizer) == trajectory(other)
    assert calls[-1] < calls[0]
    assert optimizer.step() is None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no overloads")
def test_the_types_of_a_closure() -> None:
    """A closure may return a number or a tensor; a type checker knows what a step then returns."""
    hints = [get_type_hints(each) for each in typing.get_overloads(DyKAF.step)]
    assert [(hint["closure"], hint["return"]) for hint in hints] == [
        (type(None), type(None)),
        (Callable[[], float], float),
        (Callable[[], Tensor], Tensor),
    ]


def test_skipped_step_returns_the_loss_too() -> None:
    param = parameter(3, 3)
    optimizer = DyKAF([param])

    def closure() -> float:
        param.grad = torch.full_like(param, float("nan"))
        return 7.5

    assert optimizer.step(closure) == 7.5
    assert optimizer.skipped_steps == 1


def test_an_exception_in_the_closure_changes_nothing() -> None:
    param = parameter(3, 3)
    optimizer = DyKAF([param])
    run(optimizer, range(3))
    before = frozen(optimizer)

    def closure() -> float:
        raise KeyError("loss")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert frozen(optimizer) == before


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
def test_without_a_gradient_a_parameter_is_not_stepped(shape: tuple[int, ...]) -> None:
    sometimes, always, alone = parameter(*shape), parameter(4, 4, seed=1), parameter(*shape)
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    optimizer = DyKAF([sometimes, always], **schedule)
    other = DyKAF([alone], **schedule)

    def drop(step: int) -> None:
        if step in (0, 4, 5, 11):
            sometimes.grad = None

    for step in range(20):
        before = bits(sometimes)
        run(optimizer, range(step, step + 1), before_step=drop)
        if sometimes.grad is None:
            assert bits(sometimes) == before
        else:
            alone.grad = gradient(alone, step, 0)
            other.step()
    assert bits(sometimes) == bits(alone)
    assert {k: bits(v) for k, v in optimizer.state[sometimes].items()} == {
        k: bits(v) for k, v in other.state[alone].items()
    }


def test_no_gradients_at_all() -> None:
    optimizer = DyKAF([parameter(3, 3)])
    before = frozen(optimizer)
    optimizer.step()
    assert frozen(optimizer) == before


def test_a_tied_weight_has_one_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    optimizer = DyKAF(model.parameters(), lr=0.05)
    weight = nn.Parameter(model[0].weight.detach().clone())
    other = DyKAF([weight], lr=0.05)
    x = randn(3, 5, dtype=torch.float32)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        weight.grad = model[0].weight.grad.clone()
        optimizer.step()
        other.step()
    assert len(optimizer.state) == 1
    assert trajectory(optimizer) == trajectory(other)


# ---- Around the step -----------------------------------------------------------------------------


def test_step_hooks_run() -> None:
    param = parameter(3, 3)
    optimizer = DyKAF([param])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, range(2))
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_autograd_notices_that_parameters_changed(shape: tuple[int, ...]) -> None:
    """The version of the parameter must move: else a graph made before the step would give wrong
    gradients in silence."""
    param = parameter(*shape)
    optimizer = DyKAF([param])
    run(optimizer, range(1))
    loss = param.square().sum()
    run(optimizer, range(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_gradients_are_never_written(shape: tuple[int, ...]) -> None:
    param = parameter(*shape)
    optimizer = DyKAF([param], maximize=True, weight_decay=0.5)
    for step in range(5):
        param.grad = gradient(param, step, 0)
        before, version = bits(param.grad), param.grad._version
        optimizer.step()
        assert bits(param.grad) == before
        assert param.grad._version == version


def _replace(param: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(change(param.detach()).clone()))


def test_swapped_tensors_keep_their_state() -> None:
    swapped, plain = parameter(6, 4), parameter(6, 4)
    optimizer, other = DyKAF([swapped]), DyKAF([plain])
    run(optimizer, range(6))
    _replace(swapped, lambda value: value)
    run(optimizer, range(6, 15))
    run(other, range(15))
    assert trajectory(optimizer) == trajectory(other)


def test_a_parameter_may_change_its_low_precision_dtype() -> None:
    """The state is float32 for both; the run goes on as one that loaded it."""
    param = parameter(6, 4)
    optimizer = DyKAF([param])
    run(optimizer, range(6))
    _replace(param, lambda value: value.bfloat16())
    other = DyKAF([nn.Parameter(param.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, range(6, 15))
    run(other, range(6, 15))
    assert param.dtype == torch.bfloat16
    assert trajectory(optimizer) == trajectory(other)


@pytest.fixture
def on_meta() -> Iterator[None]:
    """What is made without a device has no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_the_default_device_does_not_matter(request: pytest.FixtureRequest) -> None:
    optimizer, plain = (DyKAF([parameter(6, 4), parameter(5)]) for _ in range(2))
    run(plain, range(9))
    grads = [[gradient(p, step, i) for i, p in enumerate(params_of(plain))] for step in range(9)]
    request.getfixturevalue("on_meta")
    for step_grads in grads:
        for param, grad in zip(params_of(optimizer), step_grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert trajectory(optimizer) == trajectory(plain)


def test_the_check_of_a_capture_reads_no_default_device(request: pytest.FixtureRequest) -> None:
    """On a CPU there is only the check: a vector has no schedule, a matrix may have none yet."""
    optimizer = DyKAF([parameter(5), parameter(6, 4)])
    run(optimizer, range(2))
    work = [item._replace(on_gpu=True) for item in optimizer._collect()]
    request.getfixturevalue("on_meta")
    check_capture(work, optimizer.state, True, False)
    optimizer.state[params_of(optimizer)[1]]["next_refresh"].zero_()
    with pytest.raises(RuntimeError, match=r"none with a gradient of .*\[1\]$"):
        check_capture(work, optimizer.state, True, False)


def test_named_parameters_give_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = DyKAF(model.named_parameters())
    run(optimizer, range(2))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(optimizer.diagnostics()) == ["optimizer", *names]
    model[1].weight.grad = torch.full_like(model[1].weight, float("inf"))
    optimizer.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(RuntimeError, match=r"^gradient of 1\.weight: "):
        optimizer.step()


MANY_THREADS = """
import torch
from dykaf import DyKAF
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.randn(1024, 256)) for _ in range(4)]
optimizer = DyKAF(params, precondition_frequency=1)
for _ in range(3):
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
assert all(param.isfinite().all() for param in params)
"""


def test_steps_end_after_set_num_threads() -> None:
    """MKL then wants as many threads within each of torch's, where it gets one, and can wait for
    the others for ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], timeout=120, env=environment)
    assert done.returncode == 0
