"""Parameters that are not there yet when the optimizer is made, and such as are replaced."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from optim_helpers import bits, gradient, parameter, params_of, randn, refuses, run, trajectory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dykaf import DyKAF
from dykaf.checks import check_usable

pytestmark = pytest.mark.usefixtures("each_optimizer")

# ---- Without memory or shape ---------------------------------------------------------------------

SHAPES = [(6, 4), (5,), (4, 4), (4, 9)]
# So few slots and such sizes that every matrix counts for the places of the others.
OPTIONS: dict[str, Any] = {"precondition_frequency": 4}
NUM_STEPS = 50  # the period is whole from step 40 on


def _without_memory(kind: str) -> list[nn.Parameter]:
    if kind == "meta":
        return [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    with FakeTensorMode():
        return [nn.Parameter(torch.empty(shape)) for shape in SHAPES]


@pytest.mark.parametrize("how", ["new parameters", "swapped"])
@pytest.mark.parametrize("late", [False, True])
def test_a_model_built_on_meta(how: str, late: bool) -> None:
    """The memory comes later, as parameters in the group's list or under the same ones."""
    plain = DyKAF([parameter(*shape, seed=idx) for idx, shape in enumerate(SHAPES)], **OPTIONS)
    params = _without_memory("meta")
    optimizer = DyKAF(params[:1] if late else params, **OPTIONS)
    if late:
        optimizer.add_param_group({"params": params[1:]})
    optimizer.step()  # without gradients
    assert optimizer._stagger_offsets() == plain._stagger_offsets()
    assert not optimizer.state_dict()["state"]
    for group in optimizer.param_groups:
        for idx, param in enumerate(group["params"]):
            place = next(i for i, other in enumerate(params) if other is param)
            with_memory = parameter(*param.shape, seed=place)
            if how == "swapped":
                torch.utils.swap_tensors(param, with_memory)
            else:
                group["params"][idx] = with_memory
    for each in (optimizer, plain):
        run(each, range(NUM_STEPS))
    assert trajectory(optimizer) == trajectory(plain)


def test_fake_parameters_may_be_replaced() -> None:
    params = _without_memory("fake")
    optimizer = DyKAF(params, **OPTIONS)
    optimizer.add_param_group({"params": _without_memory("fake")})
    optimizer.step()
    del optimizer.param_groups[1]
    optimizer.param_groups[0]["params"] = [parameter(*shape) for shape in SHAPES]
    run(optimizer, range(2))
    assert all(float(optimizer.state[param]["step"]) >= 1 for param in params_of(optimizer))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", "weight: expected a dense tensor with memory, got Float [6, 4] on meta"),
        ("fake", "gradient of weight: expected plain tensors, got FakeTensor"),
    ],
)
def test_without_memory_there_is_no_step(kind: str, message: str) -> None:
    real, unreal = parameter(3, 3), _without_memory(kind)[0]
    optimizer = DyKAF([("bias", real), ("weight", unreal)])
    real.grad = torch.ones(3, 3)
    unreal.grad = torch.ones_like(unreal)
    start = bits(real)
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert str(caught.value) == message
    assert bits(real) == start
    assert not optimizer.state


def test_a_fake_parameter_is_refused_whatever_its_gradient() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected plain tensors, got FakeTensor$"):
        check_usable("weight", _without_memory("fake")[0])


def _lazy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(4), nn.LazyLinear(4))


@pytest.mark.parametrize("dry_run", ["before the optimizer", "after it", "after a step"])
def test_a_lazy_model(dry_run: str) -> None:
    """Bit for bit as if the shapes had been there: the places in the period count them as well."""
    inputs = randn(3, 5, dtype=torch.float32)

    def train(dry_run: str) -> Any:
        model = _lazy_model()
        early = parameter(4, 4, seed=1)
        if dry_run == "before the optimizer":
            model(inputs)
        optimizer = DyKAF([early, *model.parameters()], **OPTIONS)
        if dry_run == "after a step":
            optimizer.step()
            assert optimizer.diagnostics() == {"optimizer": {"skipped_steps": 0}}
            optimizer.load_state_dict(optimizer.state_dict())
        model(inputs)
        torch.manual_seed(1)
        for module in model:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        run(optimizer, range(NUM_STEPS))
        return optimizer._stagger_offsets(), trajectory(optimizer)

    offsets, expected = train("before the optimizer")
    assert train(dry_run) == (offsets, expected)
    assert offsets[0] != DyKAF([parameter(4, 4)], **OPTIONS)._stagger_offsets()[0]


def test_saved_state_needs_the_shapes() -> None:
    trained = DyKAF([parameter(6, 5)])
    run(trained, range(2))
    optimizer = DyKAF([("weight", nn.UninitializedParameter())])
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(trained.state_dict())
    assert str(caught.value) == (
        "state of weight: expected a parameter that has its shape, got UninitializedParameter"
    )


# ---- Frozen --------------------------------------------------------------------------------------

FROZEN = [
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]
DTYPES = "torch.float64, torch.float32, torch.bfloat16, torch.float16"


