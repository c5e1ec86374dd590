"""python -m bench.experts: its forms, and one short run by hand."""

from __future__ import annotations

import statistics

import pytest
import torch
from bench import experts
from bench.evidence.tasks.byte_lm import held_out_windows, sample_batch
from torch import nn

import dykaf

DATA = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_stacks_are_stacks_in_one_form_alone() -> None:
    def treatments(name: str) -> set[str]:
        optimizer = experts.FORMS[name](experts.make_model(), 0.01)
        rows = dykaf.summary(optimizer).rows
        return {row.treatment for row in rows if "experts" in row.name}

    default, flattened, _ = experts.FORMS
    assert treatments(default) == {"stack of 8, one-sided"}
    assert not any("stack" in treatment for treatment in treatments(flattened))


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "load", lambda task: (DATA, DATA, ""))
    torch.manual_seed(0)
    model = experts.make_model()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.01, weight_decay=0.01)
    rates = [[group["lr"] for group in optimizer.param_groups]]
    sampler = torch.Generator().manual_seed(0)
    for factor in (1.0, 0.5):  # half a cosine over two steps
        for group, lr in zip(optimizer.param_groups, rates[0], strict=True):
            group["lr"] = lr * factor
        windows = sample_batch(DATA, experts.BATCH, experts.CONTEXT, sampler).long()
        logits = model(input_ids=windows[:, :-1]).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.mT, windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held_out = held_out_windows(DATA, experts.NUM_WINDOWS, experts.CONTEXT, "report")
    with torch.no_grad():
        expected = statistics.fmean(
            nn.functional.cross_entropy(
                model(input_ids=some[:, :-1].long()).logits.mT, some[:, 1:].long()
            ).item()
            for some in held_out.split(64)
        )
    # float32 losses of about 5.5, summed in another order
    assert experts.train(experts.stacks, 0.01, 0, 2) == pytest.approx(expected, abs=1e-4)
