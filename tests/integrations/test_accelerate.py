"""Accelerate: accumulated gradients, clipping, a schedule and checkpoints, to a loop's bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranks import Ranks, started
from runs import assert_equal, weights
from tiny import blobs, classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dykaf
from dykaf.integrations.metrics import Monitor, summarize

LR, CLIP, STEPS, ACCUMULATE = 0.01, 0.05, 6, 2
POINTS, LABEL = blobs(8 * STEPS * ACCUMULATE)
BATCHES = list(zip(POINTS.split(8), LABEL.split(8), strict=True))


def make() -> tuple[nn.Module, dykaf.DyKAF, Any]:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=LR)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def by_hand(is_bf16: bool) -> nn.Module:
    model, optimizer, schedule = make()
    for step in range(STEPS):
        for points, label in BATCHES[ACCUMULATE * step : ACCUMULATE * (step + 1)]:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                output = model(points)
            loss = nn.functional.cross_entropy(output.float(), label)
            (loss / ACCUMULATE).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def accelerated(
    precision: str, batches: slice, load: Path | None = None, save: Path | None = None
) -> nn.Module:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATE
    )
    data = TensorDataset(POINTS, LABEL)
    model, optimizer, schedule, loader = accelerator.prepare(
        *make(), DataLoader(data, batch_size=8)
    )
    if load is not None:
        accelerator.load_state(load)
    monitor = Monitor(optimizer)
    for points, label in list(loader)[batches]:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(points), label))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    said = summarize(optimizer.optimizer.diagnostics())
    report = monitor.report()
    assert 0 < report.pop("dykaf/step_time_share") < 1
    assert report == {f"dykaf/{name}": value for name, value in said.items()}
    if save is not None:
        accelerator.save_state(save)
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equals_a_loop_by_hand_and_goes_on(precision: str, tmp_path: Path) -> None:
    expected = weights(by_hand(precision == "bf16"))
    assert_equal(weights(accelerated(precision, slice(None))), expected)
    accelerated(precision, slice(6), save=tmp_path)
    assert_equal(weights(accelerated(precision, slice(6, None), load=tmp_path)), expected)


def in_parallel() -> dict[str, Tensor]:
    """Half of each batch on a rank of DistributedDataParallel."""
    rank = str(dist.get_rank())
    # What a launcher would set; the group is there already, and no address is looked up.
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    accelerator = Accelerator(cpu=True)
    model, optimizer, _ = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    assert type(model) is nn.parallel.DistributedDataParallel
    for points, label in BATCHES:
        half = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
        accelerator.backward(nn.functional.cross_entropy(model(points[half]), label[half]))
        optimizer.step()
        optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield from started()


def test_two_processes_equal_one(ranks: Ranks) -> None:
    """Which adds the halves' gradients; to halve is exact."""
    model, optimizer, _ = make()
    for points, label in BATCHES:
        for half in (slice(4), slice(4, 8)):
            (nn.functional.cross_entropy(model(points[half]), label[half]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks.run(in_parallel, world=2):
        assert_equal(found, weights(model))
