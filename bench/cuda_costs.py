"""Counts of what one step at the defaults launches, moves and computes on the CUDA backend.

The launches are those of csrc/cuda/plan/step.cpp (tests/test_cuda_bounds.py compares them with the
plan itself). Bytes are those that kernels must move when each reads its inputs and writes its
outputs once and nothing stays in a cache from one kernel to the next. Flops are twice the
multiply-adds of matrix products, in whole blocks; all else is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import dykaf
from bench.cuda_rates import FLOAT, LARGE, MEDIUM, TALL, WIDE, Device, Tile
from bench.distributed_models import Param
from dykaf.state import Layout

PASS_BYTES = 1 << 29  # kMaxWorkspaceBytes of csrc/bindings/on_cuda.cpp


class Matrix(NamedTuple):
    """One matrix, or a vector as a row, with what the package's layout says of it."""

    m: int
    n: int
    left: bool
    right: bool
    skinny_rank: int
    is_adamw: bool
    param_bytes: int  # of an entry of the parameter and of its gradient
    state_bytes: int

    @property
    def size(self) -> int:
        return self.m * self.n

    @property
    def short(self) -> int:
        return min(self.m, self.n)

    @property
    def long(self) -> int:
        return max(self.m, self.n)

    @property
    def is_wide(self) -> bool:
        return self.m < self.n

    @property
    def side(self) -> int:
        """The one with a factor in full."""
        return self.m if self.left else self.n

    @property
    def workspace(self) -> int:
        """Bytes; StepArrays of csrc/cuda/plan/step_arrays.h."""
        if self.is_adamw:
            return 0
        squares = self.side**2 if self.skinny_rank else 2 * self.side**2
        return FLOAT * (3 * self.size + squares)


def default_options() -> dict[str, Any]:
    return dict(dykaf.DyKAF([torch.zeros(1)]).param_groups[0])


def layout_of(param: Param, dtype: torch.dtype) -> Layout:
    options = {**default_options(), "batch_dims": param.num_batch}
    if param.is_adamw:
        options["max_precond_dim"] = 0
    return Layout.of(torch.empty(param.shape, dtype=dtype, device="meta"), options)


def matrices_of(params: Iterable[Param], dtype: torch.dtype) -> list[Matrix]:
    """Those of all parameters, a stack as that many."""
    matrices = []
    known: dict[Param, list[Matrix]] = {}
    for param in params:
        if param not in known:
            layout = layout_of(param, dtype)
            assert not (layout.left and layout.right)
            state = sum(math.prod(s) * d.itemsize for s, d in layout.shapes().values())
            is_row = not layout.is_matrix
            known[param] = layout.count * [
                Matrix(
                    1 if is_row else layout.m,
                    math.prod(param.shape) if is_row else layout.n,
                    layout.left,
                    layout.right,
                    layout.skinny_rank,
                    is_row,
                    dtype.itemsize,
                    state // layout.count,
                )
            ]
        matrices += known[param]
    return matrices


def tile_of(m: int, n: int, symmetric: bool) -> Tile:
    """choose_tile of csrc/cuda/plan/gemm_plan.cpp."""
    if m >= 768 and n >= 768:
        return LARGE
    if not symmetric and m <= 32:
        return WIDE
    if not symmetric and n <= 32:
        return TALL
    return MEDIUM


class Part(NamedTuple):
    """What a matrix does in one launch.

    A product has a form and sizes. One whose result is plain has an epilogue, or "store": where a
    library computes it, that is a kernel that reads the product, and `beside` more bytes.
    """

    site: str
    bytes: float
    form: str = ""
    m: int = 0
    n: int = 0
    k: int = 0
    epilogue: str = ""
    beside: float = 0

    @property
    def is_symmetric(self) -> bool:
        return self.form.startswith("sym")

    @property
    def tile(self) -> Tile | None:
        return tile_of(self.m, self.n, self.is_symmetric) if self.form else None

    @property
    def blocks(self) -> int:
        tile = self.tile
        if tile is None:
            return 0
        down = math.ceil(self.m / tile.m)
        return down * (down + 1) // 2 if self.is_symmetric else down * math.ceil(self.n / tile.n)

    @property
    def block_flops(self) -> float:
        return 2.0 * self.tile.m * self.tile.n * self.k if self.tile else 0.0

    @property
    def by_library(self) -> Part:
        """The product as a library computes it, stored in float32."""
        moved = FLOAT * (self.m * self.k + self.k * self.n + self.m * self.n)
        return self._replace(bytes=moved, epilogue="store")

    @property
    def after_library(self) -> Part:
        """The element kernel that follows."""
        moved = FLOAT * self.m * self.n + self.beside
        return Part(f"{self.site} {self.epilogue}", moved)


