"""bench/cuda_costs.py beside csrc/cuda/plan itself, compiled without its kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bench.cuda_costs import EPILOGUES, Launch, Matrix, Part, launches_of, matrices_of, passes_of
from bench.cuda_models import PRICED, lora
from bench.distributed_models import Param

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O0", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
# csrc/cuda/kernels/gemm.cu has the sizes of grids; CUDA's names come from the host executor.
SIMT = ROOT / "tests" / "simt"
KERNEL_FLAGS = ["-x", "c++", "-fno-strict-aliasing", "-include", str(SIMT / "cuda_on_host.h")]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="a C++ compiler is needed")


class Listed(NamedTuple):
    """A launch of the plan; of a product with its blocks and the sizes of its multiplications."""

    name: str
    blocks: int
    products: Counter[tuple[int, int, int]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    plan = ROOT / "csrc" / "cuda" / "plan"
    sources = [path for path in sorted(plan.glob("*.cpp")) if path.stem != "grad_max"]
    sources.append(ROOT / "csrc" / "cuda" / "library" / "products.cpp")
    sources.append(SIMT / "plan_listing.cpp")
    kernel = folder / "gemm.o"
    source = ROOT / "csrc" / "cuda" / "kernels" / "gemm.cu"
    subprocess.run(
        [COMPILER, *FLAGS, *KERNEL_FLAGS, f"-I{SIMT}", "-c", str(source), "-o", str(kernel)],
        check=True,
    )
    binary = folder / "listing"
    subprocess.run(
        [COMPILER, *FLAGS, *map(str, sources), str(kernel), "-o", str(binary)], check=True
    )
    return binary


def listing(program: Path, matrices: list[Matrix], least: int) -> tuple[list[Listed], int]:
    """The plan's launches over these matrices, and bytes of workspace; with `least`, products whose
    sides are all as long go to a library."""
    text = ""
    for p in matrices:
        side = "none" if p.is_adamw else "left" if p.left else "right"
        text += f"{p.m} {p.n} {side} {p.skinny_rank} {p.skinny_rank + p.short}\n"
    command = [str(program), *([str(least)] if least else [])]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    launches: list[Listed] = []
    workspace = 0
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            m, n, k = map(int, line.split())
            launches[-1].products[m, n, k] += 1
        elif line.startswith("workspace"):
            workspace = int(line.split()[1])
        elif line.startswith("gemm"):
            _, form, tile, blocks = line.split("|")
            launches.append(Listed(f"{form} {tile}", int(blocks), Counter()))
        elif line.startswith("library"):
            _, form, count = line.split("|")
            launches.append(Listed(f"library {form}", int(count), Counter()))
        else:
            launches.append(Listed(line, 0, Counter()))
    return launches, workspace


# What the plan calls the launches of the bench's sites that are no products.
KERNELS = {
    **dict.fromkeys(("1 bound", "update_rms of X"), "update_rms"),
    **{f"{side} {kernel}": kernel for side in ("left", "right") for kernel in ("scalars", "blend")},
}


# Rows and columns change places, and the operands with them.
BY_COLUMNS = {"NN": "NN", "TN": "NT", "NT": "TN"}


def as_listed(launch: Launch) -> Listed:
    if launch.by_library:
        ((part, count),) = launch.parts.items()
        sizes = Counter({(part.n, part.m, part.k): count})
        return Listed(f"library {BY_COLUMNS[part.form]}", count, sizes)
    if launch.tile is None:
        name = launch.site.split()[-1]
        if name in EPILOGUES:
            return Listed(name, 0, Counter())
        return Listed(KERNELS.get(launch.site, launch.site), 0, Counter())
    (form,) = {part.form for part in launch.parts}
    products: Counter[tuple[int, int, int]] = Counter()
    for part, count in launch.parts.items():
        products[part.m, part.n, part.k] += count
    return Listed(f"{form} {launch.tile.name}", launch.blocks, products)


def check(program: Path, matrices: list[Matrix], least: int = 0) -> int:
    """Compares the passes over these matrices; returns the number of launches."""

    def is_by_library(part: Part) -> bool:
        return least > 0 and min(part.m, part.n, part.k) >= least

    total = 0
    for part in passes_of(matrices):
        launches, workspace = listing(program, part, least)
        assert [as_listed(launch) for launch in launches_of(part, is_by_library)] == launches
        assert sum(p.workspace for p in part) == workspace
        total += len(launches)
    return total


# Every block shape, wide and tall, long sides at their rank and in none, vectors, both over 10000.
MIXED = [
    *((768, 2304), (2304, 768), (1000, 1000), (70, 300), (300, 70), (20, 40), (40, 20), (8, 8)),
    *((16, 4096), (4096, 16), (32, 1024), (16, 14336), (14336, 16), (64, 4096), (20000, 12000)),
    *((12, 4), (7,), (768,)),
]


def test_launches_of_mixed_shapes(program: Path) -> None:
    matrices = matrices_of([Param(shape) for shape in MIXED], torch.float32)
    assert sum(p.skinny_rank > 0 for p in matrices) == 3
    assert sum(p.is_adamw for p in matrices) == 3
    plain = check(program, matrices)
    assert plain < check(program, matrices, least=512) < check(program, matrices, least=1)


@pytest.mark.parametrize("make", PRICED, ids=lambda make: make().name.split(",")[0])
@pytest.mark.parametrize("least", [0, 512])
def test_launches_of_the_models(program: Path, make: object, least: int) -> None:
    model = make()  # type: ignore[operator]
    for group in model.groups:
        check(program, matrices_of(group, model.dtype), least)


def test_more_adapters_take_no_more_launches(program: Path) -> None:
    few = check(program, matrices_of(lora("q v")[:4], torch.bfloat16))
    assert check(program, matrices_of(lora("q v"), torch.bfloat16)) == few


def test_more_matrices_of_a_shape_take_no_more_calls(program: Path) -> None:
    shapes = [Param((600, 700)), Param((900, 700))]
    one, many = (
        check(program, matrices_of(num * shapes, torch.float32), least=512) for num in (1, 6)
    )
    assert one == many
