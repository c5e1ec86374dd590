"""Strategies of hypothesis for sequences of gradients that are hard on an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

Shape = tuple[int, int]
Kind = Callable[[Shape, int, torch.Generator], Tensor]  # [number, m, n]

# Powers of ten of a gradient's size: from where squares vanish in float32 to where they overflow.
EXPONENTS = (0, 0, 0, -1, 1, -3, 3, -8, 8, -15, 15, -30, 30)


def one_hot(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    grads = torch.zeros(num, shape[0] * shape[1], dtype=torch.float64)
    places = torch.randint(grads.shape[1], (num, 1), generator=generator)
    sizes = torch.randint(1, 4, (num, 1), generator=generator).double()
    return grads.scatter_(1, places, sizes).view(num, *shape)


def sparse(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    is_hit = torch.rand(num, *shape, generator=generator) < 0.2
    return torch.randn(num, *shape, generator=generator).double() * is_hit


def rows(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    """Of one row each, as an embedding sees them at batch 1."""
    grads = torch.zeros(num, *shape, dtype=torch.float64)
    places = torch.randint(shape[0], (num,), generator=generator)
    grads[torch.arange(num), places] = torch.randn(num, shape[1], generator=generator).double()
    return grads


def rank_one(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    """With the same left vector throughout."""
    u = torch.randn(shape[0], 1, generator=generator).double()
    return u * torch.randn(num, 1, shape[1], generator=generator).double()


def normal(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, *shape, generator=generator).double()


def flipping(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    signs = 1.0 - 2.0 * (torch.arange(num) % 2).double()
    return signs.view(-1, 1, 1) * torch.randn(*shape, generator=generator).double()


def constant(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator).double().expand(num, *shape)


def spread(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    """Entries of all sizes at once."""
    exponents = 12 * torch.rand(num, *shape, generator=generator).double() - 6
    return normal(shape, num, generator) * 10**exponents


def zero(shape: Shape, num: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(num, *shape, dtype=torch.float64)


KINDS: tuple[Kind, ...] = (
    one_hot,
    sparse,
    rows,
    rank_one,
    normal,
    flipping,
    constant,
    spread,
    zero,
)


class Stretch(NamedTuple):
    kind: Kind
    num: int
    exponent: int
    seed: int

    def gradients(self, shape: Shape) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return self.kind(shape, self.num, generator) * 10.0**self.exponent

    def __repr__(self) -> str:
        return f"Stretch({self.kind.__name__}, {self.num}, {self.exponent}, {self.seed})"


@st.composite
def stretches(draw: st.DrawFn, most: int = 6, longest: int = 12) -> list[Stretch]:
    """Mixtures: several stretches, each of one kind and size."""
    return draw(
        st.lists(
            st.builds(
                Stretch,
                st.sampled_from(KINDS),
                st.integers(1, longest),
                st.sampled_from(EXPONENTS),
                st.integers(0, 99),
            ),
            min_size=1,
            max_size=most,
        )
    )


def gradients(parts: list[Stretch], shape: Shape) -> Tensor:
    """[steps, m, n], float64."""
    return torch.cat([part.gradients(shape) for part in parts])


@st.composite
def few_entries(draw: st.DrawFn, shape: Shape, steps: int = 12) -> Tensor:
    """Entry by entry, so that a failing sequence shrinks to a few numbers; [steps, m, n]."""
    size = shape[0] * shape[1]
    entry = st.tuples(st.integers(0, size - 1), st.sampled_from([1.0, -1.0, 2.0, 1e-4, 1e6]))
    grads = torch.zeros(steps, size, dtype=torch.float64)
    for grad, entries in zip(
        grads,
        draw(st.lists(st.lists(entry, max_size=2), min_size=2, max_size=steps)),
        strict=False,
    ):
        for place, value in entries:
            grad[place] = value
    return grads.view(steps, *shape)
