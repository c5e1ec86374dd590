"""GradScaler and the float32 matmul precision."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

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
from torch import Tensor, nn

from dykaf import DyKAF, ops
from dykaf.options import step_options
from dykaf.state import Layout, new_state

pytestmark = pytest.mark.usefixtures("each_optimizer")

# ---- GradScaler ----------------------------------------------------------------------------------


def make_scaler(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(1))  # makes the scale
    return scaler


def scaled_run(optimizer: DyKAF, scaler: torch.amp.GradScaler, steps: int, unscale: bool) -> None:
    for step in range(steps):
        for idx, param in enumerate(params_of(optimizer)):
            param.grad = (gradient(param, step, idx).double() * scaler.get_scale()).to(param.dtype)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert getattr(optimizer, "grad_scale", None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_power_of_two_scales_cancel_exactly(
    dtype: torch.dtype, unscale: bool, maximize: bool, amp_scaling: bool
) -> None:
    shapes = [(6, 4), (4, 9), (5,)]
    scaled, plain = (
        DyKAF(
            [parameter(*shape, seed=idx, dtype=dtype) for idx, shape in enumerate(shapes)],
            max_precond_dim=7,
            precondition_frequency=3,
            maximize=maximize,
        )
        for _ in range(2)
    )
    scaled.amp_scaling = amp_scaling
    scaled_run(scaled, make_scaler(2.0**12), 10, unscale)
    run(plain, range(10))
    assert trajectory(scaled) == trajectory(plain)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_other_scales_cancel_to_rounding(unscale: bool, amp_scaling: bool) -> None:
    """float64; see TRAJECTORY in test_torch_behaviour.py for the bound."""
    scaled, plain = (DyKAF([parameter(6, 4, dtype=torch.float64)]) for _ in range(2))
    scaled.amp_scaling = amp_scaling
    start = params_of(plain)[0].detach().clone()
    scaled_run(scaled, make_scaler(3000.0), 20, unscale)
    run(plain, range(20))
    distance = float((params_of(plain)[0].detach() - start).norm())
    difference = float((params_of(plain)[0] - params_of(scaled)[0]).detach().norm())
    assert difference < 1e-8 * distance


def test_scaled_gradients_may_fill_the_whole_range() -> None:
    """float16 gradients near the largest number: unscaling first in float16 would lose them."""
    low, plain = parameter(6, 4, dtype=torch.float16), parameter(6, 4, dtype=torch.float16)
    scaler = make_scaler(2.0**30)
    optimizer, other = (two_sided([param], low_precision="master") for param in (low, plain))
    optimizer.amp_scaling = True
    for step in range(5):
        large = gradient(low, step, 0).double() * 2.0**13
        low.grad = large.half()  # 2^30 times gradients far below float16's smallest number
        scaler.step(optimizer)
        scaler.update()
        plain.grad = low.grad.clone()
        other.step()
    # Adam is free of scale up to eps; the scale shows in rho alone.
    rho, other_rho = optimizer.state[low]["rho"], other.state[plain]["rho"]
    assert bits(rho * 2.0**30) == bits(other_rho)
    assert bits(optimizer.state[low]["L"]) == bits(other.state[plain]["L"])


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_overflow_skips_the_step(
    nonfinite: str, unscale: bool, value: float, amp_scaling: bool
) -> None:
    """The scaler looks for overflow by trial: this is no error, whatever ``nonfinite`` says. What
    the scaler does not call is not counted."""
    optimizer = DyKAF([parameter(6, 4), parameter(5)], nonfinite=nonfinite)
    optimizer.amp_scaling = amp_scaling
    scaler = make_scaler(2.0**10)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaled_run(optimizer, scaler, 3, unscale)
    before = trajectory(optimizer)
    params_of(optimizer)[1].grad[-1] = value
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert trajectory(optimizer)[:2] == before[:2]
    assert optimizer.skipped_steps == amp_scaling
    scaled_run(optimizer, scaler, 1, unscale)
    assert optimizer.skipped_steps == amp_scaling
    assert len(calls) == 4 + amp_scaling
    assert trajectory(optimizer)[0] != before[0]


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_a_scaler_in_training_equals_training_without(amp_scaling: bool) -> None:
    def train(scaler: torch.amp.GradScaler) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = DyKAF(model.named_parameters(), lr=0.01)
        optimizer.amp_scaling = amp_scaling
        x, y = randn(8, 4, dtype=torch.float32), randn(8, 2, seed=1, dtype=torch.float32)
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        return trajectory(optimizer)

    assert train(make_scaler(2.0**8)) == train(torch.amp.GradScaler("cpu", enabled=False))


def test_by_default_a_scaler_treats_it_as_adamw() -> None:
    """Lightning clips no gradients of an optimizer with ``_step_supports_amp_scaling``; and float16
    gradients are not unscaled in place."""
    param = parameter(6, 4, dtype=torch.float16)
    for optimizer in (torch.optim.AdamW([param]), DyKAF([param])):
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            make_scaler(2.0).step(optimizer)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_amp_scaling_is_copied_and_not_loaded(clone: Callable[[DyKAF], DyKAF]) -> None:
    """It is a choice of how to train, like the scaler itself."""
    default, chosen = DyKAF([parameter(3)]), DyKAF([parameter(3)])
    chosen.amp_scaling = True
    assert clone(chosen).amp_scaling and clone(chosen)._step_supports_amp_scaling
    assert not clone(default).amp_scaling
    default.load_state_dict(chosen.state_dict())
    assert not default.amp_scaling
    chosen.load_state_dict(default.state_dict())
    assert chosen.amp_scaling


def test_a_scaler_with_no_gradients() -> None:
    optimizer = DyKAF([parameter(3, 3)])
    run(optimizer, range(2))
    optimizer.zero_grad()
    before = frozen(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert frozen(optimizer) == before


# ---- Matmul precision ----------------------------------------------------------------------------

SETTINGS = ["highest", "high", "medium"]


needs_backend_settings = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one setting for all"
)


def torch_settings() -> tuple[str | bool, ...]:
    one = (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
    if not hasattr(torch.backends, "fp32_precision"):
        return one
    return (
        *one,
        torch.backends.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


def cpu_multiplies_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11 on
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.cpu._is_avx512_bf16_supported()


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts torch's setting back, whatever the test did."""
    yield
    torch.set_float32_matmul_precision("highest")


