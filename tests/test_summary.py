"""dykaf.summary: what it says is what a step makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dykaf
from dykaf import DyKAF, param_groups
from dykaf.summary import Row, Summary, summary


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.ones(5, 4, 3))
        self.lora = nn.Linear(128, 2, bias=False)
        self.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)


def step(optimizer: DyKAF) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.randn(param.shape, dtype=param.dtype)
    optimizer.step()


def test_rows() -> None:
    table = summary(DyKAF(param_groups(Model()), lr=0.5, weight_decay=0.25))
    told = [
        (row.name, row.shape, row.count, row.treatment, row.lr, row.weight_decay)
        for row in table.rows
    ]
    assert told == [
        ("blocks.*.weight", (6, 4), 3, "one-sided", 0.5, 0.25),
        ("lora.weight", (2, 128), 1, "rank-32", 0.5, 0.25),
        ("experts.up", (5, 4, 3), 1, "stack of 5, one-sided", 0.5, 0.25),
        ("embed.weight", (11, 4), 1, "AdamW", 1.0, 0.25),
        ("blocks.*.bias", (6,), 3, "AdamW, no decay", 1.0, 0.0),
    ]
    assert [row.num_elements for row in table.rows] == [72, 256, 60, 44, 18]


@pytest.mark.parametrize(
    ("options", "treatment"),
    [
        ({"sides": "both"}, "both sides"),
        ({"sides": "none"}, "no basis"),
        (dykaf.preset("adamw"), "AdamW"),
    ],
)
def test_other_forms(options: dict[str, object], treatment: str) -> None:
    optimizer = DyKAF([nn.Parameter(torch.ones(3, 4))], **options)  # type: ignore[arg-type]
    assert summary(optimizer).rows[0].treatment == treatment


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "bfloat16", "low_precision": "master", "sides": "both"}]
)
def test_state_bytes_are_those_after_a_step(dtype: torch.dtype, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    optimizer = DyKAF(param_groups(Model().to(dtype)), **options)  # type: ignore[arg-type]
    before = summary(optimizer)
    step(optimizer)
    assert before.state_bytes == optimizer.state_bytes()["total"]
    assert summary(optimizer) == before
    group = optimizer.param_groups[0]
    by_name = dict(zip(group["param_names"], group["params"], strict=True))
    names = [f"blocks.{idx}.weight" for idx in range(3)]
    sizes = [t.nbytes for name in names for t in optimizer.state[by_name[name]].values()]
    assert before.rows[0].state_bytes == sum(sizes)


def test_frozen_parameters_and_those_without_a_shape() -> None:
    model = nn.ModuleDict(
        {"lazy": nn.LazyLinear(4, bias=False), "ice": nn.Linear(2, 3, bias=False)}
    )
    model["ice"].requires_grad_(False)
    model.register_parameter("none", nn.Parameter(torch.ones(1, 0, 4)))
    rows = summary(DyKAF(model.named_parameters())).rows
    assert [(row.name, row.treatment, row.state_bytes) for row in rows] == [
        ("none", "no elements", 0),
        ("lazy.weight", "no shape yet", 0),
        ("ice.weight", "frozen", 0),
    ]


def test_numbers_of_blocks() -> None:
    layers = {f"layer_{idx}": nn.Linear(3, 3, bias=False) for idx in range(2)}
    model = nn.ModuleDict({"blocks_1": nn.ModuleDict(layers), "lists": nn.ParameterList()})
    model["lists"].append(nn.Parameter(torch.ones(3, 4)))
    model["blocks_1"].register_parameter("scale_2", nn.Parameter(torch.ones(4, 3)))
    rows = summary(DyKAF(model.named_parameters())).rows
    assert [(row.name, row.count) for row in rows] == [
        ("blocks_*.scale_2", 1),
        ("blocks_*.layer_*.weight", 2),
        ("lists.*", 1),
    ]


def test_names_come_from_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(5, 4, bias=False))
    optimizer = DyKAF(model.parameters())
    assert [row.name for row in summary(optimizer).rows] == ["param_groups[0]"] * 2
    assert [row.name for row in summary(optimizer, model).rows] == ["*.weight"] * 2
    named = DyKAF(model.named_parameters())
    named.add_param_group({"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]})
    last = summary(named).rows[-1]
    assert (last.name, last.count) == ("param_groups[1]", 2)


def test_the_table() -> None:
    rows = [
        Row("blocks.*.weight", (256, 128), 12, "one-sided", 0.016, 0.01, 5 * 2**20),
        Row("scale", (), 1, "AdamW, no decay", 1e-05, 0.0, 12),
    ]
    assert str(Summary(rows)).splitlines() == [
        "parameter        shape      count  treatment           lr  weight decay    state",
        "blocks.*.weight  256 x 128     12  one-sided        0.016          0.01  5.0 MiB",
        "scale            scalar         1  AdamW, no decay  1e-05             0     12 B",
        "393,217 parameters: 393,216 one-sided; 1 AdamW, no decay",
        "state: 5.0 MiB (13.3 bytes each)",
    ]


def test_another_optimizer_is_refused() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="optimizer: expected a DyKAF or FISMO, got AdamW"):
        summary(optimizer)  # type: ignore[arg-type]
