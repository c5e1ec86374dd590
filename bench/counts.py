"""The least flops and bytes of each operation, by formula.

A multiply-add is two flops; only matrix products and decompositions count. A product that is
symmetric counts its lower triangle, whether or not an implementation computes both. Bytes: every
input is read once and every output written once, float32, as if all temporaries stayed in cache.
Decompositions take the usual counts (Golub & Van Loan): QR of d x k with Q formed
4 d k^2 - 4/3 k^3, eigenvectors of a symmetric d x d matrix 9 d^3. They do not run at the rate of a
product, so initialize_ and refresh_basis_ stay far from the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.machine import Peaks
from bench.shapes import Matrix

ITEM_BYTES = 4
NEWTON_SCHULZ_STEPS = 3  # as by default


@dataclass(frozen=True)
class Count:
    """What an operation does at least."""

    flops: float
    bytes: float

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def bound(self, peaks: Peaks, precision: str) -> tuple[float, str]:
        """The seconds that the peak rates allow at best, and which of them decides."""
        compute = self.flops / peaks.flops[precision]
        memory = self.bytes / peaks.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")


def product(m: int, k: int, n: int) -> float:
    """[m, k] times [k, n]."""
    return 2 * m * k * n


def symmetric_product(n: int, k: int) -> float:
    """[n, k] times [k, n] with a symmetric result."""
    return n * (n + 1) * k


def qr(d: int, k: int) -> float:
    """QR of [d, k], d >= k, with Q formed."""
    return 4 * d * k**2 - 4 / 3 * k**3


def eigenvectors(d: int) -> float:
    return 9 * d**3


def sides(x: Matrix) -> list[tuple[int, int]]:
    """Each side that keeps a factor, with the length of the other."""
    return [(x.m, x.n)] * x.left + [(x.n, x.m)] * x.right


def factor_floats(x: Matrix) -> int:
    """Numbers of L and R together."""
    return sum(d * d for d, _ in sides(x))


def of_floats(flops: float, floats: float) -> Count:
    return Count(flops, ITEM_BYTES * floats)


def grad_max(x: Matrix) -> Count:
    return of_floats(0, x.m * x.n)


def rotate(x: Matrix) -> Count:
    flops = sum(product(d, d, other) for d, other in sides(x))
    return of_floats(flops, 2 * x.m * x.n + factor_floats(x))


def adam_update(x: Matrix) -> Count:
    return of_floats(0, 6 * x.m * x.n)  # reads G and the moments, writes the moments and D


def orthogonalize(x: Matrix) -> Count:
    """X X^T, its square, and their sum times X, on the short side."""
    short, long = min(x.m, x.n), max(x.m, x.n)
    flops = symmetric_product(short, long) + symmetric_product(short, short)
    flops += product(short, short, long)
    return of_floats(NEWTON_SCHULZ_STEPS * flops, 2 * x.m * x.n)


def apply_update(x: Matrix) -> Count:
    return of_floats(0, 3 * x.m * x.n)


def factor_flops(x: Matrix, integrator: str) -> float:
    """The products of one integrator step."""
    flops = sum(symmetric_product(d, other) for d, other in sides(x))
    if not (x.left and x.right) or integrator == "diagonal":
        return flops
    flops += product(x.m, x.n, x.n) + product(x.m, x.m, x.n)  # H R and L H
    if integrator == "bug":
        flops += coupling_flops(x.m, x.n)
    return flops


def coupling_flops(m: int, n: int) -> float:
    """<A, H B H^T> as <A H, H B>, or as <A, C L C> with C = H H^T of the shorter side."""
    short, long = min(m, n), max(m, n)
    through_gram = symmetric_product(short, long) + product(short, short, short)
    through_gram += symmetric_product(short, short)
    return min(product(m, m, n) + product(m, n, n), through_gram)


def factor_update(x: Matrix, integrator: str) -> Count:
    return of_floats(factor_flops(x, integrator), x.m * x.n + 2 * factor_floats(x))


def first_basis_flops(d: int, other: int) -> float:
    """Eigenvectors of the range of G, completed to a basis Q, and Q^T F Q."""
    rotated = product(d, d, d) + symmetric_product(d, d)
    if other >= d:
        return eigenvectors(d) + rotated
    k = other
    ritz = qr(d, k) + product(d, d, k) + symmetric_product(k, d) + eigenvectors(k)
    return ritz + product(d, k, k) + qr(d, d) + rotated


def initialize(x: Matrix, integrator: str) -> Count:
    flops = factor_flops(x, integrator) + sum(first_basis_flops(*side) for side in sides(x))
    return of_floats(flops, x.m * x.n + 2 * factor_floats(x))


def refresh_flops(d: int, other: int) -> float:
    """QR, Q P, the symmetric product of a triangle, and exp_avg."""
    triangle = d * (d + 1) * (2 * d + 1) / 3
    return qr(d, d) + product(d, d, d) + triangle + product(d, d, other)


def refresh_basis(x: Matrix) -> Count:
    """Both sides, one after the other."""
    flops = sum(refresh_flops(*side) for side in sides(x))
    return of_floats(flops, 4 * factor_floats(x) + 4 * x.m * x.n * len(sides(x)))


def step(x: Matrix, integrator: str) -> Count:
    """A whole step without a refresh; G is read once, W, moments and factors read and written."""
    flops = 2 * rotate(x).flops + factor_flops(x, integrator)
    return of_floats(flops, 7 * x.m * x.n + 3 * factor_floats(x))


def total(count: Callable[[Matrix], Count], matrices: Iterable[Matrix]) -> Count:
    """The sum over all matrices, stacks included."""
    result = Count(0, 0)
    for x in matrices:
        one = count(x)
        result += Count(x.num_matrices * one.flops, x.num_matrices * one.bytes)
    return result