@needs_backend_settings
@pytest.mark.parametrize("inherited", ["ieee", "tf32", "none"])
def test_a_setting_that_follows_one_for_all_goes_on_to_follow_it(inherited: str) -> None:
    """In an interpreter of its own, whose settings nobody has touched."""
    code = f"""
import torch
from dykaf import DyKAF

torch.backends.fp32_precision = "{inherited}"
param = torch.nn.Parameter(torch.ones(3, 2))
optimizer = DyKAF([param], precondition_frequency=1, matmul_precision="medium")
for step in range(3):
    param.grad = torch.randn(3, 2)
    optimizer.step()
torch.backends.fp32_precision = "bf16"
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
torch.backends.fp32_precision = "ieee"
assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", [None, *SETTINGS])
def test_the_setting_of_torch_is_left_as_it_was(setting: str, precision: str | None) -> None:
    torch.set_float32_matmul_precision(setting)
    before = torch_settings()
    assert before[0] == setting
    optimizer = DyKAF([parameter(6, 4)], matmul_precision=precision, precondition_frequency=1)
    run(optimizer, range(4))
    assert torch_settings() == before
    optimizer.param_groups[0]["nonfinite"] = "raise"
    params_of(optimizer)[0].grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch_settings() == before


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_setting_of_torch_survives_an_error_in_an_operation(setting: str) -> None:
    """The list is refused when the operation runs already."""
    torch.set_float32_matmul_precision(setting)
    before = torch_settings()
    param = parameter(4, 3)
    group = DyKAF([param], matmul_precision="medium").param_groups[0]
    state = new_state(param, Layout.of(param, group))
    with pytest.raises(ValueError):
        ops.rotate(
            [torch.ones(4, 3, dtype=torch.bfloat16)], [state], True, step_options(group, 1.0)
        )
    assert torch_settings() == before


@needs_backend_settings
def test_the_backend_settings_of_torch_are_respected() -> None:
    """torch's newer per-backend setting, which torch refuses to read through the older one."""
    optimizer, other = (two_sided([parameter(6, 4)], precondition_frequency=1) for _ in range(2))
    run(other, range(4))
    saved = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        run(optimizer, range(4))
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = saved
    assert bool(params_of(optimizer)[0].isfinite().all())
    assert optimizer.state[params_of(optimizer)[0]]["refreshes"].tolist() == [3, 3]


