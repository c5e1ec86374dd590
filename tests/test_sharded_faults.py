"""What goes wrong on one rank, and what is missing there, is the same for all."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Died, Ranks
from sharded_models import Model, differing, skip_without_fsdp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dykaf
from dykaf.distributed import exchange


@pytest.fixture(scope="module")
def together() -> Iterator[Ranks]:
    yield from ranks.started()


def local_grad(param: torch.Tensor) -> torch.Tensor:
    grad = param.grad
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad


def step_with_nan(layout: str, policy: str, culprit: int, place: int) -> Any:
    """One parameter's gradient is NaN on one rank."""
    model = Model(layout, nonfinite=policy)
    model.train(0, 3)
    before = model.wholes()
    steps = {k: v["step"].clone() for k, v in model.optimizer.state.items()}
    for param, grad in zip(model.params, model.grads(3), strict=True):
        param.grad = model.place(grad)
    if dist.get_rank() == culprit:
        local_grad(model.params[place]).fill_(float("nan"))
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.optimizer.step()
        except RuntimeError as error:
            said = str(error)
    said += "".join(str(w.message) for w in caught if "skipped" in str(w.message))
    same = all(torch.equal(a, b) for a, b in zip(model.wholes(), before, strict=True))
    kept = all(torch.equal(v["step"], steps[k]) for k, v in model.optimizer.state.items())
    return said, same, kept, model.optimizer.skipped_steps


@pytest.mark.parametrize("layout", ["group", "rows"])
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("place", [1, 3])
def test_a_nan_on_one_rank(together: Ranks, layout: str, culprit: int, place: int) -> None:
    """In a vector's shard and in a matrix's."""
    name = f"param_groups[0]['params'][{place}]"
    found = together.run(step_with_nan, layout, "skip", culprit, place, world=3)
    assert found[0] == found[1] == found[2]
    said, *rest = found[0]
    assert said.startswith(f"gradient of {name}: NaN or infinity; the step was skipped")
    assert rest == [True, True, 1]
    found = together.run(step_with_nan, layout, "raise", culprit, place, world=3)
    assert found[0] == found[1] == found[2]
    said, *rest = found[0]
    assert said.startswith(f"gradient of {name}: expected finite values")
    assert rest == [True, True, 0]
    found = together.run(step_with_nan, layout, "propagate", culprit, place, world=3)
    assert [rest for _, *rest in found] == [[False, False, 0]] * 3


def found_inf_on_one_rank() -> tuple[bool, int]:
    model = Model("rows")
    model.train(0, 2)
    before = model.wholes()
    model.optimizer.found_inf = torch.tensor([float(dist.get_rank() == 1)])
    model.train(2, 3)
    same = all(torch.equal(a, b) for a, b in zip(model.wholes(), before, strict=True))
    return same, model.optimizer.skipped_steps


def test_a_scalers_verdict_on_one_rank(together: Ranks) -> None:
    assert together.run(found_inf_on_one_rank, world=3) == [(True, 1)] * 3


def without_gradients(layout: str, missing: str) -> list[int]:
    """Some gradients are not there: everywhere, on one rank, for some steps."""
    model, alone = Model(layout), Model("")
    for step in range(8):
        for idx, (ours, other) in enumerate(zip(model.params, alone.params, strict=True)):
            grad = model.grads(step)[idx]
            is_out = idx % 3 == 0 and step in (0, 4)
            ours.grad = model.place(grad)
            other.grad = grad
            if is_out and missing == "everywhere":
                ours.grad = other.grad = None
            elif is_out:
                # As zeros from rank 1, and for all of a group's copies where rank 1 would send it.
                whole = torch.zeros_like(grad) if layout == "group" else grad.clone()
                if layout == "rows":
                    local = model.place(torch.arange(len(grad)).float())
                    assert isinstance(local, DTensor)
                    mine = local.to_local().long()
                    held: list[Any] = [None] * dist.get_world_size()
                    dist.all_gather_object(held, mine.tolist())
                    whole[held[1]] = 0
                other.grad = whole
                if layout == "group":
                    ours.grad = model.place(whole)
                if dist.get_rank() == 1:
                    ours.grad = None
        model.optimizer.step()
        alone.optimizer.step()
    return differing(model.wholes(), alone.wholes())