# In the order of the launches; in a Newton-Schulz step "1 gram wide" and so on.
NEWTON_SCHULZ = ("gram wide", "gram tall", "bound", "square", "product")
STEPS = int(default_options()["orthogonalize"])
SITES = (
    *("prepare", "adamw", "load", "into left", "into right"),
    *("skinny gradient", "into V wide", "into V tall", "skinny moments"),
    *("out of V wide", "out of V tall", "beyond", "skinny long factor"),
    *("update_rms", "normalize"),
    *(f"{step} {name}" for step in range(1, STEPS + 1) for name in NEWTON_SCHULZ),
    *("update_rms of X", "out left", "out right"),
    *("left increment", "left scalars", "left blend"),
    *("right increment", "right scalars", "right blend"),
)
# Never rounded: csrc/cuda/plan/skinny_update.cpp.
FULL_PRECISION = ("into V wide", "into V tall", "out of V wide", "out of V tall")


def parts_of(p: Matrix) -> Iterator[Part]:
    """A step of csrc/cuda/plan/step.cpp, without the first gradient and without refreshes."""
    array, param = FLOAT * p.size, p.param_bytes * p.size
    yield Part("prepare", 0)
    if p.is_adamw:
        yield Part("adamw", 4 * array + 3 * param)  # reads G, W, both moments; writes the latter
        yield Part("update_rms", 0)
        return
    square = FLOAT * p.side**2
    name = "left" if p.left else "right"
    yield Part("load", array + param)
    # The update written, both moments read and written, where Adam is in the epilogue.
    adam = 0 if p.skinny_rank else 5 * array
    form = "TN" if p.left else "NN"
    epilogue = "store" if p.skinny_rank else "adam"
    yield Part(f"into {name}", 2 * array + square + adam, form, p.m, p.n, p.side, epilogue, adam)
    if p.skinny_rank:
        yield from skinny_parts(p)
    yield Part("update_rms", 0)
    if not p.skinny_rank:
        yield from orthogonal_parts(p)
    form = "NN" if p.left else "NT"
    moved = array + square + 2 * param
    yield Part(f"out {name}", moved, form, p.m, p.n, p.side, "apply", 2 * param)
    form = "sym NT" if p.left else "sym TN"
    increment = array + 1.5 * square
    other = p.size // p.side
    yield Part(f"{name} increment", increment, form, p.side, p.side, other)
    yield Part(f"{name} scalars", 0)
    yield Part(f"{name} blend", 3 * square)


def orthogonal_parts(p: Matrix) -> Iterator[Part]:
    """csrc/cuda/plan/orthogonalize.cpp."""
    s, array = p.short, FLOAT * p.size
    square = FLOAT * s * s
    is_tall = p.m > p.n
    yield Part("normalize", 2 * array)
    for step in range(1, STEPS + 1):
        form = "sym TN" if is_tall else "sym NT"
        yield Part(
            f"{step} gram {'tall' if is_tall else 'wide'}", array + square, form, s, s, p.long
        )
        if step == 1:
            yield Part("1 bound", 0)
        yield Part(f"{step} square", 2 * square, "sym NT", s, s, s)
        # Of X and B X, after a library, the next X.
        moved = 2 * array + square
        yield Part(f"{step} product", moved, "NN", p.m, p.n, s, "quintic", 2 * array)
    yield Part("update_rms of X", 0)


