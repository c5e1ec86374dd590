"""Options in the forms that NumPy and others give them, and what becomes of them."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import pytest
import torch
from optim_helpers import parameter, params_of, refuses, run, trajectory
from torch import Tensor

from dykaf import DyKAF
from dykaf.options import step_options
from dykaf.state import Layout

np = pytest.importorskip("numpy")

PLAIN: dict[str, Any] = {
    "lr": 0.125,
    "betas": (0.75, 0.5),
    "eps": 0.25,
    "weight_decay": 0.5,
    "factor_beta": 0.5,
    "precondition_frequency": 3,
    "max_precond_dim": 100,
    "skinny_rank": 2,
    "integrator": "bug",
    "rescale_exp_avg_sq": False,
    "sides": "both",
    "nesterov": False,
    "orthogonalize": 2,
    "batch_dims": 1,
    "seed": 7,
    "maximize": True,
}
FORMS: dict[type, Any] = {
    float: [np.float32, np.float64, np.float16, Fraction],
    int: [np.int64, np.int8, np.uint16, np.int32],
    bool: [np.bool_],
    str: [np.str_],
    tuple: [list, np.array, lambda pair: np.array(pair, dtype=np.float32)],
}


def in_other_forms(choice: int) -> dict[str, Any]:
    forms = {name: FORMS[type(value)] for name, value in PLAIN.items()}
    return {name: form[choice % len(form)](PLAIN[name]) for name, form in forms.items()}


def make(options: dict[str, Any]) -> DyKAF:
    return DyKAF([parameter(2, 6, 4), parameter(3)], **options)


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_plain(group: dict[str, Any]) -> None:
    """Equal, and of exactly the type: float64 is a subclass of float."""
    for name, value in PLAIN.items():
        assert group[name] == value and type(group[name]) is type(value), name
    assert [type(beta) for beta in group["betas"]] == [float, float]


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("where", ["constructor", "group", "in flight", "loaded"])
def test_other_forms_of_numbers_are_the_same_numbers(choice: int, where: str) -> None:
    """Bit for bit, and in the saved state plain."""
    plain = make(PLAIN)
    options = in_other_forms(choice)
    if where == "constructor":
        other = make(options)
        assert_plain(other.defaults)
    elif where == "group":
        other = DyKAF([{"params": params_of(make({})), **options}])
    else:
        other = make({})
        if where == "in flight":
            other.param_groups[0].update(options)
        else:
            saved = other.state_dict()
            saved["param_groups"][0].update(options)
            other.load_state_dict(saved)
    if where != "in flight":
        assert_plain(other.param_groups[0])
    for optimizer in (plain, other):
        run(optimizer, range(8))
    assert trajectory(other) == trajectory(plain)
    assert_plain(through_file(other.state_dict())["param_groups"][0])


def test_the_operations_get_values_of_pythons_own() -> None:
    """Also of options that were changed in flight."""
    group = make({}).param_groups[0]
    expected = step_options({**group, **PLAIN})
    found = step_options({**group, **in_other_forms(0)})
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_sizes_do_not_overflow_in_small_integers() -> None:
    group = DyKAF([parameter(3)], skinny_rank=64, batch_dims=1).param_groups[0]
    small = {**group, "skinny_rank": np.int8(64), "batch_dims": np.int8(1)}
    param = parameter(2, 4, 200)
    layout = Layout.of(param, small)
    assert layout == Layout.of(param, group)
    assert layout.shapes()["basis"][0] == (2, 128, 200)


def test_what_a_scheduler_makes_with_numpy_is_saved_plain() -> None:
    optimizer = DyKAF([parameter(4, 3)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.exp(-step))
    run(optimizer, range(1))
    scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    saved = through_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == 0.5 * np.exp(-1)


def test_an_option_that_is_no_good_does_not_stop_saving() -> None:
    """It is for the next step to refuse."""
    optimizer = DyKAF([parameter(4, 3)])
    optimizer.param_groups[0]["eps"] = "small"
    assert optimizer.state_dict()["param_groups"][0]["eps"] == "small"
    with refuses(optimizer, "eps: expected a finite number >= 0, got 'small'"):
        optimizer.step()


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5])])
def test_a_tensor_lr_stays_the_tensor_that_it_is(lr: Tensor) -> None:
    optimizer = DyKAF([parameter(4, 3)], lr=lr)
    optimizer.state_dict()
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("maximize", np.int64(1), "True or False"),
        ("weight_decay", np.True_, "a finite number >= 0"),
        ("eps", np.float32("nan"), "a finite number >= 0"),
        ("seed", np.True_, "an integer in [0, 2**64)"),
        ("seed", np.int64(-1), "an integer in [0, 2**64)"),
        ("seed", np.float64(3), "an integer in [0, 2**64)"),
        ("init", np.array("identity"), "one of 'identity', 'rank_one'"),
        *(
            ("betas", value, "two numbers in [0, 1)")
            for value in (
                np.array([0.5, 1.0]),
                np.array([[0.5, 0.5], [0.5, 0.5]]),
                np.array([0.5, 0.5, 0.5]),
                np.array(0.5),
                np.array([False, False]),
                b"\0\0",
                {0: 0.5, 1: 0.5},
            )
        ),
    ],
    ids=repr,
)
def test_other_forms_that_are_no_good(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        DyKAF([parameter(3)], **{option: value})
    assert str(caught.value) == f"{option}: expected {expected}, got {value!r}"
