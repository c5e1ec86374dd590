"""torch alone: torch.compile, mixed precision, a moving average of the weights."""

import torch
from tiny import blobs, classifier
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dykaf
from dykaf.integrations.metrics import Monitor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16  # which needs no scaler


def main() -> list[float]:
    model = classifier().to(DEVICE)
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.01)
    compiled = torch.compile(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = torch.amp.GradScaler(DEVICE, enabled=DEVICE == "cuda")
    monitor = Monitor(optimizer)
    points, label = (part.to(DEVICE) for part in blobs())
    losses = []
    batches = list(zip(points.split(16), label.split(16), strict=True)) * 4
    for step, (batch, target) in enumerate(batches, start=1):
        with torch.autocast(DEVICE, DTYPE):
            loss = nn.functional.cross_entropy(compiled(batch), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(loss.item())
        if step % 64 == 0:
            print({name: round(value, 4) for name, value in monitor.report().items()})
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::16]))
