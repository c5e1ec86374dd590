"""A vision transformer of timm, with its factory, its schedule and its moving average."""

import torch
from timm.models import VisionTransformer
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from tiny import images
from torch import nn

from dykaf.integrations.timm import create_optimizer_v2


def main() -> list[float]:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=4, embed_dim=32, depth=2, num_heads=4
    )
    optimizer = create_optimizer_v2(model, opt="dykaf", lr=0.01, weight_decay=0.05)
    schedule, num_epochs = create_scheduler_v2(optimizer, num_epochs=6, warmup_epochs=1)
    average = ModelEmaV3(model, decay=0.9)
    pictures, label = images()
    losses = []
    for epoch in range(num_epochs):
        schedule.step(epoch)
        for batch, target in zip(pictures.split(16), label.split(16), strict=True):
            loss = nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::8]))
