"""Accelerate: mixed precision, accumulated gradients, clipping, a schedule and a checkpoint."""

import tempfile

import torch
from accelerate import Accelerator
from tiny import blobs, classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dykaf
from dykaf.integrations.metrics import Monitor


def main() -> list[float]:
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
    loader = DataLoader(TensorDataset(*blobs()), batch_size=16, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    monitor = Monitor(optimizer)
    losses = []
    for _ in range(4):
        for points, label in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(points), label)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.log(monitor.report())
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::16]))
