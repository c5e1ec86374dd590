"""The matrices of real models, in their own sizes and in sizes for a small machine."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]  # (rows, columns), or (matrices, rows, columns) for a stack

MAX_PRECOND_DIM = 10000  # DyKAF's default
KEPT_SIDE = 64  # ranks, experts and narrow channels stay when a set is scaled down
TINY_SIDE = 16  # about the longest side of the size "tiny"
SIZES = ("full", "small", "tiny")


class Matrix(NamedTuple):
    """Matrices of one shape, with the sides that keep a factor."""

    m: int
    n: int
    left: bool
    right: bool
    num_matrices: int


@dataclass(frozen=True)
class Workload:
    """Matrices that one optimizer steps together."""

    name: str
    description: str
    shapes: tuple[Shape, ...]
    max_precond_dim: int
    num_periods: int  # refresh periods to measure

    def matrices(self) -> Iterator[Matrix]:
        """One entry per parameter, a stack counted as that many matrices."""
        for *stack, m, n in self.shapes:
            limit = self.max_precond_dim
            yield Matrix(m, n, m <= limit, n <= limit, stack[0] if stack else 1)

    def describe_shapes(self) -> str:
        """Distinct shapes with their counts, in order."""
        counts = Counter("x".join(map(str, shape)) for shape in self.shapes)
        return ", ".join(f"{shape} (x{c})" if c > 1 else shape for shape, c in counts.items())


@dataclass(frozen=True)
class ShapeSet:
    """The matrices of a model that DyKAF preconditions; embeddings and heads are not among them.

    Attributes:
        name: as given to --sets.
        description: what the shapes stand for.
        layer: shapes of one layer.
        num_layers: layers in the size "full".
        small_divisor: longer sides are divided by this in the size "small".
        small_num_layers: layers in the size "small".
        num_periods: refresh periods measured by default; few where a period is slow.
    """

    name: str
    description: str
    layer: tuple[Shape, ...]
    num_layers: int
    small_divisor: int
    small_num_layers: int = 1
    num_periods: int = 5

    def workload(self, size: str) -> Workload:
        """The set in one of SIZES; max_precond_dim shrinks with the sides."""
        divisor, num_layers = 1, self.num_layers
        if size == "small":
            divisor, num_layers = self.small_divisor, self.small_num_layers
        if size == "tiny":
            divisor, num_layers = max(map(max, self.layer)) // TINY_SIDE, 1
        shapes = tuple(scaled(shape, divisor, size) for shape in self.layer)
        return Workload(
            self.name,
            self.description,
            shapes * num_layers,
            MAX_PRECOND_DIM // divisor,
            self.num_periods,
        )


def scaled(shape: Shape, divisor: int, size: str) -> Shape:
    """Divide the sides; in the size "tiny" the short ones and the stacks too."""
    kept = 2 if size == "tiny" else KEPT_SIDE
    return tuple(side if side <= kept else max(side // divisor, kept) for side in shape)


def resnet50() -> tuple[Shape, ...]:
    """Convolutions as out_channels x (in_channels kernel_height kernel_width)."""
    shapes: list[Shape] = [(64, 3 * 7 * 7)]
    channels = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block_idx in range(num_blocks):
            shapes += [(width, channels), (width, width * 3 * 3), (4 * width, width)]
            if block_idx == 0:
                shapes.append((4 * width, channels))
            channels = 4 * width
    return tuple(shapes)


def lora(rank: int, width: int) -> tuple[Shape, ...]:
    return ((rank, width), (width, rank))


GPT2_LAYER = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
BLOCK = ((2304, 768), (768, 768), (3072, 768), (768, 3072))

SHAPE_SETS = {
    shape_set.name: shape_set
    for shape_set in (
        ShapeSet("gpt2", "GPT-2 small: attention and MLP, Conv1D layout", GPT2_LAYER, 12, 4, 2),
        ShapeSet(
            "llama3-attention",
            "Llama-3-8B, one layer: q, k, v, o (grouped keys and values)",
            ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
            num_layers=1,
            small_divisor=16,
        ),
        ShapeSet(
            "llama3-mlp",
            "Llama-3-8B, one layer: gate, up, down; the side 14336 exceeds max_precond_dim",
            ((14336, 4096), (14336, 4096), (4096, 14336)),
            num_layers=1,
            small_divisor=16,
        ),
        ShapeSet("lora8", "16 adapters of rank 8 on width 4096", lora(8, 4096), 16, 8, 4),
        ShapeSet("lora64", "16 adapters of rank 64 on width 4096", lora(64, 4096), 16, 8, 4),
        ShapeSet("vit", "ViT-B/16: attention and MLP", BLOCK, 12, 4, 2),
        ShapeSet("resnet50", "ResNet-50: all convolutions as matrices", resnet50(), 1, 4),
        ShapeSet(
            "moe",
            "8 of the 64 experts of an OLMoE-1B-7B layer: gate, up, down as stacks",
            ((8, 1024, 2048), (8, 1024, 2048), (8, 2048, 1024)),
            num_layers=1,
            small_divisor=8,
        ),
        ShapeSet("block", "one transformer block of width 768", BLOCK, 1, 1, num_periods=1),
        ShapeSet(
            "lora", "64 adapters of rank 8 on width 1024", lora(8, 1024), 64, 1, 64, num_periods=1
        ),
        ShapeSet(
            "small",
            "four blocks of width 256",
            ((256, 256), (768, 256), (1024, 256), (256, 1024)),
            num_layers=4,
            small_divisor=1,
            small_num_layers=4,
            num_periods=3,
        ),
    )
}
