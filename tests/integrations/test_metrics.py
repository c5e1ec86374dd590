"""The numbers for a logger: sums, medians, and the share of the time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tiny import blobs, classifier
from torch import nn

import dykaf
from dykaf.integrations import metrics
from dykaf.integrations.metrics import Monitor, summarize


def test_summary_of_a_report_made_by_hand() -> None:
    report: dict[str, dict[str, Any]] = {
        "optimizer": {"skipped_steps": 3},
        "a": {
            "update_rms": 0.5,
            "staleness_L": 0.1,
            "condition_L": 7.0,
            "staleness_R": 0.6,
            "condition_R": 2.0,
            "refresh_fallbacks": 2.0,
        },
        "b": {
            "update_rms": 0.25,
            "staleness_R": 0.3,
            "condition_R": 90.0,
            "refresh_fallbacks": 1.0,
        },
        "bias": {"update_rms": 4.0},
    }
    assert summarize(report) == {
        "skipped_steps": 3.0,
        "refresh_fallbacks": 3.0,
        "staleness_max": 0.6,
        "staleness_median": 0.3,
        "condition_max": 90.0,
        "update_rms_max": 4.0,
        "update_rms_median": 0.5,
    }


def test_summary_without_state_or_factors() -> None:
    nothing = {"skipped_steps": 0.0, "refresh_fallbacks": 0.0}
    assert summarize({"optimizer": {"skipped_steps": 0}}) == nothing
    vector = {"optimizer": {"skipped_steps": 0}, "bias": {"update_rms": 2.0}}
    assert summarize(vector) == {**nothing, "update_rms_max": 2.0, "update_rms_median": 2.0}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class SlowDyKAF(dykaf.DyKAF):
    """A step takes three seconds."""

    clock: Clock

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.now += 3
        return loss


@pytest.mark.parametrize("how", ["alone", "closure", "closure by name"])
def test_step_time_share(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that takes 5 seconds, within the closure or before."""
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(SlowDyKAF, "clock", clock, raising=False)
    model = nn.Linear(4, 3)
    optimizer = SlowDyKAF(model.parameters())
    monitor = Monitor(optimizer)

    def run_model() -> torch.Tensor:
        clock.now += 5
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for num_steps in (2, 1):  # the second report knows nothing of the first one's steps
        for _ in range(num_steps):
            if how == "alone":
                run_model()
                optimizer.step()
            else:
                loss = (
                    optimizer.step(run_model)
                    if how == "closure"
                    else optimizer.step(closure=run_model)
                )
                assert isinstance(loss, torch.Tensor)
        clock.now += 2
        expected = 3 * num_steps / (8 * num_steps + 2)
        assert monitor.report()["dykaf/step_time_share"] == pytest.approx(expected)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int) -> None:
    points, label = blobs(32)
    for _ in range(num_steps):
        nn.functional.cross_entropy(model(points), label).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_report_says_what_diagnostics_say() -> None:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model))
    start = time.perf_counter()
    monitor = Monitor(optimizer, prefix="x.")
    train(optimizer, model, 3)
    report = monitor.report()
    assert 0 < report.pop("x.step_time_share") < 1
    assert time.perf_counter() > start
    said = optimizer.diagnostics()
    staleness = [entry["staleness_L"] for entry in said.values() if "staleness_L" in entry]
    staleness += [entry["staleness_R"] for entry in said.values() if "staleness_R" in entry]
    assert len(staleness) >= 2
    assert report["x.staleness_max"] == max(staleness)
    assert report == {f"x.{name}": value for name, value in summarize(said).items()}


def test_skipped_steps_are_reported() -> None:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model))
    monitor = Monitor(optimizer)
    next(model.parameters()).grad = torch.full((32, 16), torch.nan)
    with pytest.warns(UserWarning):
        optimizer.step()
    assert monitor.report()["dykaf/skipped_steps"] == 1


def test_a_monitor_changes_no_bit_and_can_leave() -> None:
    finals = []
    for is_watched in (True, False):
        model = classifier()
        optimizer = dykaf.DyKAF(dykaf.param_groups(model))
        if is_watched:
            monitor = Monitor(optimizer)
            train(optimizer, model, 3)
            monitor.report()
            monitor.close()
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
        else:
            train(optimizer, model, 3)
        train(optimizer, model, 3)
        finals.append([param.detach() for param in model.parameters()])
    assert all(map(torch.equal, *finals))


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a DyKAF or FISMO, got AdamW"):
        Monitor(torch.optim.AdamW(nn.Linear(2, 2).parameters()))
