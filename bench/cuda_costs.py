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
    """choose_tile and num_tiles of csrc/cuda: name, number, rows, columns."""
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


def gemm(site: str, form: str, m: int, n: int, k: int, floats: float, params: float = 0) -> Cost:
    """A grouped multiplication D [m, n], in whole tiles: the padding is computed too."""
    name, number, rows, cols = tiles(form, m, n)
    return Cost(f"{site} {form} {name}", 2.0 * number * rows * cols * k, floats, params)


SKINNY_RANK = 64  # the default


def is_skinny(p: Matrix) -> bool:
    """As Layout.of in python/dykaf/state.py, with the default integrator and rank."""
    short, long = min(p.m, p.n), max(p.m, p.n)
    return p.left and p.right and short <= SKINNY_RANK and long >= max(2 * SKINNY_RANK, 16 * short)


def ours(p: Matrix) -> Iterator[Cost]:
    """What plan_grad_max and plan_step launch at the defaults."""
    yield from ours_skinny(p) if is_skinny(p) else ours_dense(p)


def ours_ksl(p: Matrix) -> Iterator[Cost]:
    """The same with the integrator "ksl"."""
    yield from ours_dense(p, integrator="ksl")


def ours_skinny(p: Matrix) -> Iterator[Cost]:
    """Of a skinny matrix, whose basis of the long side has SKINNY_RANK directions."""
    m, n, size = p.m, p.n, p.m * p.n
    short, long, rank = min(m, n), max(m, n), SKINNY_RANK
    wide = m < n
    rows, cols = (short, rank) if wide else (rank, short)
    yield Cost("grad_max", params=size)
    yield Cost("load", floats=size, params=size)
    side, form = ("left", "TN") if wide else ("right", "NN")
    yield gemm(f"into {side}", form, m, n, short, short * short + 2 * size)
    # exp_avg read and written, the rotated gradient read and written as rows of the basis
    yield Cost("skinny gradient", floats=4 * size)
    data = size + rank * long + short * rank  # V [rank, long]
    for _ in range(2):  # the gradient's and exp_avg's
        yield gemm("into V", "NT" if wide else "NN", rows, cols, long, data)
    yield Cost("skinny moments", floats=5 * short * rank)
    yield gemm("out of V", "NN" if wide else "TN", m, n, rank, data)
    yield Cost("beyond", floats=3 * size)
    yield Cost("skinny long factor", floats=2 * (1.5 * rank) ** 2)  # the part of `core` in use
    form = "NN" if wide else "NT"
    yield gemm(f"out {side}", form, m, n, short, short * short + size, 2 * size)
    form = "sym NT" if wide else "sym TN"
    yield gemm(f"{side} increment", form, short, short, long, size + 1.5 * short * short)
    yield Cost(f"{side} blend", floats=3 * short * short)


def ours_dense(p: Matrix, integrator: str = "diagonal") -> Iterator[Cost]:
    """With factors in full: "diagonal" or "ksl", and the full second moment."""
    m, n, s = p.m, p.n, p.m * p.n
    yield Cost("grad_max", params=s)  # reads G
    if not (p.left or p.right):
        # reads G, W, both moments; writes W and both moments
        yield Cost("adamw", floats=4 * s, params=3 * s)
        return
    yield Cost("load", floats=s, params=s)  # G to H = G / tau
    both = p.left and p.right
    if p.left:  # Q_L^T H; the last product before Adam brings the moments below
        yield gemm("into left", "TN", m, n, m, m * m + 2 * s + (0 if both else 5 * s))
    if p.right:  # (.) Q_R; Adam: two moments read and written, the update written beside H
        yield gemm("into right", "NN", m, n, n, n * n + 2 * s + 5 * s)
    if p.left:  # Q_L D; the last product reads and writes W in place of its result
        yield gemm("out left", "NN", m, n, m, m * m + (2 if both else 1) * s, 0 if both else 2 * s)
    if p.right:
        yield gemm("out right", "NT", m, n, n, n * n + s, 2 * s)
    # "ksl" multiplies H by the other factor first; the increments of both read two arrays then
    multiplies = both and integrator == "ksl"
    if multiplies:
        yield gemm("H R", "NN", m, n, n, 2 * s + n * n)
    read = 2 * s if multiplies else s
    if p.left:  # reads both operands and L's lower half; writes the whole increment
        yield gemm("left increment", "sym NT", m, m, n, read + 1.5 * m * m)
        yield Cost("left blend", floats=3 * m * m)  # L and the increment to L
    if multiplies:
        yield gemm("L H", "NN", m, n, m, 2 * s + m * m)
    if p.right:
        yield gemm("right increment", "sym TN", n, n, m, read + 1.5 * n * n)
        yield Cost("right blend", floats=3 * n * n)


QR = 8 / 3  # n^3 flops of a Householder QR with its Q formed
# Of CholeskyQR2: two Gram matrices as whole products, three decompositions (one to judge the
# columns), two triangular solves.
CHOLESKY_QR2 = 2 * 2 + 3 / 3 + 2 * 1


def sides(p: Matrix) -> list[int]:
    return [size for size, has in ((p.m, p.left), (p.n, p.right)) if has]


def our_sides(p: Matrix) -> list[int]:
    """Those with a factor in full, at the defaults."""
    return [min(p.m, p.n)] if is_skinny(p) else sides(p)


def our_refresh(p: Matrix) -> Iterator[Cost]:
    """One refresh of every side at the defaults."""
    yield from refresh_of(p, our_sides(p))
    if is_skinny(p):
        # Householder QR of all 2 k rows, F and its power iteration, Z P; passes over the basis
        long, rank, rows = max(p.m, p.n), SKINNY_RANK, 2 * SKINNY_RANK
        flops = 4.0 * long * rows**2 + (4 + 2 + QR) * rows**3 + 2.0 * long * rows * rank
        yield Cost("refresh", flops, 10 * rows * long)


def our_dense_refresh(p: Matrix) -> Iterator[Cost]:
    yield from refresh_of(p, sides(p))


def refresh_of(p: Matrix, factored: list[int]) -> Iterator[Cost]:
    """Of factors in full. The passes over n x n arrays beside the products are estimated."""
    s = p.m * p.n
    for n in factored:
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


# Launch sites of csrc/cuda/plan/step.cpp and factor_update.cpp: multiplications of general form,
# which may use four block shapes, symmetric ones, which may use two, and single launches. Each step
# besides: grad_max in two stages, prepare, adamw, load, update_rms.
ALWAYS = 6
ROTATIONS = 4
SITES = {
    "ksl": (2, 2, 4),  # H R, L H; (.) H^T, H^T (.); scalars and blend of each side
    # besides A H, H B; scalars and blend of matrices with a left factor alone, then of all
    "bug": (4, 2, 4),
    "diagonal": (0, 2, 4),  # scalars and blend of each side
}
# Of skinny matrices: gradient, moments, beyond, long factor, and a product into V and one out of it
# of one block shape, or for wide and tall ones in every shape but the largest.
SKINNY = (4 + 2, 4 + 4 * 3)
# Of `orthogonalize`: normalising, the bound and update_rms, then for each of its steps a Gram
# matrix, its square and a product, or of wide and tall matrices two Gram matrices, all in every
# block shape.
ORTHOGONALIZE = (1 + 1 + 1, 3, 2 * 2 + 2 + 4)
# Of matrices without factors: Adam and the parameter's update, where AdamW's launch does not serve.
UNSIDED = 2
SECOND_MOMENTS = {
    "full": 0,  # in the product's epilogue
    "rank_one": 5,  # row sums, row vector, column sums, vectors, Adam
    "factored": 4,
}
