"""Steps of sharded parameters are those of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_models import LAYOUTS, Model, differing

NUM_STEPS = 30
BOTH = {"sides": "both", "orthogonalize": 0, "nesterov": False}
FORMS: dict[str, dict[str, Any]] = {
    "both": BOTH,
    "ksl": {**BOTH, "integrator": "ksl"},
    "bug": {**BOTH, "integrator": "bug", "init": "rank_one", "refresh_schedule": "fixed"},
    "rank_one": {**BOTH, "second_moment": "rank_one"},
    "factored": {"second_moment": "factored"},
    "no factors": {"sides": "none", "skinny_rank": 0},
    "muon": {"sides": "none", "second_moment": "none"},
    "state in bfloat16": {"state_dtype": "bfloat16"},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "refresh at one time": {"refresh_schedule": "fixed"},
    "stochastic": {"dtype": torch.bfloat16},
    "stochastic float16": {"dtype": torch.float16, "lr": 0.1},
    "master": {"dtype": torch.bfloat16, "low_precision": "master"},
    "float64": {"dtype": torch.float64},
    "medium": {"matmul_precision": "medium"},
    "fismo": {"fismo": True},
    "fismo, exact": {"fismo": True, "roots": "exact", "state_dtype": "bfloat16"},
    "all to AdamW": {"max_precond_dim": 0},
}


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


def train_both(layout: str, options: dict[str, Any]) -> list[int]:
    ours = Model(layout, **options)
    start = ours.wholes()
    ours.train(0, NUM_STEPS)
    expected: list[Any] = [None]
    if dist.get_rank() == 0:
        alone = Model("", **options)
        alone.train(0, NUM_STEPS)
        expected = [alone.wholes()]
        assert not any(torch.equal(a, b) for a, b in zip(start, expected[0], strict=True))
    dist.broadcast_object_list(expected)
    return differing(ours.wholes(), expected[0])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["group", *LAYOUTS])
def test_each_layout(together: Ranks, layout: str, world: int) -> None:
    if layout in LAYOUTS and len(LAYOUTS[layout][0]) == 2 and world % 2 == 1:
        pytest.skip("two dimensions of two ranks at least")
    assert together.run(train_both, layout, {}, world=world) == [[]] * world


@pytest.mark.parametrize("layout", ["group", "rows", "rows and columns"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form(together: Ranks, layout: str, form: str) -> None:
    assert together.run(train_both, layout, FORMS[form], world=4) == [[]] * 4
