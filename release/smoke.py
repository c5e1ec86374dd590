"""Trains a small model with the dykaf that is installed, and prints its version and that of torch.

It needs nothing but dykaf and torch, and stops with an error where something is wrong.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import dykaf

NUM_STEPS = 60


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error."""
    return nn.functional.mse_loss(model(inputs), targets)


def train(
    model: nn.Module, optimizer: dykaf.DyKAF, data: tuple[Tensor, Tensor], num_steps: int
) -> None:
    """Takes some steps on all data."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, *data).backward()
        optimizer.step()


def main() -> None:
    """Trains to below a quarter of the loss, and the second half once more from a checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))
    inputs = torch.randn(64, 12)
    data = inputs, torch.tanh(inputs @ torch.randn(12, 5))
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.02)

    first = loss_of(model, *data).item()
    train(model, optimizer, data, NUM_STEPS // 2)
    resumed = copy.deepcopy(model)
    at_half = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data, NUM_STEPS // 2)
    last = loss_of(model, *data).item()
    if not last < first / 4:
        raise SystemExit(f"the loss went from {first:.4f} to {last:.4f}, expected below a quarter")

    optimizer = dykaf.DyKAF(dykaf.param_groups(resumed), lr=0.02)
    optimizer.load_state_dict(at_half)
    train(resumed, optimizer, data, NUM_STEPS // 2)
    if not all(map(torch.equal, model.parameters(), resumed.parameters())):
        raise SystemExit("a resumed run ended with other weights")
    print(f"dykaf {dykaf.__version__}, torch {torch.__version__}, loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
