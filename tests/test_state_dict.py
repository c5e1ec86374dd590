"""Saved and restored state: bit for bit, from any step, in every form."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_helpers import bits, gradient, parameter, params_of, run, trajectory, two_sided
from torch import nn

from dykaf import DyKAF
from dykaf.state import HOST_KEYS

pytestmark = pytest.mark.usefixtures("each_optimizer")

STEPS = 20

# Groups of (shapes, dtype, options). Together: two factors, one factor, none; stacks.
SHAPES = [(6, 4), (3, 9), (9, 9), (5,), ()]
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": torch.float64, "rescale_exp_avg_sq": True},
    "rank_one": {"second_moment": "rank_one", "integrator": "bug"},
    "factored": {"second_moment": "factored", "integrator": "diagonal"},
    "stochastic": {"dtype": torch.bfloat16, "seed": 5},
    "stochastic_float16": {"dtype": torch.float16, "second_moment": "factored"},
    "master": {"dtype": torch.bfloat16, "low_precision": "master"},
    "master_float16": {"dtype": torch.float16, "low_precision": "master"},
    "stack": {"batch_dims": 1, "shapes": [(3, 4, 2), (2, 3, 9), (4,)]},
    "stack_rank_one": {
        "batch_dims": 1,
        "shapes": [(3, 4, 2)],
        "second_moment": "rank_one",
        "dtype": torch.bfloat16,
    },
}


def make(form: str) -> DyKAF:
    options = dict(FORMS[form])
    dtype = options.pop("dtype", torch.float32)
    shapes = options.pop("shapes", SHAPES)
    return DyKAF(
        [parameter(*shape, seed=idx, dtype=dtype) for idx, shape in enumerate(shapes)],
        max_precond_dim=7,
        precondition_frequency=5,
        lr=0.01,
        **options,
    )


def continued(optimizer: DyKAF, state_dict: dict[str, Any], form: str) -> DyKAF:
    """A fresh optimizer over copies of the parameters, with ``state_dict``."""
    other = make(form)
    for target, source in zip(params_of(other), params_of(optimizer), strict=True):
        target.data.copy_(source.detach())
    other.load_state_dict(state_dict)
    return other


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [0, 1, 9])
def test_resumes_bit_for_bit(form: str, cut: int) -> None:
    """Cuts before the first gradient, after it, in the middle: each with refreshes to come."""
    optimizer = make(form)
    run(optimizer, range(cut))
    resumed = continued(optimizer, through_file(optimizer.state_dict()), form)
    refreshes_before = _refreshes(optimizer)
    assert trajectory(resumed) == trajectory(optimizer)
    run(optimizer, range(cut, STEPS))
    run(resumed, range(cut, STEPS))
    assert trajectory(resumed) == trajectory(optimizer)
    assert _refreshes(optimizer) > refreshes_before


def _refreshes(optimizer: DyKAF) -> int:
    states = [optimizer.state.get(param) or {} for param in params_of(optimizer)]
    return sum(int(state["refreshes"].sum()) for state in states if "refreshes" in state)


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_gives_the_same_end(form: str) -> None:
    """A run that is saved and restored at every step ends as one that never was."""
    optimizer, chained = make(form), make(form)
    run(optimizer, range(12))
    for step in range(12):
        run(chained, range(step, step + 1))
        chained = continued(chained, chained.state_dict(), form)
    assert trajectory(chained) == trajectory(optimizer)


@pytest.mark.parametrize("form", ["stochastic", "stack", "master"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue_bit_for_bit(form: str, clone: Callable[[DyKAF], DyKAF]) -> None:
    optimizer = make(form)
    run(optimizer, range(7))
    optimizer.skipped_steps = 3
    other = clone(optimizer)
    assert not {id(p) for p in params_of(other)} & {id(p) for p in params_of(optimizer)}
    run(optimizer, range(7, STEPS))
    saved = trajectory(optimizer)
    run(other, range(7, STEPS))
    assert trajectory(other) == saved
    assert trajectory(optimizer) == saved  # nothing is shared
    assert other.skipped_steps == 3


def test_deepcopy_keeps_model_and_optimizer_together() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = DyKAF(model.parameters())
    run(optimizer, range(3))
    other_model, other = copy.deepcopy((model, optimizer))
    assert params_of(other)[0] is other_model.weight
    run(optimizer, range(3, 9))
    run(other, range(3, 9))
    assert trajectory(other) == trajectory(optimizer)


def test_loaded_state_is_not_shared() -> None:
    optimizer = make("float32")
    run(optimizer, range(4))
    resumed = continued(optimizer, optimizer.state_dict(), "float32")
    before = trajectory(optimizer)
    run(resumed, range(4, 10))
    assert trajectory(optimizer) == before


@pytest.mark.of_dykaf
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loading_casts_nothing(dtype: torch.dtype) -> None:
    optimizer = two_sided([parameter(4, 3, dtype=dtype)])
    run(optimizer, range(5))
    other = two_sided([parameter(4, 3, dtype=dtype)])
    other.load_state_dict(optimizer.state_dict())
    state = other.state[params_of(other)[0]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {key: value.dtype for key, value in state.items()} == {
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "L", "R", "Q_L", "Q_R"), wide),
        **dict.fromkeys(("step", "update_rms"), torch.float32),
        **dict.fromkeys(
            ("next_refresh", "refreshes", "schedule_step", "refresh_fallbacks"), torch.int64
        ),
        "rho": torch.float64,
    }
    # rho has more than 24 bits: a detour through float32 would show.
    assert float(state["rho"][0]) != float(state["rho"][0].float())
    assert trajectory(other)[1] == trajectory(optimizer)[1]


def test_skipped_steps_are_saved() -> None:
    optimizer, other = make("float32"), make("float32")
    params_of(optimizer)[0].grad = torch.full((6, 4), float("nan"))
    optimizer.step()
    optimizer.step()
    optimizer.add_param_group({"params": [parameter(3)]})
    other.add_param_group({"params": [parameter(3)], "skipped_steps": 5})  # no option
    assert other.skipped_steps == other.state_dict()["param_groups"][1]["skipped_steps"] == 0
    saved = through_file(optimizer.state_dict())
    assert [group["skipped_steps"] for group in saved["param_groups"]] == [2, 2]
    other.skipped_steps = 9
    other.load_state_dict(saved)
    assert other.skipped_steps == 2
    for group in saved["param_groups"]:  # as saved by torch.optim.AdamW
        del group["skipped_steps"]
    other.load_state_dict(saved)
    assert other.skipped_steps == 0
    other.load_state_dict({**saved, "skipped_steps": 4})  # as saved before it was in the groups
    assert other.skipped_steps == 4
    assert other.state_dict()["param_groups"][0]["skipped_steps"] == 4


def test_saved_options_are_loaded() -> None:
    optimizer = DyKAF(
        [parameter(4, 3)], lr=0.5, integrator="bug", seed=2**64 - 1, precondition_frequency=3
    )
    other = DyKAF([parameter(4, 3)])
    other.load_state_dict(through_file(optimizer.state_dict()))
    for name in ("lr", "integrator", "seed", "precondition_frequency", "betas"):
        assert other.param_groups[0][name] == optimizer.param_groups[0][name]
    run(optimizer, range(9))
    run(other, range(9))
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.of_dykaf
def test_options_that_an_old_checkpoint_lacks_come_from_the_constructor() -> None:
    optimizer = DyKAF([parameter(4, 3)], integrator="bug")
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["integrator"]
    other = DyKAF([parameter(4, 3)], integrator="diagonal")
    other.load_state_dict(saved)
    assert other.param_groups[0]["integrator"] == "diagonal"


@pytest.mark.of_dykaf
@pytest.mark.parametrize("metric_power", [0.0, 1.0])
def test_a_checkpoint_from_when_metric_power_was_an_option(metric_power: float) -> None:
    """The entry goes. Other powers than 0 kept matrices from the skinny form, and still do."""
    rank = 0 if metric_power else 8
    optimizer = DyKAF([parameter(2, 40)], sides="both", skinny_rank=rank)
    run(optimizer, range(4))
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(metric_power=metric_power, skinny_rank=8)
    other = DyKAF([param.detach().clone() for param in params_of(optimizer)], sides="both")
    other.load_state_dict(through_file(saved))
    assert "metric_power" not in other.param_groups[0]
    run(optimizer, range(4, 9))
    run(other, range(4, 9))
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.of_dykaf
def test_options_that_an_old_pickle_lacks_come_from_its_defaults() -> None:
    state = DyKAF([parameter(4, 3)], integrator="bug").__getstate__()
    del state["param_groups"][0]["integrator"]
    del state["param_groups"][0]["seed"]
    del state["param_groups"][0]["skipped_steps"]
    del state["skipped_steps"]
    other = DyKAF.__new__(DyKAF)
    other.__setstate__(state)
    assert other.param_groups[0]["integrator"] == "bug"
    assert other.param_groups[0]["seed"] == other.param_groups[0]["skipped_steps"] == 0
    run(other, range(3))
    assert float(other.state[params_of(other)[0]]["step"]) == 2


def test_what_was_loaded_is_not_kept_alive() -> None:
    optimizer, other = make("float32"), make("float32")
    run(optimizer, range(3))
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(saved)
    tensor = weakref.ref(saved["state"][0]["exp_avg"])
    del saved
    gc.collect()
    assert tensor() is None


# ---- Hooks ---------------------------------------------------------------------------------------


def test_pre_hooks_change_what_is_loaded() -> None:
    optimizer = make("float32")
    run(optimizer, range(6))
    expected = trajectory(optimizer)[1][0]["exp_avg"]
    other = make("float32")

    def replace(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        state = {idx: dict(entry) for idx, entry in saved["state"].items()}
        state[0]["exp_avg"] = 2 * state[0]["exp_avg"]
        groups = [{**group, "lr": 0.25} for group in saved["param_groups"]]
        return {**saved, "state": state, "param_groups": groups, "skipped_steps": 4}

    handle = other.register_load_state_dict_pre_hook(replace)
    other.load_state_dict(optimizer.state_dict())
    param = params_of(other)[0]
    assert bits(other.state[param]["exp_avg"] / 2) == expected
    assert other.param_groups[0]["lr"] == 0.25
    assert other.skipped_steps == 4
    handle.remove()
    other.load_state_dict(optimizer.state_dict())
    assert bits(other.state[param]["exp_avg"]) == expected


def test_post_hooks_see_and_may_change_the_loaded_state() -> None:
    optimizer = DyKAF([parameter(4, 3, dtype=torch.bfloat16)])
    run(optimizer, range(3))
    other = DyKAF([parameter(4, 3, dtype=torch.bfloat16)])
    seen = []

    def hook(loaded: torch.optim.Optimizer) -> None:
        state = loaded.state[params_of(loaded)[0]]
        seen.append(bits(state["rho"]))
        state["exp_avg"].zero_()

    other.register_load_state_dict_post_hook(hook)
    other.load_state_dict(optimizer.state_dict())
    assert seen == [bits(optimizer.state[params_of(optimizer)[0]]["rho"])]
    assert not bool(other.state[params_of(other)[0]]["exp_avg"].any())


def test_state_dict_hooks_run() -> None:
    optimizer = make("float32")
    optimizer.register_state_dict_pre_hook(lambda opt: setattr(opt, "skipped_steps", 8))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": "kept"})
    saved = optimizer.state_dict()
    assert saved["note"] == "kept" and saved["param_groups"][0]["skipped_steps"] == 8


# ---- State that was moved ------------------------------------------------------------------------


class Elsewhere:
    """A tensor as it looks on another device, with the gaps that a move may keep."""

    is_cpu = False

    def __init__(self, value: torch.Tensor) -> None:
        self.device = torch.device("cuda")
        self.value = value

    def to(self, device: str) -> torch.Tensor:
        assert device == "cpu"
        return torch.stack([self.value, torch.zeros_like(self.value)], dim=-1)[..., 0]

    def all(self) -> bool:
        raise AssertionError("read where it is")


MOMENTS: dict[str, Callable[[DyKAF], object]] = {
    "step": lambda optimizer: run(optimizer, range(7, 8)),
    "refresh": lambda optimizer: optimizer.refresh(),
    "diagnostics": lambda optimizer: optimizer.diagnostics(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_belongs_on_the_cpu_comes_back(moment: str) -> None:
    """After the recipe that moves every tensor of a state to the parameter's device."""
    moved, plain = (
        DyKAF([parameter(6, 4), parameter(4, 40, seed=1), parameter(3)], skinny_rank=2)
        for _ in range(2)
    )
    for optimizer in (moved, plain):
        run(optimizer, range(7))
    for state in moved.state.values():
        for key, value in state.items():
            if key in HOST_KEYS:
                state[key] = Elsewhere(value)
    for optimizer in (moved, plain):
        MOMENTS[moment](optimizer)
    for state in moved.state.values():
        entries = [state[key] for key in HOST_KEYS if key in state]
        assert all(isinstance(entry, torch.Tensor) and entry.is_contiguous() for entry in entries)
    for optimizer in (moved, plain):
        run(optimizer, range(8, 14))
    assert trajectory(moved) == trajectory(plain)


