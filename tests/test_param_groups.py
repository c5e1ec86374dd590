"""Which parameter goes where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import run
from torch import Tensor, nn

from dykaf import DyKAF, param_groups
from dykaf.routing import HEAD_LAYER_NAMES, HEAD_WORDS


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.block = nn.ModuleDict(
            {
                "norm": nn.LayerNorm([3, 4]),
                "mlp": nn.Linear(4, 4),
                "attention": nn.MultiheadAttention(4, 2),
            }
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(2, 3))
        self.lm_head = nn.Linear(4, 11, bias=True)
        if tied:
            self.lm_head.weight = self.embed.weight


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


MATRICES = [
    "table",
    "conv.weight",
    "block.mlp.weight",
    "block.attention.in_proj_weight",
    "block.attention.out_proj.weight",
]
ADAM = ["embed.weight", "lm_head.weight"]
NO_DECAY = [
    "scale",
    "conv.bias",
    "block.norm.weight",
    "block.norm.bias",
    "block.mlp.bias",
    "block.attention.in_proj_bias",
    "block.attention.out_proj.bias",
    "lm_head.bias",
]


def test_the_rules() -> None:
    model = Model()
    groups = param_groups(model)
    assert [set(group) for group in names(groups)] == [set(MATRICES), set(ADAM), set(NO_DECAY)]
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == [
        {},
        {"max_precond_dim": 0, "lr_ratio": 2.0},
        {"max_precond_dim": 0, "lr_ratio": 2.0, "weight_decay": 0.0},
    ]
    by_name = dict(model.named_parameters())
    for group in groups:
        assert all(by_name[name] is param for name, param in group["params"])


def test_the_optimizer_takes_them() -> None:
    model = Model()
    optimizer = DyKAF(param_groups(model, adam_lr_ratio=4.0), lr=0.25, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1.0, 1.0]
    assert not any("lr_ratio" in group for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [group["max_precond_dim"] for group in optimizer.param_groups] == [10000, 0, 0]
    run(optimizer, range(3))
    report = optimizer.diagnostics()
    assert set(report) == {"optimizer", *MATRICES, *ADAM, *NO_DECAY}
    assert {name for name, entries in report.items() if "rho" in entries} == set(MATRICES)


def test_order_is_that_of_the_model() -> None:
    order = [name for name, _ in Model().named_parameters()]
    for group in names(param_groups(Model())):
        assert group == [name for name in order if name in group]


@pytest.mark.parametrize("head", sorted({*HEAD_LAYER_NAMES, *HEAD_WORDS, "lm_head"}))
def test_heads_are_known_by_name(head: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "out": nn.ModuleDict({head: nn.Linear(3, 2)})})
    groups = names(param_groups(model))
    assert groups[1] == [f"out.{head}.weight"]
    assert groups[0] == ["body.weight"]


def test_what_is_no_head() -> None:
    model = nn.ModuleDict(
        {
            "head": nn.Conv1d(3, 3, 2),
            "headline": nn.Linear(3, 3),
            "overhead": nn.Linear(3, 3),
            "conv_head": nn.Linear(3, 3),
            "head_list": nn.ModuleList([nn.Linear(3, 3)]),
        }
    )
    assert names(param_groups(model))[0] == [
        "head.weight",
        "headline.weight",
        "overhead.weight",
        "conv_head.weight",
        "head_list.0.weight",
    ]


def test_embedding_bags_and_norms() -> None:
    model = nn.ModuleDict(
        {
            "bag": nn.EmbeddingBag(5, 3),
            "batch": nn.BatchNorm1d(3),
            "group": nn.GroupNorm(1, 3),
            "rms": nn.RMSNorm([2, 3]),
            "instance": nn.InstanceNorm1d(3, affine=True),
        }
    )
    groups = param_groups(model)
    assert names(groups) == [
        ["bag.weight"],
        [
            "batch.weight",
            "batch.bias",
            "group.weight",
            "group.bias",
            "rms.weight",
            "instance.weight",
            "instance.bias",
        ],
    ]
    assert groups[0]["max_precond_dim"] == 0 and "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0.0


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5, 1, 1))


def test_vectors_with_dimensions_of_size_one_are_vectors() -> None:
    model = nn.ModuleDict(
        {
            "scale": LayerScale(),
            "attention": nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False)),
            "to_one": nn.Linear(4, 1, bias=False),
            "grouped": nn.Conv1d(4, 4, 1, groups=2, bias=False),
        }
    )
    assert names(param_groups(model)) == [
        [
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "normed.parametrizations.weight.original1",
            "grouped.weight",
        ],
        ["to_one.weight"],
        [
            "scale.gain",
            "attention.bias_k",
            "attention.bias_v",
            "normed.parametrizations.weight.original0",
        ],
    ]


def test_a_pattern_may_name_a_tied_parameter_by_any_of_its_names() -> None:
    for name in ("embed.weight", "lm_head.weight"):
        groups = param_groups(Model(tied=True), precondition=[name])
        assert "embed.weight" in names(groups)[0]
        assert "lm_head.weight" not in names(groups)[0]


def test_a_tied_head_is_one_parameter_under_its_first_name() -> None:
    groups = param_groups(Model(tied=True))
    assert names(groups)[1] == ["embed.weight"]
    parameters = [param for group in groups for _, param in group["params"]]
    assert len(parameters) == len({id(param) for param in parameters})


def test_a_matrix_tied_to_a_later_head_is_a_head() -> None:
    """The role counts under whichever name it is met."""
    model = nn.ModuleDict({"mlp": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3, bias=False)})
    model["head"].weight = model["mlp"].weight
    assert names(param_groups(model)) == [["mlp.weight"]]
    assert param_groups(model)[0]["max_precond_dim"] == 0


def test_a_module_used_twice_counts_once() -> None:
    layer = nn.Linear(3, 3)
    groups = names(param_groups(nn.Sequential(layer, nn.ReLU(), layer)))
    assert groups == [["0.weight"], ["0.bias"]]


def test_a_module_that_is_also_a_head_is_a_head() -> None:
    layer = nn.Linear(3, 3, bias=False)
    groups = param_groups(nn.ModuleDict({"mlp": layer, "head": layer}))
    assert names(groups) == [["mlp.weight"]]
    assert groups[0]["max_precond_dim"] == 0


def test_parameters_of_the_model_itself() -> None:
    layer = nn.Linear(3, 3)
    assert names(param_groups(layer)) == [["weight"], ["bias"]]


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.embed.weight.requires_grad_(False)
    model.block["mlp"].requires_grad_(False)
    left = {name for group in names(param_groups(model)) for name in group}
    assert left == {*MATRICES, *ADAM, *NO_DECAY} - {
        "embed.weight",
        "block.mlp.weight",
        "block.mlp.bias",
    }


def test_empty_groups_are_left_out() -> None:
    assert names(param_groups(nn.Linear(3, 3, bias=False))) == [["weight"]]
    assert param_groups(nn.ReLU()) == []
    assert names(param_groups(nn.LayerNorm(3))) == [["weight", "bias"]]


# ---- Patterns ------------------------------------------------------------------------------------


def _group_of(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (group,) = [group for group in groups if name in [each for each, _ in group["params"]]]
    return group


def test_adam_pattern() -> None:
    groups = param_groups(Model(), adam=["block.attention.*", "table"])
    assert set(names(groups)[0]) == {"conv.weight", "block.mlp.weight"}
    assert _group_of(groups, "table")["max_precond_dim"] == 0
    # Biases stay without decay.
    assert _group_of(groups, "block.attention.in_proj_bias")["weight_decay"] == 0.0


def test_precondition_wins_over_rules_and_adam() -> None:
    groups = param_groups(
        Model(), adam=["*.weight"], precondition=["lm_head.weight", "block.norm.weight"]
    )
    assert set(names(groups)[0]) == {
        "table",
        "block.attention.in_proj_weight",
        "lm_head.weight",
        "block.norm.weight",
    }


def test_no_decay_wins_over_all() -> None:
    groups = param_groups(
        Model(), adam=["embed.*"], precondition=["embed.*", "conv.*"], no_decay=["embed.*"]
    )
    assert _group_of(groups, "embed.weight") == groups[2]
    assert _group_of(groups, "conv.bias") == groups[0]


@pytest.mark.parametrize("argument", ["adam", "precondition", "no_decay"])
@pytest.mark.parametrize("pattern", ["nothing.*", "EMBED.weight", "embed", ""])
def test_a_pattern_that_matches_nothing_is_an_error(argument: str, pattern: str) -> None:
    with pytest.raises(ValueError) as caught:
        param_groups(Model(), **{argument: ["embed.weight", pattern]})
    assert str(caught.value) == (
        f"pattern {pattern!r}: expected to match a parameter of the model, "
        "got no match among 15 names"
    )


def test_patterns_may_be_iterators() -> None:
    groups = param_groups(Model(), adam=iter(["table"]), no_decay=(name for name in ["conv.*"]))
    assert _group_of(groups, "table")["max_precond_dim"] == 0
    assert _group_of(groups, "conv.weight")["weight_decay"] == 0.0


# ---- Options -------------------------------------------------------------------------------------


def test_options_of_the_groups() -> None:
    groups = param_groups(
        Model(),
        matrix_options={"weight_decay": 0.2, "integrator": "bug"},
        adam_options={"lr": 1e-4, "max_precond_dim": 7},
        no_decay_options={"betas": (0.8, 0.9), "weight_decay": 0.05},
    )
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == [
        {"weight_decay": 0.2, "integrator": "bug"},
        {"lr": 1e-4, "lr_ratio": 2.0, "max_precond_dim": 7},
        {"betas": (0.8, 0.9), "lr_ratio": 2.0, "weight_decay": 0.05, "max_precond_dim": 0},
    ]
    optimizer = DyKAF(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1e-4, 0.2]
    assert optimizer.param_groups[0]["integrator"] == "bug"


@pytest.mark.parametrize("ratio", [-1.0, float("inf"), float("nan"), "2", None, True])
def test_a_ratio_that_is_none(ratio: Any) -> None:
    message = f"lr_ratio: expected a finite number >= 0, got {ratio!r}"
    with pytest.raises(ValueError) as caught:
        DyKAF(param_groups(Model(), adam_lr_ratio=ratio))
    assert str(caught.value) == message


def test_groups_are_independent_of_the_arguments() -> None:
    options = {"lr": 0.5}
    groups = param_groups(Model(), matrix_options=options)
    groups[0]["lr"] = 0.1
    assert options == {"lr": 0.5}


def test_a_step_trains_every_group() -> None:
    model = Model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = DyKAF(param_groups(model), lr=0.1)
    run(optimizer, range(3))

    def moved(param: Tensor, old: Tensor) -> bool:
        return not torch.equal(param.detach(), old)

    assert all(moved(param, before[name]) for name, param in model.named_parameters())
