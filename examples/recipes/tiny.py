"""Models and data of the recipes: small, made here, nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 32
LENGTH = 16


def counting(num: int, seed: int = 0) -> Tensor:
    """Sequences that count on by 1, 2 or 3 from anywhere, modulo VOCAB, [num, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB, (num, 1), generator=generator)
    stride = torch.randint(1, 4, (num, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCAB


def token_rows(num: int = 256) -> list[dict[str, list[int]]]:
    """The same as a dataset of tokens."""
    return [{"input_ids": row, "labels": row} for row in counting(num).tolist()]


def language_model(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """Words w0, w1, ..., a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{idx}": idx for idx in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def blobs(num: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around eight centres, and which: [num, 16], [num]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 16, generator=generator)
    label = torch.randint(8, (num,), generator=generator)
    return centres[label] + 0.5 * torch.randn(num, 16, generator=generator), label


def images(num: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four pictures under noise, and which: [num, 1, 16, 16], [num]."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(4, 1, 16, 16, generator=generator)
    label = torch.randint(4, (num,), generator=generator)
    return pictures[label] + torch.randn(num, 1, 16, 16, generator=generator), label


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 8),
    )