# ---- Parameters added late -----------------------------------------------------------------------


def test_checkpoint_with_a_group_added_late() -> None:
    """Some parameters have state, some have none yet."""
    optimizer = make("float32")
    run(optimizer, range(4))
    optimizer.add_param_group({"params": [parameter(4, 5, seed=9)], "lr": 0.1})
    other = make("float32")
    other.add_param_group({"params": [parameter(4, 5, seed=9)]})
    for target, source in zip(params_of(other), params_of(optimizer), strict=True):
        target.data.copy_(source.detach())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert not other.state.get(params_of(other)[-1])
    run(optimizer, range(4, 16))
    run(other, range(4, 16))
    assert trajectory(other) == trajectory(optimizer)


def test_offsets_follow_a_loaded_period() -> None:
    """The places in the refresh period belong to the groups, also after a load changed them."""
    options: dict[str, Any] = {"precondition_frequency": 4}
    shapes = [(4, 4)] * 5
    optimizer = DyKAF([parameter(*shape) for shape in shapes], **options)
    other = DyKAF([parameter(*shape) for shape in shapes])
    run(other, range(3))
    other.load_state_dict(optimizer.state_dict())
    for idx, param in enumerate(params_of(other)):
        param.data.copy_(params_of(optimizer)[idx].detach())
        other.state.pop(param, None)
    for step in range(45):  # the period is whole from step 40 on
        for idx, (ours, theirs) in enumerate(
            zip(params_of(other), params_of(optimizer), strict=True)
        ):
            ours.grad = gradient(ours, step, idx)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.parametrize("schedule", ["geometric", "fixed"])
