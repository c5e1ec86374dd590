"""python -m bench memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import memory
from bench.__main__ import main
from bench.optimizers import SPECS
from bench.shapes import SHAPE_SETS, Matrix
from torch import nn

from dykaf import DyKAF


@pytest.mark.parametrize("mode", memory.MODES)
@pytest.mark.parametrize("name", ["gpt2", "moe", "lora"])
def test_the_count_is_what_an_optimizer_holds(mode: str, name: str) -> None:
    workload = SHAPE_SETS[name].workload("tiny")
    options = {"max_precond_dim": workload.max_precond_dim, **memory.MODES[mode]}
    groups = [
        {"params": [nn.Parameter(torch.zeros(shape))], "batch_dims": len(shape) - 2}
        for shape in workload.shapes
    ]
    optimizer = DyKAF(groups, **options)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    optimizer.step()
    assert memory.state_bytes(workload, memory.MODES[mode]) == optimizer.state_bytes()["total"]


def test_soap_is_what_the_textbook_form_holds() -> None:
    """But for the count of steps."""
    params = [nn.Parameter(torch.ones(6, 10))]
    optimizer = SPECS["textbook-soap"].make(params, 8)
    params[0].grad = torch.randn(6, 10)
    for _ in range(2):
        optimizer.step()
    held = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    matrix = Matrix(6, 10, left=True, right=False, num_matrices=1)
    assert memory.soap_numbers(matrix) == sum(value.numel() for value in held)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    arguments = ["memory", "--size", "full", "--sets", "block", "lora8", "--json", str(path)]
    assert main(arguments) == 0
    rows = {row["mode"]: row for row in json.loads(path.read_text())["records"]}
    assert rows["AdamW"] == {"mode": "AdamW", "block": 8.0, "lora8": 8.0}
    # 16 x 2 matrices: moments, and of either side a factor and a basis
    soap = 4 * (2 * 8 * 4096 + 2 * (64 + 4096**2)) / (8 * 4096)
    assert rows["SOAP"]["lora8"] == pytest.approx(soap)
    assert "| SOAP | 38.7 | 4104.0 |" in capsys.readouterr().out
