"""State that does not fit: structural options changed, and saved state of something else. The exact
message, and everything as before, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import frozen, parameter, params_of, refuses, run, trajectory, two_sided

from dykaf import DyKAF

pytestmark = pytest.mark.usefixtures("each_optimizer")

# ---- Structure -----------------------------------------------------------------------------------


def _state_message(key: str, expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    return (
        f"state of param_groups[0]['params'][0]: {key!r}: expected torch.float32 of shape "
        f"{expected}, got torch.float32 of shape {got}"
    )


CHANGED = "state of param_groups[0]['params'][0], which cannot follow a change of "


@pytest.mark.of_dykaf
@pytest.mark.parametrize(
    ("option", "value", "shape", "dtype", "message"),
    [
        ("max_precond_dim", 0, (4, 3), torch.float32, None),
        ("max_precond_dim", 3, (4, 3), torch.float32, None),
        (
            "batch_dims",
            1,
            (4, 3, 2),
            torch.float32,
            "'step': expected torch.float32 of shape (4,), got torch.float32 of shape ()",
        ),
        (
            "second_moment",
            "factored",
            (4, 3),
            torch.float32,
            "expected a tensor 'exp_avg_sq_row', got None",
        ),
        (
            "second_moment",
            "rank_one",
            (4, 3),
            torch.float32,
            "expected a tensor 'exp_avg_sq_row', got None",
        ),
        ("low_precision", "master", (4, 3), torch.bfloat16, "expected a tensor 'master', got None"),
    ],
)
def test_structure_cannot_change(
    option: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, message: str | None
) -> None:
    optimizer = two_sided([parameter(*shape, dtype=dtype), parameter(3)])
    run(optimizer, range(3))
    good = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    if message is None:
        tensors = sorted(_layout_names(optimizer, shape))
        extra = sorted(set(optimizer.state[params_of(optimizer)[0]]) - set(tensors))
        message = f"expected the tensors {tensors}, got also {extra}"
    message = f"{CHANGED}{option}: {message}"
    with refuses(optimizer, message):
        optimizer.step()
    with refuses(optimizer, message):  # it does not pass at the second try either
        optimizer.step()
    optimizer.param_groups[0][option] = good
    run(optimizer, range(3, 5))
    undisturbed = two_sided([parameter(*shape, dtype=dtype), parameter(3)])
    run(undisturbed, range(5))
    assert trajectory(optimizer) == trajectory(undisturbed)


def _layout_names(optimizer: DyKAF, shape: tuple[int, ...]) -> list[str]:
    """What a matrix has under the group's options, from an optimizer that began with them."""
    limit = optimizer.param_groups[0]["max_precond_dim"]
    fresh = two_sided([parameter(*shape)], max_precond_dim=limit)
    run(fresh, range(1))
    return list(fresh.state[params_of(fresh)[0]])


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((2, 6), torch.float32, {}, _state_message("exp_avg", (2, 6), (4, 3))),
        ((12,), torch.float32, {}, _state_message("exp_avg", (12,), (4, 3))),
        (
            (4, 3),
            torch.float64,
            {},
            "state of param_groups[0]['params'][0]: 'exp_avg': expected torch.float64 of shape "
            "(4, 3), got torch.float32 of shape (4, 3)",
        ),
        (
            (4, 3),
            torch.bfloat16,
            {"low_precision": "master"},
            "state of param_groups[0]['params'][0]: expected a tensor 'master', got None",
        ),
    ],
)
def test_a_parameter_that_became_another(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], message: str
) -> None:
    """Its new gradient fits; its state does not."""
    optimizer = two_sided([parameter(4, 3), parameter(3)], **options)
    run(optimizer, range(3))
    param = params_of(optimizer)[0]
    param.grad = None
    torch.utils.swap_tensors(param, parameter(*shape, dtype=dtype))
    param.grad = torch.ones_like(param)
    with refuses(optimizer, message):
        optimizer.step()


@pytest.mark.of_dykaf
def test_structure_of_what_has_no_factors_may_change() -> None:
    """A vector's state is the same under all of them."""
    optimizer = two_sided([parameter(5)])
    run(optimizer, range(2))
    optimizer.param_groups[0].update(
        max_precond_dim=0, batch_dims=1, second_moment="factored", low_precision="master"
    )
    run(optimizer, range(2, 4))
    undisturbed = two_sided([parameter(5)])
    run(undisturbed, range(4))
    assert trajectory(optimizer) == trajectory(undisturbed)


# ---- state_dict ----------------------------------------------------------------------------------