@pytest.mark.parametrize("refresh_stagger", [False, True])
def test_a_checkpoint_from_when_refresh_stagger_was_an_option(
    schedule: str, refresh_stagger: bool
) -> None:
    """The entry goes, and the schedule alone says when the next refreshes are."""
    options: dict[str, Any] = {"refresh_schedule": schedule, "precondition_frequency": 4}
    optimizer = DyKAF([parameter(6, 4), parameter(4, 4)], **options)
    run(optimizer, range(4))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["refresh_stagger"] = refresh_stagger
    other = DyKAF([param.detach().clone() for param in params_of(optimizer)])
    other.load_state_dict(through_file(saved))
    assert "refresh_stagger" not in other.param_groups[0]
    run(optimizer, range(4, 30))
    run(other, range(4, 30))
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.of_dykaf
def test_a_state_from_a_device_without_float64() -> None:
    """There the numbers that are float64 here are float32; the run goes on from their values."""
    options = {"second_moment": "rank_one"}
    source, target = (DyKAF([parameter(6, 4)], **options) for _ in range(2))
    run(source, range(4))
    saved = source.state_dict()
    expected = {}
    for key in ("rho", "exp_avg_sq_scale"):
        narrow = saved["state"][0][key].float()
        saved["state"][0] = {**saved["state"][0], key: narrow}
        expected[key] = narrow.double()
    target.load_state_dict(saved)
    state = target.state[params_of(target)[0]]
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    run(target, range(4, 6))