def skinny_parts(p: Matrix) -> Iterator[Part]:
    """csrc/cuda/plan/skinny_update.cpp, with all directions of V in use."""
    s, rank, array = p.short, p.skinny_rank, FLOAT * p.size
    yield Part("skinny gradient", 4 * array)  # exp_avg read and written, H read, rows written
    name = "wide" if p.is_wide else "tall"
    moved = array + FLOAT * (rank * p.long + s * rank)
    for _ in range(2):  # the gradient's and exp_avg's
        if p.is_wide:
            yield Part("into V wide", moved, "NT", s, rank, p.long)
        else:
            yield Part("into V tall", moved, "NN", rank, s, p.long)
    yield Part("skinny moments", FLOAT * 5 * s * rank)
    yield Part(f"out of V {name}", moved, "NN" if p.is_wide else "TN", p.m, p.n, rank)
    yield Part("beyond", 4 * array)
    yield Part("skinny long factor", FLOAT * 2 * (1.5 * rank) ** 2)  # the part of `core` in use


@dataclass
class Launch:
    """One grid over many matrices, or a library's call; `tile` is that of a product of ours."""

    site: str
    tile: Tile | None
    by_library: bool = False
    bytes: float = 0.0
    parts: dict[Part, int] = field(default_factory=dict)  # with how many matrices do so

    @property
    def blocks(self) -> int:
        return sum(count * part.blocks for part, count in self.parts.items())

    @property
    def flops(self) -> float:
        return sum(n * part.blocks * part.block_flops for part, n in self.parts.items())

    def precision(self, of_step: str) -> str:
        return "highest" if self.site in FULL_PRECISION else of_step

    def library_seconds(self, device: Device, precision: str, reached: bool) -> float:
        """The bound takes the card's peak, the estimate what cuBLAS reaches in TF32.

        At "medium" it may round operands of float32 to bfloat16 or to TF32 as it likes: what that
        is worth is not published, so the estimate is that of "high".
        """
        ((part, count),) = self.parts.items()
        peak = device.peaks["bfloat16" if precision == "medium" else "TF32"].value
        rate = device.library_rate("TF32", part.m, part.n, part.k, count) if reached else peak
        memory = self.bytes / device.dram.value / (device.copied.value if reached else 1)
        return max(memory, count * 2.0 * part.m * part.n * part.k / rate)

    def seconds(self, device: Device, precision: str, reached: bool) -> float:
        """The bound, or with `reached` the estimate: what products and copies reach, and a launch.

        A block runs on one multiprocessor, which has its share of the rate.
        """
        if self.by_library:
            return self.library_seconds(device, precision, reached)
        memory = self.bytes / device.dram.value
        compute = 0.0
        if self.tile is not None:
            rate = device.product_rate(self.precision(precision), self.tile)
            largest = max(part.block_flops for part in self.parts)
            compute = max(self.flops, device.processors * largest) / rate
        if reached:
            memory /= device.copied.value
            compute /= device.reached.value
        return max(memory, compute)


def passes_of(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """passes_of of csrc/bindings/on_cuda.cpp."""
    current: list[Matrix] = []
    used = 0
    for p in matrices:
        if current and used + p.workspace > PASS_BYTES:
            yield current
            current, used = [], 0
        current.append(p)
        used += p.workspace
    if current:
        yield current


TILES = (None, LARGE, MEDIUM, WIDE, TALL)
EPILOGUES = ("adam", "quintic", "apply")  # in the order of their launches


def no_part(part: Part) -> bool:
    return False


def launches_of(
    matrices: Iterable[Matrix], is_by_library: Callable[[Part], bool] = no_part
) -> list[Launch]:
    """The launches of one pass; of each site our grids, the library's calls, their epilogues."""
    known: dict[Matrix, list[Part]] = {}
    found: dict[tuple[int, int, int], Launch] = {}
    shapes: dict[tuple[str, int, int, int], int] = {}

    def add(key: tuple[int, int, int], launch: Launch, part: Part) -> None:
        launch = found.setdefault(key, launch)
        launch.bytes += part.bytes
        launch.parts[part] = launch.parts.get(part, 0) + 1

    for p in matrices:
        if p not in known:
            known[p] = list(parts_of(p))
        for part in known[p]:
            site = SITES.index(part.site)
            if not (part.epilogue and is_by_library(part)):
                add((site, 0, TILES.index(part.tile)), Launch(part.site, part.tile), part)
                continue
            shape = shapes.setdefault((part.site, part.m, part.n, part.k), len(shapes))
            add((site, 1, shape), Launch(part.site, None, by_library=True), part.by_library)
            if part.epilogue != "store":
                after = part.after_library
                add((site, 2, EPILOGUES.index(part.epilogue)), Launch(after.site, None), after)
    return [found[key] for key in sorted(found)]
