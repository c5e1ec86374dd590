"""The Trainer of Lightning: mixed precision, clipping, diagnostics."""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import blobs, classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dykaf
from dykaf.integrations.lightning import DiagnosticsCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        points, label = batch
        loss = nn.functional.cross_entropy(self.model(points), label)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = dykaf.DyKAF(dykaf.param_groups(self), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 128)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main() -> list[float]:
    module = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            max_epochs=4,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            callbacks=[DiagnosticsCallback(every_n_steps=50)],
        )
        trainer.fit(module, DataLoader(TensorDataset(*blobs()), batch_size=16, shuffle=True))
    return module.losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.2f}" for loss in main()[::16]))
