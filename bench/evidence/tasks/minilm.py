"""The sentence encoder all-MiniLM-L6-v2 in plain PyTorch, with LoRA on queries and values.

Reads the safetensors file and the vocabulary as they lie in the package; needs no other library.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import unicodedata

import torch
from torch import nn
from torch.nn import functional

from bench.evidence.sources import MINILM, read_member

NUM_LAYERS = 6
NUM_HEADS = 12
DIM = 384
NORM_EPS = 1e-12
ADAPTED = ("query", "value")
PADDING, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


@functools.lru_cache(maxsize=1)
def load_weights() -> dict[str, torch.Tensor]:
    """All float32 tensors of the checkpoint.

    A safetensors file is a length (8 bytes), a JSON header of that length, and raw tensors.
    """
    data = read_member(MINILM, "*/model/model.safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    weights = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = entry["data_offsets"]
            raw = bytearray(data[start + first : start + last])
            weights[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(entry["shape"])
    return weights


@functools.lru_cache(maxsize=1)
def load_vocabulary() -> dict[str, int]:
    lines = read_member(MINILM, "*/model/vocab.txt").decode().splitlines()
    return {word: idx for idx, word in enumerate(lines)}


def split_words(text: str) -> list[str]:
    """Lower case, without accents; every punctuation mark is a word of its own."""
    words: list[str] = []
    joins = False  # whether the next letter continues the last word
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category == "Mn":  # an accent
            continue
        is_symbol = category[0] == "P" or (char.isascii() and not char.isalnum())
        if char.isspace():
            joins = False
        elif is_symbol or not joins:
            words.append(char)
            joins = not is_symbol
        else:
            words[-1] += char
    return words


def word_pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Longest known pieces from the left; pieces that continue a word begin with ##."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                pieces.append(vocabulary[piece])
                start = end
                break
        else:
            return [vocabulary[UNKNOWN]]
    return pieces


def encode(text: str, max_tokens: int) -> list[int]:
    """Token ids with the two end marks, cut to max_tokens."""
    vocabulary = load_vocabulary()
    ids = [piece for word in split_words(text) for piece in word_pieces(word, vocabulary)]
    return [vocabulary[FIRST], *ids[: max_tokens - 2], vocabulary[LAST]]


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [num_rows, longest] filled with [PAD], and which of them are real."""
    longest = max(len(row) for row in rows)
    padding = load_vocabulary()[PADDING]
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


class LoraMiniLM(nn.Module):
    """Frozen encoder, trainable low-rank additions to queries and values, a linear classifier.

    An adapted weight is W + (alpha / rank) B A with A random and B zero, as in LoRA
    (Hu et al. 2021).
    """

    def __init__(self, rank: int, alpha: float, num_classes: int) -> None:
        super().__init__()
        self.frozen = load_weights()  # a plain dictionary: these are no parameters
        self.scale = alpha / rank
        self.adapters = nn.ParameterDict()
        for layer in range(NUM_LAYERS):
            for name in ADAPTED:
                down = torch.empty(rank, DIM).uniform_(-(DIM**-0.5), DIM**-0.5)
                self.adapters[f"{name}{layer}_A"] = nn.Parameter(down)
                self.adapters[f"{name}{layer}_B"] = nn.Parameter(torch.zeros(DIM, rank))
        self.head = nn.Linear(DIM, num_classes)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.frozen[f"{name}.weight"], self.frozen[f"{name}.bias"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.frozen[f"{name}.weight"], self.frozen[f"{name}.bias"]
        return functional.layer_norm(x, (DIM,), weight, bias, NORM_EPS)

    def project(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        """Query, key or value, [num_rows, NUM_HEADS, length, DIM / NUM_HEADS]."""
        y = self.linear(x, f"encoder.layer.{layer}.attention.self.{name}")
        if name in ADAPTED:
            down, up = self.adapters[f"{name}{layer}_A"], self.adapters[f"{name}{layer}_B"]
            y = y + self.scale * (x @ down.T) @ up.T
        return y.unflatten(-1, (NUM_HEADS, DIM // NUM_HEADS)).transpose(1, 2)

    def forward(self, ids: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """Logits of each row: encoder, mean over the real tokens, linear."""
        embeddings = "embeddings"
        x = self.frozen[f"{embeddings}.word_embeddings.weight"][ids]
        x = x + self.frozen[f"{embeddings}.position_embeddings.weight"][: ids.shape[1]]
        x = x + self.frozen[f"{embeddings}.token_type_embeddings.weight"][0]
        x = self.norm(x, f"{embeddings}.LayerNorm")
        mask = torch.zeros(is_real.shape).masked_fill(~is_real, -math.inf)[:, None, None, :]
        for layer in range(NUM_LAYERS):
            prefix = f"encoder.layer.{layer}"
            q, k, v = (self.project(x, layer, name) for name in ("query", "key", "value"))
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = self.linear(y.transpose(1, 2).flatten(2), f"{prefix}.attention.output.dense")
            x = self.norm(x + y, f"{prefix}.attention.output.LayerNorm")
            y = functional.gelu(self.linear(x, f"{prefix}.intermediate.dense"))
            x = self.norm(
                x + self.linear(y, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm"
            )
        weight = is_real[:, :, None].float()
        return self.head((x * weight).sum(1) / weight.sum(1))
