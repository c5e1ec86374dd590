"""What happens to a sharded optimizer between steps: loads, options, frozen parameters, teams."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_models import Model, differing, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

import dykaf
from dykaf.distributed import exchange


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


def by_rows(*shape: int, ranks: Any = None) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if ranks is None else ranks
    generator = torch.Generator().manual_seed(sum(shape))
    whole = torch.randn(shape, generator=generator)
    return nn.Parameter(sharded(whole, mesh, [Shard(0)]))


def step_with_ones(optimizer: dykaf.DyKAF) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()


def said_by(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rate_after_load(layout: str) -> list[int]:
    """A load makes new groups, which later steps go by."""
    model = Model(layout)
    if layout == "group":
        model.optimizer.consolidate_state_dict(to=None)
    model.train(0, 3)
    model.optimizer.load_state_dict(model.optimizer.state_dict())
    for group in model.optimizer.param_groups:
        group["lr"] = 0.0
    before = model.wholes()
    model.train(3, 4)
    return differing(model.wholes(), before)


@pytest.mark.parametrize("layout", ["group", "rows"])
def test_the_rate_after_a_load_is_that_of_the_groups(together: Ranks, layout: str) -> None:
    assert together.run(rate_after_load, layout) == [[], []]


def no_gradients(layout: str) -> list[int]:
    model = Model(layout)
    model.train(0, 3)
    before = model.wholes()
    model.optimizer.zero_grad()
    model.optimizer.step()
    return differing(model.wholes(), before)


@pytest.mark.parametrize("layout", ["group", "rows"])
def test_a_step_without_gradients(together: Ranks, layout: str) -> None:
    assert together.run(no_gradients, layout) == [[], []]


def consolidated() -> list[str]:
    """A stack first: ranks meet their own parameters in other orders than the rest."""
    whole: list[Tensor] = []
    optimizers = []
    for group in (dist.group.WORLD, None):
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 8, 8), (8, 8), (8, 8), (8, 8), (8, 8)]
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
        optimizer = dykaf.DyKAF(groups, process_group=group)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        optimizers.append(optimizer)
        whole += params
    optimizers[0].consolidate_state_dict(to=0)
    if dist.get_rank() > 0:
        return []
    saved, expected = (optimizer.state_dict()["state"] for optimizer in optimizers)
    return [
        f"{place} {key}"
        for place, state in expected.items()
        for key, value in state.items()
        if not torch.equal(saved[place][key], value)
    ]


def test_what_one_rank_gets(together: Ranks) -> None:
    assert together.run(consolidated, world=3) == [[]] * 3


def changed_options(with_state: bool) -> str:
    optimizer = dykaf.DyKAF([by_rows(6, 8)])
    if with_state:
        step_with_ones(optimizer)
    else:
        dykaf.describe_plan(optimizer)
    optimizer.param_groups[0]["sides"] = "both"
    return said_by(lambda: step_with_ones(optimizer))


def test_options_that_change(together: Ranks) -> None:
    """With state all ranks refuse, and name the option; without there is nothing to lose."""
    assert together.run(changed_options, False) == ["", ""]
    for said in together.run(changed_options, True):
        assert said.startswith("ValueError: state of param_groups[0]['params'][0], which cannot")
        assert said.endswith("change of sides")


def other_options() -> str:
    optimizer = dykaf.DyKAF([by_rows(6, 8)], seed=dist.get_rank())
    return said_by(lambda: step_with_ones(optimizer))


def test_options_that_differ_between_ranks(together: Ranks) -> None:
    for said in together.run(other_options):
        assert "on rank 0" in said
        assert ": seed=0" in said
        assert ": seed=1" in said


def frozen_for_a_while() -> list[tuple[int, ...]]:
    """State of frozen parameters is saved, and goes on with its owner."""
    params = [nn.Parameter(torch.eye(8) + place) for place in range(4)]
    optimizer = dykaf.DyKAF(params, process_group=dist.group.WORLD)
    optimizer.consolidate_state_dict(to=None)
    step_with_ones(optimizer)
    for param in params[:3]:
        param.requires_grad_(False)
    step_with_ones(optimizer)
    shapes = [tuple(s["exp_avg"].shape) for s in optimizer.state_dict()["state"].values()]
    for param in params:
        param.requires_grad_(True)
    step_with_ones(optimizer)
    steps = [state["step"].tolist() for state in optimizer.state_dict()["state"].values()]
    assert steps == [1, 1, 1, 2], steps  # the first gradient only starts a matrix
    return shapes


def test_parameters_frozen_for_a_while(together: Ranks) -> None:
    assert together.run(frozen_for_a_while) == [[(8, 8)] * 4] * 2


def two_teams(num_here: int, num_there: int) -> list[bool]:
    """Dense parameters on all ranks, others on halves; a half without gradients is left alone."""
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "rank"))["rank"]
    is_first = dist.get_rank() < 2
    mine = [by_rows(8, 8, ranks=halves) for _ in range(num_here if is_first else num_there)]
    dense = by_rows(10, 8)
    optimizer = dykaf.DyKAF([dense, *mine], weight_decay=0.5)
    for _ in range(3):
        step_with_ones(optimizer)
    before = [param.to_local().clone() for param in (dense, *mine)]  # type: ignore[operator]
    dense.grad = torch.ones_like(dense)
    for param in mine:
        param.grad = torch.ones_like(param) if is_first else None
    optimizer.step()
    params = (dense, *mine)
    return [
        not torch.equal(param.to_local(), old)  # type: ignore[operator]
        for param, old in zip(params, before, strict=True)
    ]


@pytest.mark.parametrize(("here", "there"), [(2, 2), (3, 1)])
def test_parameters_of_several_teams(together: Ranks, here: int, there: int) -> None:
    found = together.run(two_teams, here, there, world=4)
    assert found[:2] == [[True] + [True] * here] * 2
    assert found[2:] == [[True] + [False] * there] * 2


def nan_in_a_half(num_there: int) -> int:
    """In the last parameter of the second half, which the first may not have."""
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "rank"))["rank"]
    count = 1 if dist.get_rank() < 2 else num_there
    params = [by_rows(10, 8), *(by_rows(8, 8, ranks=halves) for _ in range(count))]
    optimizer = dykaf.DyKAF(params)
    step_with_ones(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    if dist.get_rank() == 3:
        assert isinstance(params[-1].grad, DTensor)
        params[-1].grad.to_local().fill_(float("nan"))
    optimizer.step()
    return optimizer.skipped_steps


@pytest.mark.parametrize("num_there", [1, 3])
def test_all_teams_skip_alike(together: Ranks, num_there: int) -> None:
    assert together.run(nan_in_a_half, num_there, world=4) == [1] * 4


def held_after_a_step() -> list[bool]:
    model = Model("rows")
    model.train(0, 2)
    grads = [param.grad.to_local() for param in model.params]  # type: ignore[union-attr]
    alive = [weakref.ref(grad.untyped_storage()) for grad in grads if grad.numel()]
    del grads
    model.optimizer.zero_grad()
    gc.collect()
    return [storage() is not None for storage in alive]


def test_gradients_are_not_held_after_a_step(together: Ranks) -> None:
    for found in together.run(held_after_a_step):
        assert found
        assert not any(found)


def no_memory_for_a_bucket() -> str:
    model = Model("rows")
    model.train(0, 3)
    if dist.get_rank() == 1:
        real = exchange.BucketStep.entries

        def fail(self: Any) -> Any:
            raise MemoryError("entries")

        exchange.BucketStep.entries = fail  # type: ignore[method-assign]
    said = said_by(lambda: model.train(3, 4))
    if dist.get_rank() == 1:
        exchange.BucketStep.entries = real  # type: ignore[method-assign]
    assert said_by(lambda: model.train(4, 5)) == ""
    return said


def test_no_memory_for_whole_matrices(together: Ranks) -> None:
    found = together.run(no_memory_for_a_bucket)
    assert found[0].startswith("RuntimeError: step: could not update param_groups[0]['params'][")
    assert found[0] == found[1]


def refused_on_one_rank() -> tuple[str, bool]:
    param = by_rows(6, 8)
    optimizer = dykaf.DyKAF([param])
    step_with_ones(optimizer)
    step_with_ones(optimizer)
    before = param.to_local().clone()  # type: ignore[operator]
    param.grad = torch.ones_like(param)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["eps"] = -1.0
    said = said_by(optimizer.step)
    return said, torch.equal(param.to_local(), before)  # type: ignore[operator]


def test_input_that_one_rank_refuses(together: Ranks) -> None:
    (first, same), (second, also) = together.run(refused_on_one_rank)
    assert (
        first
        == "RuntimeError: step: another rank refused its input, see there; nothing has changed"
    )
    assert second.startswith("ValueError: eps")
    assert same
    assert also


def partial_gradient(missing_on: int) -> Any:
    """A sum over ranks that has not been made yet."""
    param = by_rows(6, 8)
    mesh = param.device_mesh  # type: ignore[attr-defined]
    optimizer = dykaf.DyKAF([param], sides="none", second_moment="none", betas=(0.75, 0.9))
    whole = torch.ones(6, 8) * (1 + dist.get_rank())
    if dist.get_rank() != missing_on:
        param.grad = DTensor.from_local(whole, mesh, [Partial()])
    said = said_by(optimizer.step)
    if said:
        return said
    state = optimizer.state_dict()["state"][0]["exp_avg"].full_tensor()
    return bool(torch.allclose(state, torch.full((6, 8), 0.25 * 3)))


def test_gradients_that_are_partial_sums(together: Ranks) -> None:
    options = together.run(partial_gradient, -1)
    assert options == [True, True]
    for said in together.run(partial_gradient, 1):
        assert "expected one on all ranks, where its placements are not" in said


def mixed() -> list[str]:
    plain = nn.Parameter(torch.ones(6, 8))
    optimizer = dykaf.DyKAF([plain, by_rows(6, 8)], process_group=dist.group.WORLD)
    step_with_ones(optimizer)
    said = said_by(lambda: optimizer.consolidate_state_dict(to=0))
    optimizer.consolidate_state_dict(to=None)
    kinds = [type(s["exp_avg"]).__name__ for s in optimizer.state_dict()["state"].values()]
    return [said, *kinds]


def test_a_group_beside_dtensors(together: Ranks) -> None:
    for said, *kinds in together.run(mixed):
        assert said.startswith("ValueError: to: expected None")
        assert kinds == ["Tensor", "DTensor"]