def _from_basis(state: dict[str, Tensor], key: str) -> Tensor:
    left = state["Q_L"].double() if key in ("exp_avg", "L") else state["Q_R"].double()
    right = state["Q_L"].double() if key == "L" else state["Q_R"].double()
    return left @ state[key].double() @ right.T


@pytest.mark.of_dykaf
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("m", "n"), [(48, 48), (64, 32)])
@pytest.mark.parametrize("source", ["option", "torch"])
def test_medium_stays_near_highest(m: int, n: int, source: str) -> None:
    """A product whose operands and result are rounded to bfloat16, u = 2^-9: |fl(Q X) - Q X| <=
    3.01 u |Q| |X| by entry, in norm at most 3.01 u sqrt(m) ||X|| for an orthogonal m x m Q. The
    momentum of one gradient is two such products away from it. It is compared in the original
    coordinates, where the bases (which hang on the rounded factors) do not show. A factor is the
    normalised sum of non-negative terms with two products each (6.03 u), by entry against the sum
    of absolute values: at most the square root of its size in norm."""
    u = 2.0**-9
    states = {}
    for precision in ("highest", "medium"):
        param = parameter(m, n)
        torch.set_float32_matmul_precision(precision if source == "torch" else "high")
        option = precision if source == "option" else None
        optimizer = two_sided(
            [param],
            matmul_precision=option,
            precondition_frequency=100,
            refresh_schedule="fixed",
        )
        run(optimizer, range(2))
        states[precision] = optimizer.state[param]
    exact = 0.05 * gradient(param, 1, 0).double()
    bound = 3.01 * u * (m**0.5 + n**0.5)
    momenta = {key: _from_basis(state, "exp_avg") for key, state in states.items()}
    assert float((momenta["highest"] - exact).norm()) < 1e-5 * float(exact.norm())
    assert float((momenta["medium"] - exact).norm()) < bound * float(exact.norm())
    for key, size in (("L", m), ("R", n)):
        difference = _from_basis(states["medium"], key) - _from_basis(states["highest"], key)
        assert float(difference.norm()) < 2 * 6.03 * u * size**0.5
    ratio = states["medium"]["rho"] / states["highest"]["rho"]
    assert bool(((ratio - 1).abs() < 2 * 6.03 * u * max(m, n) ** 0.5).all())
    if cpu_multiplies_bfloat16():
        assert float((momenta["medium"] - exact).norm()) > 0.01 * bound * float(exact.norm())


def test_refreshed_bases_are_orthogonal_at_medium() -> None:
    """Bases are made at full precision: the error stays that of float32, not of bfloat16.

    On a CPU without bfloat16 instructions both settings give float32.
    """
    param = parameter(320, 288)
    optimizer = two_sided([param], matmul_precision="medium", precondition_frequency=1)
    run(optimizer, range(6))
    state = optimizer.state[param]
    for key, size in (("Q_L", 320), ("Q_R", 288)):
        Q = state[key].double()
        error = Q.T @ Q - torch.eye(size, dtype=torch.float64)
        assert float(error.abs().max()) < 1e-5


@pytest.mark.usefixtures("restored")
def test_initialisation_and_refreshes_are_the_same_at_medium() -> None:
    """Bit for bit: no product of theirs is rounded."""
    states = []
    for precision in ("highest", "medium"):
        param = parameter(40, 24)
        optimizer = two_sided([param], matmul_precision="highest", refresh_schedule="fixed")
        run(optimizer, range(3))
        fresh = two_sided([parameter(40, 24)], matmul_precision=precision)
        run(fresh, range(1))
        ops.refresh_basis_(
            [optimizer.state[param]], "left", step_options({**fresh.param_groups[0]}, 1.0)
        )
        states.append(
            [*optimizer.state[param].values(), *fresh.state[params_of(fresh)[0]].values()]
        )
    for expected, actual in zip(*states, strict=True):
        assert torch.equal(expected, actual)
