"""Counts of what one optimizer step launches, moves and computes, kernel by kernel.

Bytes are those that kernels must move when each reads its inputs and writes its outputs once and
nothing stays in a cache from one kernel to the next. Flops are twice the multiply-adds of matrix
products; all else is small.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """`count` parameters of one shape; a side longer than max_dim has no factor."""

    m: int
    n: int
    count: int
    param_bytes: int  # of an entry of the parameter and of its gradient
    max_dim: int = 10000

    @property
    def left(self) -> bool:
        return self.m <= self.max_dim and self.is_matrix

    @property
    def right(self) -> bool:
        return self.n <= self.max_dim and self.is_matrix

    @property
    def is_matrix(self) -> bool:
        return self.m > 1 and self.n > 1


def vector(n: int, count: int, param_bytes: int) -> Matrix:
    return Matrix(1, n, count, param_bytes)


@dataclass(frozen=True)
class Cost:
    """One kernel on one matrix: flops, and numbers of four bytes and of the parameter's size."""

    launch: str  # the launch that it is part of
    flops: float = 0
    floats: float = 0
    params: float = 0


def tiles(form: str, m: int, n: int) -> tuple[str, int, int, int]:
    """choose_tile and num_tiles of csrc/cuda/gemm_plan.cu: name, number, rows, columns."""
    symmetric = form.startswith("sym")
    if m >= 768 and n >= 768:
        name, rows, cols = "large", 128, 128
    elif not symmetric and m <= 32:
        name, rows, cols = "wide", 16, 64
    elif not symmetric and n <= 32:
        name, rows, cols = "tall", 64, 16
    else:
        name, rows, cols = "medium", 64, 64
    down = math.ceil(m / rows)
    number = down * (down + 1) // 2 if symmetric else down * math.ceil(n / cols)
    return name, number, rows, cols


def product(site: str, form: str, m: int, n: int, k: int, floats: float, params: float = 0) -> Cost:
    """A grouped product D [m, n], in whole tiles: the padding is computed too."""
    name, number, rows, cols = tiles(form, m, n)
    return Cost(f"{site} {form} {name}", 2.0 * number * rows * cols * k, floats, params)


def ours_ksl(p: Matrix) -> Iterator[Cost]:
    """What plan_grad_max and plan_step launch with the integrator "ksl"."""
    yield from ours(p, integrator="ksl")


def ours(p: Matrix, integrator: str = "diagonal") -> Iterator[Cost]:
    """What plan_grad_max and plan_step launch: "diagonal" of metric power 0 (the default) or "ksl",
    with the full second moment."""
    m, n, s = p.m, p.n, p.m * p.n
    yield Cost("grad_max", params=s)  # reads G
    if not (p.left or p.right):
        # reads G, W, both moments; writes W and both moments
        yield Cost("adamw", floats=4 * s, params=3 * s)
        return
    yield Cost("load", floats=s, params=s)  # G to H = G / tau
    both = p.left and p.right
    if p.left:  # Q_L^T H; the last product before Adam brings the moments below
        yield product("into left", "TN", m, n, m, m * m + 2 * s + (0 if both else 5 * s))
    if p.right:  # (.) Q_R; Adam: two moments read and written, the update written beside H
        yield product("into right", "NN", m, n, n, n * n + 2 * s + 5 * s)
    if p.left:  # Q_L D; the last product reads and writes W in place of its result
        yield product(
            "out left", "NN", m, n, m, m * m + (2 if both else 1) * s, 0 if both else 2 * s
        )
    if p.right:
        yield product("out right", "NT", m, n, n, n * n + s, 2 * s)
    # "ksl" multiplies H by the other factor first; the increments of both read two arrays then
    multiplies = both and integrator == "ksl"
    if multiplies:
        yield product("H R", "NN", m, n, n, 2 * s + n * n)
    read = 2 * s if multiplies else s
    if p.left:  # reads both operands and L's lower half; writes the whole increment
        yield product("left increment", "sym NT", m, m, n, read + 1.5 * m * m)
        yield Cost("left blend", floats=3 * m * m)  # L and the increment to L
    if multiplies:
        yield product("L H", "NN", m, n, m, 2 * s + m * m)
    if p.right:
        yield product("right increment", "sym TN", n, n, m, read + 1.5 * n * n)
        yield Cost("right blend", floats=3 * n * n)


QR = 8 / 3  # n^3 flops of a Householder QR with its Q formed
# Of CholeskyQR2: two Gram matrices as whole products, three decompositions (one to judge the
# columns), two triangular solves.
CHOLESKY_QR2 = 2 * 2 + 3 / 3 + 2 * 1