def _saved(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    optimizer = two_sided([parameter(*shape, dtype=dtype)], **options)
    run(optimizer, range(3))
    saved = optimizer.state_dict()
    return {**saved, "state": {idx: dict(state) for idx, state in saved["state"].items()}}


PREFIX = "state of param_groups[0]['params'][0]: "


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        (
            "exp_avg",
            lambda t: t[:2],
            "'exp_avg': expected torch.float32 of shape (4, 3), got torch.float32 of shape (2, 3)",
        ),
        (
            "exp_avg",
            lambda t: t.t(),
            "'exp_avg': expected torch.float32 of shape (4, 3), got torch.float32 of shape (3, 4)",
        ),
        (
            "L",
            lambda t: t.bfloat16(),
            "'L': expected torch.float32 of shape (4, 4), got torch.bfloat16 of shape (4, 4)",
        ),
        (
            "rho",
            lambda t: t.half(),
            "'rho': expected torch.float64 of shape (2,), got torch.float16 of shape (2,)",
        ),
        (
            "refreshes",
            lambda t: t.int(),
            "'refreshes': expected torch.int64 of shape (2,), got torch.int32 of shape (2,)",
        ),
        (
            "step",
            lambda t: t.reshape(1),
            "'step': expected torch.float32 of shape (), got torch.float32 of shape (1,)",
        ),
        ("step", lambda t: 3, "expected a tensor 'step', got 3"),
        ("Q_R", lambda t: None, "expected a tensor 'Q_R', got None"),
    ],
    ids=lambda change: change[0],
)
def test_saved_tensors_that_do_not_fit(change: tuple[str, Any, str], has_state: bool) -> None:
    key, spoil, message = change
    saved = _saved(4, 3)
    saved["state"][0][key] = spoil(saved["state"][0][key])
    optimizer = two_sided([parameter(4, 3)])
    if has_state:
        run(optimizer, range(5))
    with refuses(optimizer, PREFIX + message):
        optimizer.load_state_dict(saved)


def test_missing_and_unknown_saved_tensors() -> None:
    optimizer = two_sided([parameter(4, 3)])
    run(optimizer, range(2))
    saved = _saved(4, 3)
    del saved["state"][0]["exp_avg"]
    with refuses(optimizer, PREFIX + "expected a tensor 'exp_avg', got None"):
        optimizer.load_state_dict(saved)
    saved = _saved(4, 3)
    names = sorted(saved["state"][0])
    saved["state"][0].update(momentum=torch.zeros(()), GG=[torch.zeros(2)])
    message = f"expected the tensors {names}, got also ['GG', 'momentum']"
    with refuses(optimizer, PREFIX + message):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("saved_with", "message"),
    [
        (
            {"shape": (3, 4)},
            "'exp_avg': expected torch.float32 of shape (4, 3), got torch.float32 of shape (3, 4)",
        ),
        (
            {"shape": (4, 3), "dtype": torch.float64},
            "'exp_avg': expected torch.float32 of shape (4, 3), got torch.float64 of shape (4, 3)",
        ),
    ],
)
def test_saved_state_of_another_parameter(saved_with: dict[str, Any], message: str) -> None:
    optimizer = two_sided([parameter(4, 3)])
    run(optimizer, range(2))
    options = dict(saved_with)
    shape = options.pop("shape")
    with refuses(optimizer, PREFIX + message):
        optimizer.load_state_dict(_saved(*shape, **options))


def test_bad_options_in_a_saved_group() -> None:
    optimizer = two_sided([parameter(4, 3)])
    run(optimizer, range(2))
    saved = _saved(4, 3)
    saved["param_groups"][0]["betas"] = (0.9, 1.5)
    with refuses(optimizer, "betas: expected two numbers in [0, 1), got (0.9, 1.5)"):
        optimizer.load_state_dict(saved)


def test_saved_state_of_another_number_of_parameters() -> None:
    """torch's own messages."""
    optimizer = two_sided([parameter(4, 3), parameter(3)])
    run(optimizer, range(2))
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(_saved(4, 3))
    two_groups = two_sided([{"params": [parameter(4, 3)]}, {"params": [parameter(3)]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two_groups.state_dict())
    assert frozen(optimizer) == before


def test_after_a_refused_load_pre_hooks_work_as_before() -> None:
    optimizer = two_sided([parameter(4, 3)])
    good, bad = _saved(4, 3), _saved(3, 4)
    for _ in range(2):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        optimizer.load_state_dict(good)
        assert not optimizer._optimizer_load_state_dict_pre_hooks
