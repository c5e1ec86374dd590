"""No update is larger than Adam's can be, and all stays finite, whatever the gradients were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import backends
import pytest
import torch
from bounded_steps import FORMS, BoundedSteps
from gradient_sequences import (
    Kind,
    Shape,
    Stretch,
    few_entries,
    flipping,
    gradients,
    rank_one,
    stretches,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dykaf import DyKAF

SHAPES = [(1, 7), (7, 1), (2, 2), (5, 5), (12, 5), (5, 12), (3, 20), (2, 80), (80, 2)]
BETAS = [(0.95, 0.95), (0.9, 0.999), (0.9, 0.95)]
SLOWDOWN = 20 if backends.is_gpu() else 1  # of the host executor
TRIED: Counter[str] = Counter()

OPTIONS = st.fixed_dictionaries(
    {
        "betas": st.sampled_from(BETAS),
        "eps": st.sampled_from([1e-8, 1e-8, 1e-20, 1e-3]),
        "factor_beta": st.sampled_from([0.9, None]),
        "precondition_frequency": st.sampled_from([1, 3, 10]),
        "refresh_schedule": st.sampled_from(["geometric", "fixed"]),
        "init": st.sampled_from(["identity", "rank_one"]),
        "second_moment": st.sampled_from(["full", "full", "rank_one", "factored"]),
        "rescale_exp_avg_sq": st.booleans(),
        "state_dtype": st.sampled_from(["float32", "float32", "bfloat16"]),
        "skinny_rank": st.sampled_from([4, 0]),  # it applies to sides of 80
        "nesterov": st.booleans(),
        "orthogonalize": st.sampled_from([0, 0, 3]),
    }
)
INTEGRATORS = st.sampled_from([{"integrator": name} for name in ("diagonal", "ksl", "bug")])
DTYPES = [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "low_precision": "master"}]
if backends.takes_float64():
    DTYPES.append({"dtype": torch.float64})
SIDES = st.sampled_from(["both", "both", "one", "none"])


def property_of(num_examples: int) -> settings:
    return settings(max_examples=num_examples // SLOWDOWN, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def report(record_property: Any) -> Iterator[None]:
    """How many sequences and steps a test has tried."""
    before = TRIED.copy()
    yield
    for key, value in (TRIED - before).items():
        record_property(key, value)
        print(key, value)


def make(
    shape: tuple[int, ...], *, dtype: torch.dtype, low_precision: str = "stochastic", **options: Any
) -> BoundedSteps:
    """From zero, at lr = 1."""
    param = nn.Parameter(torch.zeros(shape, dtype=dtype, device=backends.device()))
    return BoundedSteps(
        DyKAF([param], lr=1.0, weight_decay=0, low_precision=low_precision, **options)
    )


def run(steps: BoundedSteps, grads: Tensor) -> None:
    (param,) = steps.optimizer.param_groups[0]["params"]
    for grad in grads:
        param.grad = grad.to(param.device, param.dtype)
        steps.step()
    steps.check_finite()
    TRIED["sequences"] += 1
    TRIED["steps"] += len(grads)


@property_of(300)
@given(st.sampled_from(SHAPES), stretches(), OPTIONS, INTEGRATORS, st.sampled_from(DTYPES), SIDES)
def test_mixtures(
    shape: Shape,
    parts: list[Stretch],
    options: dict[str, Any],
    integrator: dict[str, Any],
    dtype: dict[str, Any],
    sides: str,
) -> None:
    options = {**options, **integrator}
    steps = make(shape, **options, **dtype, sides=sides)
    run(steps, gradients(parts, shape))


@property_of(150)
@given(
    st.sampled_from([(2, 2), (3, 3), (1, 5), (2, 6)]).flatmap(few_entries),
    OPTIONS,
    INTEGRATORS,
    SIDES,
)
def test_few_entries(
    grads: Tensor, options: dict[str, Any], integrator: dict[str, Any], sides: str
) -> None:
    shape = (grads.shape[1], grads.shape[2])
    steps = make(shape, dtype=torch.float32, **options, **integrator, sides=sides)
    run(steps, grads)


@property_of(60)
@given(st.sampled_from([(2, 2), (5, 12), (2, 80)]), stretches(most=3), OPTIONS, INTEGRATORS)
def test_stacks(
    shape: Shape, parts: list[Stretch], options: dict[str, Any], integrator: dict[str, Any]
) -> None:
    """Three matrices that are at different places of the sequence."""
    options = {**options, **integrator}
    grads = gradients(parts, shape)
    stacks = torch.stack([grads.roll(-3 * idx, 0) for idx in range(3)], 1)
    run(make((3, *shape), dtype=torch.float32, batch_dims=1, sides="both", **options), stacks)


@pytest.mark.parametrize("form", FORMS)
def test_the_four_gradients_that_moved_an_entry_by_13654(form: str) -> None:
    """At lr = 1e-3: momentum came where the second moment was zero, and only eps held it."""
    steps = make((2, 2), dtype=torch.float32, **FORMS[form])
    grads = [[[1, 0], [0, 0]], [[0, 2], [0, 0]], [[2, 0], [1, 0]], [[1, 0], [0, 0]]]
    run(steps, torch.tensor(grads))
    (param,) = steps.optimizer.param_groups[0]["params"]
    assert 0.5 < float(param.detach().abs().max()) <= 2 * 3


@pytest.mark.parametrize("form", FORMS)
def test_one_hot_inputs_at_batch_one(form: str) -> None:
    """A column of the first layer has a gradient in one step of sixteen."""
    for seed in range(1 if backends.is_gpu() else 10):
        torch.manual_seed(seed)
        layers = nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)
        model = nn.Sequential(*layers).to(backends.device())
        optimizer = DyKAF(model.parameters(), lr=1e-3, weight_decay=0, **FORMS[form])
        steps = BoundedSteps(optimizer)
        generator = torch.Generator().manual_seed(seed)
        for label in torch.randint(16, (40,), generator=generator).to(backends.device()):
            output = model(nn.functional.one_hot(label, 16).float())
            optimizer.zero_grad()
            nn.functional.cross_entropy(output, (label * 7 + 3) % 16).backward()
            steps.step()
        steps.check_finite()
        TRIED["sequences"] += 1
        TRIED["steps"] += steps.steps


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
def test_a_jump_to_where_a_factor_is_zero(integrator: str) -> None:
    """By 1e20 and more, and into rows and columns where a factor of rank one is zero: K is a L."""
    options = {"integrator": integrator, "init": "rank_one"}
    grads = [[[1e-30, 0], [0, 0]], [[0, 0], [0, 1]], [[1, 0], [0, 0]]]
    run(make((2, 2), dtype=torch.float32, **options), torch.tensor(grads))


@pytest.mark.parametrize(("shape", "kind"), [((2, 80), flipping), ((80, 2), rank_one)])
def test_a_skinny_matrix_in_bfloat16(shape: Shape, kind: Kind) -> None:
    """The gradient lies in the basis but for the rounding of the latter."""
    steps = make(shape, dtype=torch.float32, state_dtype="bfloat16", skinny_rank=4)
    run(steps, Stretch(kind, 4, 0, 1).gradients(shape))


def test_a_vector_with_a_gradient_of_1e30_is_as_with_adamw() -> None:
    """Without factors the second moment becomes infinite, and the entry stays where it is."""
    grads = torch.tensor([[1.0, 1, 1], [1e30, 1, 1], [1, 1, 1]])
    params = [nn.Parameter(torch.zeros(3, device=backends.device())) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.5), "weight_decay": 0}
    optimizers = [DyKAF(params[:1], **options), torch.optim.AdamW(params[1:], **options)]
    for grad in grads:
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.device)
            optimizer.step()
    # Each of the three averages and the quotient round a few times, in an order of their own.
    torch.testing.assert_close(params[0].cpu(), params[1].cpu(), rtol=1e-6, atol=0)
    assert bool(params[0].isfinite().all()) and float(params[0][1]) != 0
