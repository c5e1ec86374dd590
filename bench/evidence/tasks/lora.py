"""LoRA fine-tuning: is a snippet of a movie review positive or negative?

Snippets and ratings are those of Hutto & Gilbert (2014), inside the package vaderSentiment; a
rating's sign is the class. The encoder is all-MiniLM-L6-v2.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
from typing import Any

import torch
from torch.nn import functional

from bench.evidence import EvidenceError
from bench.evidence.grid import Run
from bench.evidence.sources import MINILM, MOVIE_REVIEWS, read_member
from bench.evidence.tasks.minilm import LoraMiniLM, encode, pad

INNER_ARCHIVE = "*/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
FOLDS = 10  # fold 0 scores the tuning runs, fold 1 the reported runs
EVAL_BATCH = 50


@functools.lru_cache(maxsize=1)
def read_snippets() -> bytes:
    """The file, tab-separated: number, mean rating, text."""
    with tarfile.open(fileobj=io.BytesIO(read_member(MOVIE_REVIEWS, INNER_ARCHIVE))) as archive:
        for item in archive:
            content = archive.extractfile(item) if item.name.endswith(f"/{SNIPPETS}") else None
            if content is not None:
                return content.read()
    raise EvidenceError(f"{MOVIE_REVIEWS.requirement}: no {SNIPPETS}")


def fold_of(text: str) -> int:
    """Decided by the text alone, so that equal snippets never stand on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % FOLDS


@functools.lru_cache(maxsize=2)
def load(max_tokens: int) -> list[tuple[int, int, list[int]]]:
    """(fold, class, token ids) of each snippet with a rating that is not zero."""
    rows = []
    for line in read_snippets().decode("utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if float(rating) != 0:
            rows.append((fold_of(text), int(float(rating) > 0), encode(text, max_tokens)))
    return rows


def data_sha256(task: str, settings: dict[str, Any]) -> str:
    assert MINILM.sha256 is not None
    return hashlib.sha256(read_snippets() + MINILM.sha256.encode()).hexdigest()


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_batch(rows: list[tuple[int, int, list[int]]]) -> Batch:
    """Ids, which are real, classes."""
    return *pad([ids for _, _, ids in rows]), torch.tensor([label for _, label, _ in rows])


class Lora:
    """The adapted encoder and its batches."""

    def __init__(self, run: Run) -> None:
        settings = self.settings = run.settings
        rows = load(settings["max_tokens"])
        self.train = [row for row in rows if row[0] >= 2]
        held_out = [row for row in rows if row[0] == (0 if run.role == "tune" else 1)]
        self.held_out = held_out[: settings["eval_snippets"]]
        torch.manual_seed(run.seed)
        self.model = LoraMiniLM(settings["rank"], settings["alpha"], num_classes=2)
        self.hidden = [f"adapters.{name}" for name in self.model.adapters]
        self.sampler = torch.Generator().manual_seed(run.seed)

    def loss(self) -> torch.Tensor:
        chosen = torch.randint(len(self.train), (self.settings["batch"],), generator=self.sampler)
        ids, is_real, labels = make_batch([self.train[idx] for idx in chosen.tolist()])
        return functional.cross_entropy(self.model(ids, is_real), labels)

    @torch.no_grad()
    def evaluate(self, *, final: bool) -> dict[str, float]:
        """Cross-entropy in nats, and the share of wrong answers."""
        rows = self.held_out if final else self.held_out[: self.settings["curve_snippets"]]
        rows = sorted(rows, key=lambda row: len(row[2]))  # little padding
        loss, wrong = 0.0, 0
        for start in range(0, len(rows), EVAL_BATCH):
            ids, is_real, labels = make_batch(rows[start : start + EVAL_BATCH])
            logits = self.model(ids, is_real)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            wrong += int((logits.argmax(1) != labels).sum())
        return {"loss": loss / len(rows), "error": wrong / len(rows)}


def build(run: Run) -> Lora:
    return Lora(run)
