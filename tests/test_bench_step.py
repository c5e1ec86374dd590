"""What the optimizers of `python -m bench step` do in the steps that it measures."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import optimizers, step
from bench.shapes import SHAPE_SETS

import dykaf


@pytest.mark.parametrize("name", ["dykaf-both", "dykaf-fixed", "fismo"])
def test_a_measured_period_has_one_refresh_of_each_basis(name: str) -> None:
    run_ = step.SetRun(SHAPE_SETS["gpt2"].workload("tiny"), [name], "cpu")
    run_.run(0, lambda: None)
    optimizer = run_.optimizers[name]
    states = [state for state in optimizer.state.values() if "refreshes" in state]

    def refreshes() -> torch.Tensor:
        return torch.cat([state["refreshes"].flatten() for state in states])

    counts = [refreshes()]
    for _ in range(optimizers.PRECONDITION_FREQUENCY):
        optimizer.step()
        counts.append(refreshes())
    bases = sum(f"Q_{side}" in state for state in states for side in "LR")
    assert (counts[-1] - counts[0]).max() == 1 and (counts[-1] - counts[0]).sum() == bases >= 4
    most = max(int((after - before).sum()) for before, after in itertools.pairwise(counts))
    assert most == bases if name == "dykaf-fixed" else most <= bases / 2


def test_state_bytes_agree_with_the_optimizers_own() -> None:
    workload = SHAPE_SETS["moe"].workload("tiny")
    run_ = step.SetRun(workload, ["dykaf-ksl"], "cpu")
    run_.run(0, lambda: None)
    optimizer = run_.optimizers["dykaf-ksl"]
    assert isinstance(optimizer, dykaf.DyKAF)
    own = optimizer.state_bytes()
    counted = optimizers.state_bytes(optimizer)
    for kind in ("exp_avg", "exp_avg_sq", "factors", "bases", "total"):
        assert counted[kind] == own[kind]