def sides(p: Matrix) -> list[int]:
    return [size for size, has in ((p.m, p.left), (p.n, p.right)) if has]


def our_refresh(p: Matrix) -> Iterator[Cost]:
    """One refresh of every side. The passes over n x n arrays beside the products are estimated."""
    s = p.m * p.n
    for n in sides(p):
        # P^T A P of the sorted factor; Q P; every 32nd time Q^T Q and its product with Q
        yield Cost("refresh", (CHOLESKY_QR2 + 4 + 2 + 4 / 32) * n**3, 60 * n * n)
        yield Cost("refresh", 2.0 * s * n, 4 * s + n * n)  # P^T exp_avg, copied back
        yield Cost("refresh", floats=4 * s)  # exp_avg_sq reordered, copied back


def floor(p: Matrix) -> Iterator[Cost]:
    """The least of the default's algorithm: every array once in each direction it needs, symmetric
    results by halves, no padding."""
    m, n, s = p.m, p.n, p.m * p.n
    yield Cost("moments, G, W", floats=4 * s, params=3 * s)
    # L and R read and written, Q_L and Q_R read
    yield Cost("factors", floats=3 * sum(size * size for size in sides(p)))
    if p.left and p.right:
        yield Cost("products", 5.0 * s * (m + n))  # 2 + 2 for the rotations, 1 for the factors
    else:  # rotations in and out, one half product
        yield Cost("products", sum(5.0 * s * size for size in sides(p)))


def common_sequence(p: Matrix, factor_flops: float, factor_floats: float) -> Iterator[Cost]:
    """Eager PyTorch of SOAP and of the paper's code: the gradient and the momentum rotated in, the
    update out, element-wise operations one by one (bench/textbook.py)."""
    s = p.m * p.n
    for size in sides(p):
        for _ in range(3):
            yield Cost("rotate", 2.0 * s * size, 2 * s + size * size)
    # lerp 3, mul 2, addcmul 3, sqrt 2, div 2, add 2, reciprocal 2, mul 3, and two of W: 3 + 2
    yield Cost("element-wise", floats=22 * s, params=5 * s)
    yield Cost("factors", factor_flops, factor_floats)


def research(p: Matrix) -> Iterator[Cost]:
    """bench/textbook.py: six products for the integrator, 12 m n (m + n) flops in all."""
    s = p.m * p.n
    each = sum(size * size for size in sides(p))
    if p.left and p.right:
        # G R, (.) G^T, G^T L, (.) G, G V, (.) G^T; passes over n x n arrays: the decayed copy,
        # the sum, norm and quotient, two inner products
        flops, floats = 6.0 * s * (p.m + p.n), 13 * s + 10 * each
    else:
        flops, floats = sum(2.0 * s * size for size in sides(p)), s + 8 * each
    yield from common_sequence(p, flops, floats)


def soap(p: Matrix) -> Iterator[Cost]:
    """SOAP's published code: G G^T and G^T G, 8 m n (m + n) flops in all."""
    s = p.m * p.n
    each = sum(size * size for size in sides(p))
    # each product written, then lerp into the factor
    yield from common_sequence(
        p, sum(2.0 * s * size for size in sides(p)), len(sides(p)) * s + 4 * each
    )


def research_refresh(p: Matrix) -> Iterator[Cost]:
    for n in sides(p):  # Q^T M Q, M Q of the sorted columns, QR; exp_avg_sq reordered
        yield Cost("refresh", (6 + QR) * n**3, 30 * n * n)
        yield Cost("refresh", floats=4 * p.m * p.n)


def soap_refresh(p: Matrix) -> Iterator[Cost]:
    for n in sides(p):  # M Q, QR; exp_avg_sq reordered
        yield Cost("refresh", (2 + QR) * n**3, 20 * n * n)
        yield Cost("refresh", floats=4 * p.m * p.n)


# Launch sites of csrc/cuda/step.cu and factor_update.cu: products of general form, which may use
# four block shapes, symmetric ones, which may use two, and single launches. Each step besides:
# grad_max in two stages, prepare, adamw, load, update_rms.
ALWAYS = 6
ROTATIONS = 4
SITES = {
    "ksl": (2, 2, 4),  # H R, L H; (.) H^T, H^T (.); scalars and blend of each side
    # besides A H, H B; scalars and blend of matrices with a left factor alone, then of all
    "bug": (4, 2, 4),
    "diagonal": (0, 2, 4),  # with metric power 0: scalars and blend of each side
    "diagonal, a power": (0, 2, 7),  # besides weights and two weighings
}
SECOND_MOMENTS = {
    "full": 0,  # in the product's epilogue
    "rank_one": 5,  # row sums, row vector, column sums, vectors, Adam
    "factored": 4,
}