@pytest.mark.parametrize("dtype", FROZEN)
def test_frozen_parameters_of_any_dtype_are_carried_along(dtype: torch.dtype) -> None:
    """As torch.optim does, in the constructor, in a group that comes later, saved and loaded."""
    frozen, late = (nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False) for _ in "12")
    optimizer = DyKAF([parameter(4, 3), frozen])
    optimizer.add_param_group({"params": [late]})
    other = DyKAF([parameter(4, 3)])
    for step in range(3):
        for each in (optimizer, other):
            params_of(each)[0].grad = gradient(params_of(each)[0], step, 0)
            each.step()
    assert bits(params_of(optimizer)[0]) == bits(params_of(other)[0])
    assert bits(frozen) == bits(late) == bits(torch.ones(3, 3).to(dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("dtype", FROZEN)
def test_frozen_parameters_with_a_gradient_are_refused(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    optimizer = DyKAF([parameter(4, 3), frozen])
    params_of(optimizer)[0].grad = torch.ones(4, 3)
    optimizer.step()
    frozen.grad = torch.zeros_like(frozen)
    with refuses(optimizer, f"param_groups[0]['params'][1]: expected dtypes {DTYPES}, got {dtype}"):
        optimizer.step()


def test_frozen_sparse_parameters_are_carried_along() -> None:
    frozen = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    optimizer = DyKAF([parameter(4, 3), frozen])
    params_of(optimizer)[0].grad = torch.ones(4, 3)
    optimizer.step()
    assert float(optimizer.state[params_of(optimizer)[0]]["rho"][0]) > 0
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(ValueError, match=r"expected a dense tensor, got torch\.sparse_coo"):
        optimizer.step()


def test_a_parameter_that_is_thawed_is_checked_then() -> None:
    thawed = nn.Parameter(torch.randn(1, 3).expand(4, 3), requires_grad=False)
    optimizer = DyKAF([parameter(4, 3), thawed])
    params_of(optimizer)[0].grad = torch.ones(4, 3)
    optimizer.step()
    thawed.requires_grad_()
    thawed.grad = torch.ones(4, 3)
    message = "expected tensors whose elements do not share memory, got shape (4, 3) with strides"
    with refuses(optimizer, f"param_groups[0]['params'][1]: {message} (0, 1)"):
        optimizer.step()


# ---- Replaced ------------------------------------------------------------------------------------


def _replace(optimizer: DyKAF, idx: int, param: nn.Parameter) -> weakref.ref[Tensor]:
    """Puts ``param`` in place of the parameter at ``idx``, whose state goes."""
    params = optimizer.param_groups[0]["params"]
    optimizer.state.pop(params[idx], None)
    old, params[idx] = params[idx], param
    return weakref.ref(old)


@pytest.mark.parametrize("steps_between", [0, 2])
def test_replaced_parameters_are_not_kept_alive(steps_between: int) -> None:
    optimizer = DyKAF([parameter(6, 4), parameter(5, 5)])
    run(optimizer, range(2))
    gone = []
    for step in range(5):
        gone.append(_replace(optimizer, 0, parameter(6 + step % 2, 4, seed=step)))
        run(optimizer, range(2 + step, 2 + step + steps_between))
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5
    run(optimizer, range(20, 22))
    assert len(optimizer._layouts.by_id) == 2  # of those that are there


def test_state_that_is_moved_to_a_replacement_goes_on() -> None:
    """As gaussian splatting prunes: rows of a parameter without factors go, with their moments."""
    keep = [0, 2, 3, 5]
    points, alone = parameter(6, 4), parameter(6, 4)
    alone.data = alone.data[keep].clone()
    optimizer = DyKAF([points, parameter(5, 5)], max_precond_dim=0)
    other = DyKAF([alone], max_precond_dim=0)
    for step in range(8):
        if step == 4:
            state = optimizer.state.pop(points)
            points = nn.Parameter(points.detach()[keep].clone())
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key][keep].clone()
            optimizer.param_groups[0]["params"][0] = points
            optimizer.state[points] = state
        grad = randn(6, 4, seed=step, dtype=torch.float32)
        points.grad = grad if step < 4 else grad[keep]
        alone.grad = grad[keep]
        optimizer.step()
        other.step()
    assert bits(points) == bits(alone)


def test_resumes_bit_for_bit_after_a_replacement() -> None:
    """The new shapes spread the refreshes anew, in the run that goes on as in the resumed one."""
    optimizer = DyKAF([parameter(4, 4), parameter(6, 6), parameter(5, 3)], **OPTIONS)
    run(optimizer, range(26))
    offsets = optimizer._stagger_offsets()
    _replace(optimizer, 1, parameter(2, 3))
    run(optimizer, range(26, 29))
    assert optimizer._stagger_offsets() != offsets
    resumed = DyKAF([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    for other in (optimizer, resumed):
        run(other, range(29, NUM_STEPS))
    assert trajectory(resumed) == trajectory(optimizer)