@pytest.mark.parametrize("layout", ["group", "rows"])
@pytest.mark.parametrize("missing", ["everywhere", "on one rank"])
def test_gradients_that_are_not_there(together: Ranks, layout: str, missing: str) -> None:
    assert together.run(without_gradients, layout, missing, world=3) == [[]] * 3


def owners_agree() -> list[tuple[int, ...]]:
    model = Model("rows")
    model.train(0, 1)
    plan = model.optimizer._sharing.plan  # type: ignore[attr-defined]
    return [spread.owners for spread in plan.by_id.values()]


def test_owners_are_the_same_on_all_ranks(together: Ranks) -> None:
    found = together.run(owners_agree, world=3)
    assert found[0] == found[1] == found[2]
    assert {owner for owners in found[0] for owner in owners} == {0, 1, 2}


def step_with_other_shapes() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = [4, 6] if dist.get_rank() == 1 else [4, 4]
    params = [nn.Parameter(distribute_tensor(torch.ones(n, 4), mesh, [Shard(0)])) for n in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    dykaf.DyKAF([("first", params[0]), ("second", params[1])]).step()


def test_a_rank_with_other_parameters(together: Ranks) -> None:
    found = together.outcomes(step_with_other_shapes, world=3)
    for is_good, said in found:
        assert not is_good
        assert "RuntimeError: optimizer on 3 ranks: expected the same parameters on all" in said
        assert "on rank 0: parameter 1, second: torch.float32 (4, 4)" in said
        assert "on rank 1: parameter 1, second: torch.float32 (6, 4)" in said


def die_within_a_step() -> None:
    model = Model("rows")
    model.train(0, 3)
    if dist.get_rank() == 1:
        exchange.BucketStep.send_updates = lambda self: os._exit(3)  # type: ignore[method-assign]
    model.train(3, 4)


def test_a_rank_that_is_killed_within_a_step(together: Ranks) -> None:
    """The others raise; none waits for ever."""
    found = together.outcomes(die_within_a_step, world=3, group_timeout=5)
    assert found[1] == (False, "the process ended, exit code 3")
    for is_good, said in found[::2]:
        assert not is_good
        assert re.search(r"Timed out|Connection (closed|reset)", said), said


class NoMemory:
    """dykaf._C whose step fails on one rank, as it does when memory ends."""

    def __init__(self, real: Any, at: int) -> None:
        self._real, self._left = real, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Jobs(self, jobs: Any) -> Any:
        self._left -= 1
        if self._left < 0 and any(job.options["lr"] == -1 for job in jobs):
            raise MemoryError("no memory")
        return self._real.Jobs(jobs)


def step_without_memory() -> tuple[str, str, list[int], list[int]]:
    """The owner of some matrices cannot update them: all hear of it, and of nothing else."""
    model, alone = Model("rows"), Model("")
    model.train(0, 3)
    alone.train(0, 3)
    real = dykaf.ops._C
    if dist.get_rank() == 1:
        dykaf.ops._C = NoMemory(real, 0)
    before, said, cause = model.wholes(), "", ""
    try:
        model.train(3, 4)
    except RuntimeError as error:
        said, cause = str(error), repr(error.__cause__)
    dykaf.ops._C = real
    alone.train(3, 4)
    stayed = [i for i, (a, b) in enumerate(zip(model.wholes(), before, strict=True)) if a.equal(b)]
    # What stayed has its gradient again; all else goes on as it would.
    others = [i for i in differing(model.wholes(), alone.wholes()) if i not in stayed]
    return said, cause, stayed, others


def test_an_owner_without_memory(together: Ranks) -> None:
    found = together.run(step_without_memory, world=3)
    said, cause, stayed, others = found[1]
    assert cause == "MemoryError('no memory')"
    assert stayed, said
    for place in stayed:
        assert f"param_groups[0]['params'][{place}]" in said or place >= 10
    assert "which are as before" in said
    assert [rest for _, _, *rest in found] == [[stayed, others]] * 3
    assert all("could not update" in said for said, *_ in found)


def cut_in_three_dimensions(dtype: torch.dtype) -> str:
    model = Model("second and third", dtype=dtype)
    before = model.wholes()
    try:
        model.train(0, 2)
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(model.wholes(), before, strict=True))
        return str(error)
    return ""


