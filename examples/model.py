"""A small GPT: pre-norm, rotary positions, RMSNorm, GELU, no biases, untied output head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

NUM_BYTES = 256
ROPE_BASE = 10000.0


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        num_windows, length, dim = x.shape
        qkv = self.qkv(x).view(num_windows, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [num_windows, num_heads, length, head_dim]
        q, k = rotate_positions(q, cos, sin), rotate_positions(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(num_windows, length, dim))


class Block(nn.Module):
    """Attention and a four times wider MLP, each on a normalised input and added back."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, num_heads)
        self.norm_mlp = nn.RMSNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x), cos, sin)
        return x + self.down(functional.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Next-byte model.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: attention heads; dim must be a multiple of 2 * num_heads.
        context: longest window.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, NUM_BYTES, bias=False)
        half = dim // num_heads // 2
        frequency = ROPE_BASE ** (-torch.arange(half) / half)
        angle = torch.arange(context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.init_weights(num_layers)

    def init_weights(self, num_layers: int) -> None:
        """Normal weights of deviation 0.02; smaller where a block adds to the residual stream."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds_to_stream = name.endswith(("attention.out.weight", "down.weight"))
                scale = (2 * num_layers) ** -0.5 if adds_to_stream else 1.0
                nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next byte.

        Args:
            tokens: int64 [num_windows, length], length at most context.

        Returns:
            float [num_windows, length, 256].
        """
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per byte of windows, int64 [num_windows, context + 1]."""
        logits = self(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def rotate_positions(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_(i + half)) of a head by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