@pytest.mark.of_dykaf
def test_a_checkpoint_from_before_sides_goes_on_as_it_was() -> None:
    """Its groups lack the options of the present default, and its matrices have both factors."""
    optimizer, other = two_sided([parameter(4, 3)]), DyKAF([parameter(4, 3)])
    run(optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("sides", "nesterov", "orthogonalize"):
        del saved["param_groups"][0][name]
    with torch.no_grad():
        params_of(other)[0].copy_(params_of(optimizer)[0])
    other.load_state_dict(saved)
    for each in (optimizer, other):
        run(each, range(5, 9))
    assert trajectory(other) == trajectory(optimizer)


@pytest.mark.of_dykaf
def test_a_checkpoint_of_adamw_keeps_the_form_of_matrices() -> None:
    """Its groups are no older ones of this optimizer."""
    matrix, vector = parameter(4, 3), parameter(3)
    adamw = torch.optim.AdamW([matrix, vector])
    vector.grad = torch.ones(3)
    adamw.step()
    optimizer = DyKAF([parameter(4, 3), parameter(3)])
    optimizer.load_state_dict(adamw.state_dict())
    (group,) = optimizer.param_groups
    assert (group["sides"], group["nesterov"], group["orthogonalize"]) == ("one", True, 3)
    assert group["betas"] == (0.9, 0.999)
