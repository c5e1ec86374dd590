"""A small mixture of experts: stacks of experts as stacks, flattened, and AdamW.

    pip install transformers==5.24.0
    python -m bench.experts                        # 3 seeds, about 4 minutes of one core

Current transformers keep the experts of a layer in one parameter, [experts, rows, columns]. This
is transformers' Qwen3-MoE, small, on the bytes of Shakespeare (bench.evidence). Every form gets its
rate from the same list by a seed that is not reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dykaf
from bench.evidence.tasks.byte_lm import held_out_windows, load, sample_batch
from bench.machine import machine

TUNING_SEED = 1000
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
WEIGHT_DECAY = 0.01
CONTEXT, BATCH, NUM_WINDOWS = 64, 8, 256


def make_model() -> nn.Module:
    """Four layers of eight experts, two of which a byte goes to."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
    )
    return Qwen3MoeForCausalLM(config)


def stacks(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The defaults."""
    return dykaf.DyKAF(dykaf.param_groups(model), lr=lr, weight_decay=WEIGHT_DECAY)


def flattened(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """A matrix per tensor: experts by the rest."""
    groups = dykaf.param_groups(model, matrix_options={"batch_dims": 0})
    return dykaf.DyKAF(groups, lr=lr, weight_decay=WEIGHT_DECAY)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """torch's, of the betas that the evidence gives it."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )


FORMS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "dykaf, stacks of experts (default)": stacks,
    "dykaf, batch_dims=0": flattened,
    "AdamW": adamw,
}


def train(make: Callable[..., Any], lr: float, seed: int, num_steps: int) -> float:
    """Held-out loss in nats per byte; the rate decays to zero by a half cosine."""
    data, validation, _ = load("shakespeare")
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make(model, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    sampler = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, sample_batch(data, BATCH, CONTEXT, sampler)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    role = "tune" if seed == TUNING_SEED else "report"
    windows = held_out_windows(validation, NUM_WINDOWS, CONTEXT, role)
    with torch.no_grad():
        return statistics.fmean(loss_of(model, some).item() for some in windows.split(64))


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Of the next byte."""
    logits = model(input_ids=windows[:, :-1].long()).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten().long())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name, value in machine("cpu").items():
        print(f"{name}: {value}")
    print(dykaf.summary(stacks(make_model(), RATES[0])))
    print(f"{options.steps} steps, nats per byte:")
    first: list[float] = []
    for name, make in FORMS.items():
        tuned = {lr: train(make, lr, TUNING_SEED, options.steps) for lr in RATES}
        lr = min(tuned, key=tuned.__getitem__)
        losses = [train(make, lr, seed, options.steps) for seed in range(options.seeds)]
        first = first or losses
        pairs = [loss - other for loss, other in zip(losses, first, strict=True)]
        print(
            f"{name:<36}lr {lr:<7g}{statistics.fmean(losses):.3f}; over the first "
            f"{statistics.fmean(pairs):+.3f} ({min(pairs):+.3f} to {max(pairs):+.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
