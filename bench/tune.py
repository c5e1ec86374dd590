"""Times large products by the package's kernels and by cuBLAS on this GPU, and writes the rules.

    python -m bench.tune --out products.txt       # the shapes of the priced models
    python -m bench.tune --out products.txt --shapes 4096x4096 4096x14336
    DYKAF_PRODUCTS=products.txt python train.py   # uses what was written
    python -m bench.tune --estimates              # the sides that the package's own file has

What is timed are whole steps of some matrices of one shape, first with the kernels alone, then with
the products of one form by cuBLAS: so the kernels that follow such a product count. A file is read
when dykaf is imported and chosen by nobody else, so a run gives the same bits with it each time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import dykaf
from bench.cuda_costs import Launch, Part, matrices_of
from bench.cuda_models import PRICED
from bench.cuda_rates import DEVICES, FLOAT, LAUNCH, Device
from bench.distributed_models import Param
from bench.timing import seconds
from dykaf import ops, products
from dykaf.products import ProductRule

MARGIN = 0.98  # cuBLAS must take less than this share of the kernels' time
COUNTS = (1, 2, 4, 12)  # matrices of a shape in a step, for the estimates
GRANULE = 256

Shape = tuple[int, int]


class Class(NamedTuple):
    """Products of one form and size in the steps of one shape of matrices."""

    form: str
    m: int
    n: int
    k: int


def classes_of(shape: Shape) -> list[Class]:
    """Those that a library may compute: rotations, and B X of Newton-Schulz steps."""
    (p,) = matrices_of([Param(shape)], torch.float32)
    forms = ("TN", "NN") if p.left else ("NN", "NT")
    return [Class(form, p.m, p.n, p.side) for form in forms]


def rule_of(product: Class, capability: int, precision: str, by_library: bool) -> ProductRule:
    form, m, n, k = product
    both = (capability, capability)
    return ProductRule(both, precision, form, (m, m), (n, n), (k, k), by_library)


class Timed(NamedTuple):
    """Milliseconds of a step, medians."""

    product: Class
    precision: str
    kernels: float
    library: float

    @property
    def by_library(self) -> bool:
        return self.library < MARGIN * self.kernels


def time_shape(
    shape: Shape, precision: str, num: int, rounds: int, device: str, capability: int
) -> list[Timed]:
    """Steps of `num` matrices, the ways in turns."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for _ in range(num)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator).to(device)
    period = 100 * (rounds + 2)  # no refresh comes in between
    optimizer = dykaf.DyKAF(
        params,
        matmul_precision=precision,
        refresh_schedule="fixed",
        precondition_frequency=period,
    )
    classes = classes_of(shape)
    ways: list[list[ProductRule]] = [[]]
    ways += [[rule_of(product, capability, precision, by_library=True)] for product in classes]
    times: list[list[float]] = [[] for _ in ways]
    for idx in range(rounds + 2):  # the first two start from zero
        for way, found in zip(ways, times, strict=True):
            ops.set_product_rules(way)
            spent = seconds(optimizer.step, device)
            if idx >= 2:
                found.append(spent)
    kernels, *libraries = (1e3 * statistics.median(found) for found in times)
    return [
        Timed(product, precision, kernels, library)
        for product, library in zip(classes, libraries, strict=True)
    ]


def lines_of(found: Iterable[Timed], capability: int) -> Iterator[str]:
    """Of the file: a rule for each class, and what was measured."""
    for timed in found:
        form, m, n, k = timed.product
        by = "cublas" if timed.by_library else "kernels"
        place = f"{capability // 10}.{capability % 10}"
        rule = f"  {place:<12} {timed.precision:<10} {form:<5} {m:<6} {n:<6} {k:<6} {by:<8}"
        yield f"{rule} # {timed.library:.3f} ms, kernels {timed.kernels:.3f}"


def file_of(found: Sequence[Timed], capability: int, device: str) -> str:
    """What was measured comes first, then the package's own rules for other sizes."""
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    head = f"# By python -m bench.tune on {name}, torch {torch.__version__}; steps in milliseconds."
    own = products.DEFAULT_FILE.read_text(encoding="utf-8")
    return "\n".join([head, *lines_of(found, capability), "", own])


def model_shapes() -> list[Shape]:
    """Of the priced models' matrices, with sides from which a product may be large."""
    shapes = {param.shape for make in PRICED for param in make().params if not param.is_adamw}
    return sorted(s for s in shapes if len(s) == 2 and min(s) >= 512)


def estimate(
    device: Device, precision: str, epilogue: str, shape: Shape, count: int
) -> tuple[float, float]:
    """Seconds of such products with sides' product over min(shape), by our kernels and the library
    with the kernel that follows it."""
    m, n = shape
    k, array = min(shape), FLOAT * m * n
    beside = {"store": 0, "adam": 5 * array, "apply": 2 * array, "quintic": 2 * array}[epilogue]
    # B X reads X anyway, and a parameter is written in place of the product.
    more = {"store": 0, "adam": 5 * array, "apply": array, "quintic": 0}[epilogue]
    moved = FLOAT * (m * k + k * n) + array + more
    part = Part("", moved, "NN", m, n, k, epilogue, beside)

    def spent(one: Part, by_library: bool) -> float:
        tile = None if by_library else one.tile
        launch = Launch("", tile, by_library, count * one.bytes, {one: count})
        return launch.seconds(device, precision, reached=True) + LAUNCH.value

    library = spent(part.by_library, by_library=True)
    if epilogue != "store":
        library += spent(part.after_library, by_library=False)
    return spent(part, by_library=False), library


def least_side(device: Device, precision: str) -> int | None:
    """From where on the estimates prefer the library for all epilogues and any count, of square
    matrices and of those four times as long; None: nowhere."""
    least = None
    for side in range(8192, 0, -GRANULE):
        for shape in ((side, side), (side, 4 * side), (4 * side, side)):
            for epilogue in ("store", "adam", "apply", "quintic"):
                for count in COUNTS:
                    kernels, library = estimate(device, precision, epilogue, shape, count)
                    if library >= kernels:
                        return least
        least = side
    return least


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="the file to write; default: to the screen")
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="default: of the priced models")
    parser.add_argument(
        "--precisions", nargs="+", choices=products.PRECISIONS, default=list(products.PRECISIONS)
    )
    parser.add_argument("--matrices", type=int, default=4, help="of a shape in a step (default 4)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way (default 15)")
    parser.add_argument("--estimates", action="store_true", help="the sides of the package's file")
    options = parser.parse_args(arguments)
    if options.estimates:
        for device in DEVICES.values():
            for precision in products.PRECISIONS:
                print(device.name, precision, least_side(device, precision) or "kernels")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ops.backend_of(torch.zeros(1, device=device)) != "cuda":
        parser.error("needs a GPU of the CUDA backend (python -m dykaf)")
    if not ops.has_cublas():
        parser.error("torch has loaded no cuBLAS that can be called")
    capability = 90
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes or ()] or model_shapes()
    found = []
    for shape in shapes:
        for precision in options.precisions:
            found += time_shape(
                shape, precision, options.matrices, options.rounds, device, capability
            )
    text = file_of(found, capability, device)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
        print("\n".join(lines_of(found, capability)))
        print(f"written; to use it: export DYKAF_PRODUCTS={options.out.resolve()}")


if __name__ == "__main__":
    main()
