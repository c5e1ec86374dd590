"""Parameters that are not there yet when the optimizer is made, and such as are replaced."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from optim_helpers import bits, parameter, params_of, randn, run, trajectory
from torch import Tensor, nn

from dykaf import DyKAF

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
    assert len(optimizer._layouts) == 2  # of those that are there


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
    options: dict[str, Any] = {"refresh_schedule": "fixed", "precondition_frequency": 4}
    optimizer = DyKAF([parameter(4, 4), parameter(6, 6), parameter(5, 3)], **options)
    run(optimizer, range(6))
    offsets = optimizer._stagger_offsets()
    _replace(optimizer, 1, parameter(2, 3))
    run(optimizer, range(6, 9))
    assert optimizer._stagger_offsets() != offsets
    resumed = DyKAF([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], **options)
    resumed.load_state_dict(optimizer.state_dict())
    for other in (optimizer, resumed):
        run(other, range(9, 20))
    assert trajectory(resumed) == trajectory(optimizer)
