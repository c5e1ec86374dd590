"""Steps within what programs put around them: compiled ones, fake tensors, groups of others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dykaf import DyKAF, param_groups

pytestmark = pytest.mark.usefixtures("each_optimizer")


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


# ---- torch.compile -------------------------------------------------------------------------------


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer, is_compiled: bool) -> list[Tensor]:
    def train(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    torch._dynamo.reset()
    # The backend changes no arithmetic, so that losses can be equal.
    run: Any = torch.compile(train, backend="eager") if is_compiled else train
    inputs = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    return [run(x) for x in inputs]


def _breaks(make: Any) -> list[tuple[str, int]]:
    """Where the graph of a compiled training step breaks: Dynamo's reasons in short, and counts."""
    model = model_of()
    counters.clear()
    _losses(model, make(model), is_compiled=True)
    return sorted((reason.split("\n")[0], n) for reason, n in counters["graph_break"].items())


def test_a_compiled_training_step_has_the_values_of_another() -> None:
    model, twin = model_of(), model_of()
    losses = _losses(model, DyKAF(param_groups(model), lr=0.1), is_compiled=True)
    assert losses == _losses(twin, DyKAF(param_groups(twin), lr=0.1), is_compiled=False)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)


def test_the_graph_breaks_as_with_an_optimizer_of_torch() -> None:
    """At backward(), and around step(), of which nothing is traced."""

    def count(make: Any) -> int:
        return sum(n for _, n in _breaks(make))

    ours = count(lambda model: DyKAF(param_groups(model)))
    assert ours == count(lambda model: torch.optim.SGD(model.parameters()))
    assert ours > 0


def test_a_compiled_training_step_gives_no_warning_of_ours() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _breaks(lambda model: DyKAF(param_groups(model)))
    assert not [str(w.message) for w in caught if "script_method" not in str(w.message)]


# ---- Fake tensors --------------------------------------------------------------------------------


def test_a_step_on_fake_tensors_makes_the_state_of_a_real_one() -> None:
    real = model_of()
    optimizer = DyKAF(param_groups(real))
    real(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    with FakeTensorMode():
        fake = model_of()
        of_fake = DyKAF(param_groups(fake))
        fake(torch.ones(2, 5)).sum().backward()
    of_fake.step()  # outside of the mode
    before = of_fake.state_bytes()
    with fake[0].weight.fake_mode:
        of_fake.step()
    assert of_fake.state_bytes() == before
    assert of_fake.state_bytes() == optimizer.state_bytes()
    for param, other in zip(real.parameters(), fake.parameters(), strict=True):
        state, fake_state = optimizer.state[param], of_fake.state[other]
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in fake_state.items()
        }
        assert all(isinstance(value, FakeTensor) for value in fake_state.values())


def test_fake_parameters_without_a_gradient_get_no_state() -> None:
    with FakeTensorMode():
        optimizer = DyKAF(model_of().parameters())
        optimizer.step()
    assert not optimizer.state


# ---- Groups of others ----------------------------------------------------------------------------


def test_a_group_without_names_joins_named_ones() -> None:
    model, other = model_of(), nn.Linear(3, 2)
    optimizer = DyKAF(param_groups(model))
    optimizer.add_param_group({"params": other.parameters()})
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert optimizer.param_groups[2]["param_names"] == [
        "param_groups[2]['params'][0]",
        "param_groups[2]['params'][1]",
    ]
    assert optimizer.param_groups[2]["params"] == list(other.parameters())
    assert optimizer.param_groups[3]["param_names"] == ["param_groups[3]['params'][0]"]


def test_a_named_group_joins_those_without_names() -> None:
    model, other = model_of(), nn.Linear(3, 2)
    optimizer = DyKAF(model.parameters())
    optimizer.add_param_group({"params": other.named_parameters()})
    taken = DyKAF(nn.Linear(2, 2).named_parameters()).param_groups[0]
    optimizer.add_param_group(dict(taken))
    for group, params in ((1, list(other.parameters())), (2, taken["params"])):
        assert "param_names" not in optimizer.param_groups[group]
        assert optimizer.param_groups[group]["params"] == params
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_an_empty_group_joins_named_ones() -> None:
    optimizer = DyKAF(model_of().named_parameters())
    optimizer.add_param_group({"params": []})
    assert optimizer.param_groups[1]["param_names"] == []


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_a_group_with_other_names_than_parameters_is_refused(names: list[str]) -> None:
    optimizer = DyKAF(model_of().named_parameters())
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"param_names: expected 2 of them, got {len(names)}"):
        optimizer.add_param_group({"params": params, "param_names": names})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("is_named", [False, True])
def test_a_group_half_named_is_refused_as_by_torch(is_named: bool) -> None:
    params = model_of().named_parameters() if is_named else model_of().parameters()
    optimizer = DyKAF(params)
    half = [("a", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="names are missing"):
        optimizer.add_param_group({"params": half})
    assert len(optimizer.param_groups) == 1


def test_a_set_is_refused_as_by_torch() -> None:
    optimizer = DyKAF(model_of().named_parameters())
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.ones(2))}})


# ---- No gradient at all --------------------------------------------------------------------------


def test_a_step_that_finds_no_gradient_says_so() -> None:
    model = model_of()
    model[0].requires_grad_(False)
    optimizer = DyKAF(model.parameters())
    with pytest.warns(UserWarning, match="4 parameters, 2 of which require one") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="4 parameters"):
        exec("optimizer.step()", {"optimizer": optimizer})  # globals without a name
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # it has trained before