def test_shards_that_rounding_cannot_place(together: Ranks) -> None:
    """Refused before anything has changed, and only where something is rounded."""
    for said in together.run(cut_in_three_dimensions, torch.bfloat16, world=4):
        assert "param_groups[0]['params'][7]: expected shards that are cut in at most two" in said
    assert together.run(cut_in_three_dimensions, torch.float32, world=4) == [""] * 4


def added_later() -> list[int]:
    """A group that comes after steps: owners stay, state stays."""
    model, alone = Model("rows"), Model("")
    for some in (model, alone):
        some.train(0, 4)
        generator = torch.Generator().manual_seed(9)
        late = nn.Parameter(some.place(torch.randn(14, 6, generator=generator)))
        some.params.append(late)
        some.optimizer.add_param_group({"params": [late], "lr": 1e-3})
    for step in range(4, 10):
        generator = torch.Generator().manual_seed(step)
        whole = torch.randn(14, 6, generator=generator)
        for some in (model, alone):
            some.params[-1].grad = some.place(whole)
            for param, grad in zip(some.params[:-1], some.grads(step), strict=True):
                param.grad = some.place(grad)
            some.optimizer.step()
    return differing(model.wholes(), alone.wholes())


def test_a_group_added_after_steps(together: Ranks) -> None:
    assert together.run(added_later, world=3) == [[]] * 3


def made_before_sharding(what: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Linear(8, 8)
    optimizer = dykaf.DyKAF(model.parameters())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if what == "fully_shard":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, ColwiseParallel())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("what", ["fully_shard", "parallelize_module"])
def test_an_optimizer_made_before_sharding(together: Ranks, what: str) -> None:
    skip_without_fsdp(what)
    for is_good, said in together.outcomes(made_before_sharding, what):
        assert not is_good
        assert "make the optimizer after them" in said


def test_flattened_parameters_are_refused() -> None:
    for mark in ("_is_flat_param", "_fsdp_flattened"):
        param = nn.Parameter(torch.ones(12))
        setattr(param, mark, True)
        with pytest.raises(ValueError, match=r"^w: .*FullyShardedDataParallel.*fully_shard"):
            dykaf.DyKAF([("w", param)])


def with_zero_redundancy() -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ZeroRedundancyOptimizer(nn.Linear(4, 4).parameters(), optimizer_class=dykaf.DyKAF)
    return [str(w.message) for w in caught if "process_group=" in str(w.message)]


def with_groups_of_zero_redundancy() -> tuple[bool, bool]:
    """Whether groups with and without names make one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    made = []
    for named in (True, False):
        groups = dykaf.param_groups(nn.Linear(4, 4), named=named)
        try:
            ZeroRedundancyOptimizer(groups, optimizer_class=dykaf.DyKAF, lr=0.1)
            made.append(True)
        except (AttributeError, TypeError):
            made.append(False)
    return made[0], made[1]


def test_zero_redundancy_takes_groups_without_names(together: Ranks) -> None:
    """It refuses names, of whatever optimizer: so `param_groups(named=False)`."""
    assert together.run(with_groups_of_zero_redundancy) == [(False, True)] * 2


def test_zero_redundancy_gets_a_warning(together: Ranks) -> None:
    for said in together.run(with_zero_redundancy):
        assert len(said) == 1


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(100)


def test_a_case_that_hangs_is_ended_with_stacks() -> None:
    """Of the harness: the ranks that wait are named by their stacks, and are gone after it."""
    some = Ranks()
    with pytest.raises(Died, match=r"no end after 3 s; the stacks:(.|\n)*rank 1\n(.|\n)*in hang"):
        some.run(hang, world=2, timeout=3)
    assert some.run(dist.get_rank, world=2) == [0, 1]
    some.stop()
