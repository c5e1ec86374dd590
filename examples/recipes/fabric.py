"""A loop of one's own on Lightning Fabric."""

from lightning.fabric import Fabric
from tiny import blobs, classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dykaf
from dykaf.integrations.metrics import Monitor


def main() -> list[float]:
    fabric = Fabric(precision="bf16-mixed")
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    loader = DataLoader(TensorDataset(*blobs()), batch_size=16, shuffle=True)
    loader = fabric.setup_dataloaders(loader)
    monitor = Monitor(optimizer)
    losses = []
    for epoch in range(4):
        for points, label in loader:
            loss = nn.functional.cross_entropy(model(points), label)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        fabric.log_dict(monitor.report(), step=epoch)
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::16]))
