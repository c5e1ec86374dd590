# ruff: noqa: E501  (the texts are lines of the sources)
"""The faults of mutate.py: what is replaced, where, and the checks that ought to notice.

What is left out because nothing observable changes: in gemm.cuh, cp_async_wait<0> after the loop
(groups that are still in flight there are empty); in factor_scalars.cu, either one of the two guards
of ksl_right (a vanished left norm makes the right one NaN, and <H^T U H, R> = ||H R H^T|| / ||K|| > 0
otherwise); in second_moment.cu, the last barrier of rank_one_vectors (the old scale was read before
the barriers of block_sum); in prepare.cu, which power of two tau is.
"""

from dataclasses import dataclass

PRODUCTS = ("product highest medium", "epilogue adam medium", "epilogue parameter medium")
SKIP_PRODUCTS = ("skip epilogue adam medium",)
ELEMENTS = ("adam", "apply", "skip adam", "skip apply")
FACTORS = ("factors", "skip factors")
ALL_TILES = ("Medium", "Wide", "Tall")


@dataclass(frozen=True)
class Mutant:
    """One fault; `old` occurs once in the file."""

    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...]
    # Of the products' kernels, where they are affected, the ones that are compiled.
    tiles: tuple[str, ...] = ("Medium",)
    precision: str = "Highest"


def faults(file: str, checks: tuple[str, ...], *rows: tuple, **fields) -> list[Mutant]:
    """Mutants of one file; a row is a name, the old text, the new text."""
    return [Mutant(name, file, old, new, checks, **fields) for name, old, new in rows]


TILE_LOADER = faults(
    "gemm_tile.cuh",
    PRODUCTS,
    ("a row too many is loaded", "+ i * kRowStep < rows ? 1u", "+ i * kRowStep <= rows ? 1u"),
    (
        "a column too many is loaded",
        "min(kChunk, cols - (col0 + col_))",
        "min(kChunk, cols + 1 - (col0 + col_))",
    ),
    ("an entry of k too many is loaded", "k_left - col_)", "k_left + 1 - col_)"),
    ("a row of k too many is loaded", "i * kRowStep < k_left", "i * kRowStep <= k_left"),
    ("windows move by columns", ": Shared::kRows * stride_;", ": Shared::kCols * stride_;"),
    ("16 bytes at once from any address", "if (vectorized_) {", "if (true) {"),
    ("whole chunks are copied", "num_inside(i, k_left) > 0", "true"),
    ("single copies without a tail", "j < count ? 4 : 0", "4"),
    ("one ring buffer too few", "= Tile::kStages * (TileA", "= (Tile::kStages - 1) * (TileA"),
    ("room for the finished tile only", "kLoopSize > kStagedSize ?", "kLoopSize < kStagedSize ?"),
) + faults(
    "gemm_tile.cuh",
    ("banks highest medium",),
    ("no padding along k", "(kAlongK ? 4 : 8)", "(kAlongK ? 0 : 8)"),
    ("no padding across k", "(kAlongK ? 4 : 8)", "(kAlongK ? 4 : 0)"),
    ("padding of half a line", "(kAlongK ? 4 : 8)", "(kAlongK ? 4 : 4)"),
)

FRAGMENTS = (
    faults(
        "gemm_fragments.cuh",
        PRODUCTS,
        ("A: rows of ldmatrix", "+ k + lane / 16 * 4);", "+ k + lane / 8 % 2 * 4);"),
        (
            "A: registers 1 and 2 swapped",
            "a[1] = __float_as_uint(load_shared(p + 8));\n"
            "    a[2] = __float_as_uint(load_shared(p + 4 * Shared::kStride));",
            "a[2] = __float_as_uint(load_shared(p + 8));\n"
            "    a[1] = __float_as_uint(load_shared(p + 4 * Shared::kStride));",
        ),
        (
            "B: columns and k of ldmatrix swapped",
            "lane / 16 * 8) * Shared::kStride + k + lane / 8 % 2 * 4",
            "lane / 8 % 2 * 8) * Shared::kStride + k + lane / 16 * 4",
        ),
        (
            "B: fourth row of k read for the fifth",
            "b0[1] = __float_as_uint(load_shared(p + 4 * Shared::kStride));",
            "b0[1] = __float_as_uint(load_shared(p + 3 * Shared::kStride));",
        ),
        ("big part keeps its low bits", "(x + 0x1000u) & kTf32Mask", "x + 0x1000u"),
        ("small A times big B left out", "      mma_tile_tf32(acc, small.a, x.b);\n", ""),
        ("big A times small B left out", "      mma_tile_tf32(acc, x.a, small.b);\n", ""),
        ("second pair of B's columns", "col + 8 * j, k, lane", "col + 4 * j, k, lane"),
    )
    + faults(
        "gemm_fragments.cuh",
        ("product high medium",),
        ("B is truncated", "      round_fragments(x.b);\n", ""),
        precision="High",
    )
    + faults(
        "gemm_fragments.cuh",
        ("product medium medium",),
        (
            "first half of k packed twice",
            "__uint_as_float(hi[i][r + kHalf])",
            "__uint_as_float(lo[i][r + kHalf])",
        ),
        ("first half of k loaded twice", "row, col, k + 8, lane", "row, col, k, lane"),
        precision="Medium",
    )
)

MAIN_LOOP = (
    faults(
        "gemm.cuh",
        PRODUCTS,
        (
            "no barrier in the loop",
            "kStages - 2>();\n    __syncthreads();\n",
            "kStages - 2>();\n",
        ),
        (
            "barrier of a warp in the loop",
            "kStages - 2>();\n    __syncthreads();\n",
            "kStages - 2>();\n    __syncwarp();\n",
        ),
        (
            "barrier of some warps",
            "kStages - 2>();\n    __syncthreads();\n",
            "kStages - 2>();\n    if (warp != 1) __syncthreads();\n",
        ),
        ("waits for one stage less", "kStages - 2>();", "kStages - 1>();"),
        (
            "waits after the barrier",
            "    cp_async_wait<Tile::kStages - 2>();\n    __syncthreads();\n",
            "    __syncthreads();\n    cp_async_wait<Tile::kStages - 2>();\n",
        ),
        (
            "no empty groups",
            "    }\n    cp_async_commit();  // an empty group too, so that groups count stages\n",
            "      cp_async_commit();\n    }\n",
        ),
        ("ring of one buffer less", "filled + 1 == Tile::kStages", "filled + 2 == Tile::kStages"),
        ("ring read out of step", "current + 1 == Tile::kStages", "current + 2 == Tile::kStages"),
        ("tile written over the ring", "cp_async_wait<0>();\n  __syncthreads();\n", ""),
        (
            "finished tile read too early",
            "warp_row, warp_col, lane);\n  __syncthreads();\n",
            "warp_row, warp_col, lane);\n",
        ),
        ("rest of k left out", "(p.k + Tile::kK - 1) / Tile::kK", "max(1, p.k / Tile::kK)"),
        ("accumulator is not cleared", "        acc[i][j][r] = 0.0f;\n", ""),
        (
            "second accumulator is forgotten",
            "add_and_clear(acc, total);\n  cp_async",
            "{}\n  cp_async",
        ),
        (
            "result registers swapped",
            "make_float2(acc[i][j][0], acc[i][j][1])",
            "make_float2(acc[i][j][0], acc[i][j][2])",
        ),
        ("lower rows misplaced", "upper + 8 * stride", "upper + 4 * stride"),
        ("A's alignment hangs on its base", "is_aligned(p.A, cols_a, 4)", "is_aligned(p.A, 0, 4)"),
        ("B's alignment hangs on its base", "is_aligned(p.B, cols_b, 4)", "is_aligned(p.B, 0, 4)"),
        ("B's first column", "kTransposeB ? 0 : place.col0", "0"),
        ("tiles counted along the wrong side", "(p.n + Tile::kN - 1)", "(p.m + Tile::kN - 1)"),
        ("a row outside of the matrix", "min(p.m - place.row0", "min(p.m + 1 - place.row0"),
        ("a column outside of the matrix", "min(p.n - place.col0", "min(p.n + 1 - place.col0"),
        ("diagonal tiles taken for others", "kSymmetric && i == j", "false"),
        (
            "partial sums of another problem",
            "static_cast<int64_t>(tile - p.tile_begin) * kNumSums",
            "static_cast<int64_t>(tile) * kNumSums",
        ),
        (
            "tile of another problem",
            "locate_tile<Tile, kSymmetric>(p, tile - p.tile_begin)",
            "locate_tile<Tile, kSymmetric>(p, tile)",
        ),
    )
    + faults(
        "gemm.cuh",
        ("truncated sums",),
        (
            "one accumulator for all of k",
            "if ((stage + 1) % kStagesOfSum == 0) add_and_clear(total, acc);",
            "(void)kStagesOfSum;",
        ),
        ("sums of half the depth again", "kDepthOfSum = 256", "kDepthOfSum = 512"),
    )
    + faults(
        "gemm.cuh",
        SKIP_PRODUCTS,
        (
            "skip flag ignored",
            "scalars[p.matrix_idx].active == 0) return;",
            "num_problems < 0) return;",
        ),
    )
)

EPILOGUES = faults(
    "gemm_epilogue.cuh",
    PRODUCTS,
    ("lower triangle and one more", "min(place_.cols, row + 1)", "min(place_.cols, row + 2)"),
    ("rows outside are stored", "if (row < place_.rows && count > 0)", "if (count > 0)"),
    (
        "diagonal stored twice",
        "(!place_.diagonal || col < row)",
        "(!place_.diagonal || col <= row)",
    ),
    (
        "columns outside are mirrored",
        "row < place_.rows && col < place_.cols &&",
        "row < place_.rows &&",
    ),
    (
        "nothing is mirrored beside the diagonal",
        "(!place_.diagonal || col < row)",
        "place_.diagonal && col < row",
    ),
    (
        "mirrored tile is transposed back",
        "staged_[row * stride_ + col];",
        "staged_[col * stride_ + row];",
    ),
    ("D's alignment hangs on its base", "is_aligned(p_.D, p_.n, 4)", "is_aligned(p_.D, 0, 4)"),
    ("C's alignment is taken for granted", " && is_aligned(p_.C, p_.n, 4);", ";"),
    ("the update's alignment is taken for granted", " && is_aligned(p_.update, p_.n, 4)", ""),
    ("both places count once", "both_places ? 2.0f : 1.0f", "both_places ? 1.0f : 1.0f"),
    (
        "the diagonal counts twice",
        "!(place_.diagonal && col + i == row)",
        "(col + i != row || true)",
    ),
    (
        "sums over what is outside",
        "      if (i < count) sums[0] += update[i]",
        "      sums[0] += update[i]",
    ),
    ("16-bit parameters aligned as floats", "element_size(matrix.dtype))", "4)"),
    (
        "master's alignment hangs on its base",
        "is_aligned(matrix.master, p_.n, 4)",
        "is_aligned(matrix.master, 0, 4)",
    ),
    (
        "exp_avg_sq is not stored",
        "    store_unit(matrix.exp_avg_sq + start, count, aligned, exp_avg_sq);\n",
        "",
    ),
) + faults(
    "gemm_epilogue.cuh",
    ("step ksl",),
    (
        "Adam keeps the gradient for itself",
        "    store_unit(p_.D + start, count, aligned, h);\n",
        "",
    ),
    tiles=ALL_TILES,
)

DEVICE = (
    faults(
        "device/reduce.cuh",
        ("adam full", "product highest medium NN sums"),
        (
            "no barrier before the sum",
            "  }\n  __syncthreads();\n#pragma unroll\n",
            "  }\n#pragma unroll\n",
        ),
        ("half a warp is summed", "int offset = kWarpSize / 2;", "int offset = kWarpSize / 4;"),
        (
            "a warp is left out",
            "w < num_threads / kWarpSize;",
            "w < max(1, num_threads / kWarpSize - 1);",
        ),
    )
    + faults(
        "device/reduce.cuh",
        ("factors many tiles",),
        ("no barrier after the sum", "  }\n  __syncthreads();\n}", "  }\n}"),
    )
    + faults(
        "device/lookup.cuh",
        ("product highest medium NN", "adam full"),
        ("first tile belongs to the problem before", ".tile_begin <= tile", ".tile_begin < tile"),
        ("last problem is not found", "hi = num_problems - 1", "hi = max(0, num_problems - 2)"),
    )
    + faults(
        "device/vector.cuh",
        ("adam", "apply", "grad_max", "epilogue parameter medium"),
        ("reads beyond a float unit", "i < count ? p[i] : 0.0f", "p[i]"),
        ("reads beyond a 16-bit unit", "i < count ? p[i] : uint16_t{0}", "p[i]"),
        (
            "writes beyond a float unit",
            "    return;\n  }\n#pragma unroll\n  for (int i = 0; i < kUnit; ++i) {\n"
            "    if (i < count) p[i] = x[i];\n  }\n}\n\nDYKAF_DEVICE void load_unit_bits",
            "    return;\n  }\n#pragma unroll\n  for (int i = 0; i < kUnit; ++i) {\n"
            "    p[i] = x[i];\n  }\n}\n\nDYKAF_DEVICE void load_unit_bits",
        ),
        ("halves of a word swapped", "(16 * (i % 2))", "(16 * (1 - i % 2))"),
        ("aligned to 8 bytes", "& 15u) == 0", "& 7u) == 0"),
        (
            "float16 read as bfloat16",
            "dtype == DType::kBFloat16 ? bfloat16_to_float(bits)",
            "dtype != DType::kFloat32 ? bfloat16_to_float(bits)",
        ),
        (
            "store moves whole units",
            "DYKAF_DEVICE void store_unit(float* p, int count, bool aligned, const float (&x)[kUnit]) {\n"
            "  if (aligned && count == kUnit) {",
            "DYKAF_DEVICE void store_unit(float* p, int count, bool aligned, const float (&x)[kUnit]) {\n"
            "  if (aligned) {",
        ),
    )
    + faults(
        "device/elements.cuh",
        ("adam", "apply", "epilogue parameter medium"),
        (
            "eps is corrected too",
            "sqrtf(exp_avg_sq[i]) * s.correction2 + s.eps",
            "(sqrtf(exp_avg_sq[i]) + s.eps) * s.correction2",
        ),
        ("gradient without tau", "const float g = s.tau * h[i];", "const float g = h[i];"),
        (
            "momentum is not corrected",
            "exp_avg[i] * s.correction1 / denominator",
            "exp_avg[i] / denominator",
        ),
        (
            "decay after the step",
            "value[i] * s.keep - s.lr * update[i]",
            "(value[i] - s.lr * update[i]) * s.keep",
        ),
        (
            "random numbers by the unit",
            "static_cast<uint64_t>(start + i)",
            "static_cast<uint64_t>(start + i / 8)",
        ),
        (
            "master rounds at random",
            "p.master != nullptr\n                  ?",
            "false\n                  ?",
        ),
        ("master is not stored", "if (p.master != nullptr) store_unit", "if (false) store_unit"),
        (
            "float16 rounds to nearest",
            "nearest_float16(round_to_float16(x, random))",
            "nearest_float16(x)",
        ),
    )
)

ELEMENT_KERNELS = (
    faults(
        "elements.cu",
        ELEMENTS,
        (
            "units cross rows",
            "min(int64_t{kUnit}, n - place.col)",
            "min(int64_t{kUnit}, n + 1 - place.col)",
        ),
        ("a unit too many", "if (unit >= num_units) break;", "if (unit > num_units) break;"),
        ("gradient is not scaled", "x[i] *= s.load_scale;", "x[i] *= 1.0f / s.tau;"),
        ("input taken for aligned", "is_aligned(e.in, place.start, 4), x);", "true, x);"),
        ("output taken for aligned", "is_aligned(e.out, place.start, 4),", "true,"),
        (
            "16-bit gradient aligned as floats",
            "is_aligned(p.grad, place.start, element_size(p.dtype))",
            "is_aligned(p.grad, place.start, 4)",
        ),
        ("master taken for aligned", "is_aligned(p.master, place.start, 4)", "true"),
        (
            "sums over what is outside",
            "squares += i < place.count ? update[i] * update[i] : 0.0f;",
            "squares += update[i] * update[i];",
        ),
        (
            "partial sums of another problem",
            "e.partials[block - e.tile_begin]",
            "e.partials[block]",
        ),
        (
            "first block of another problem",
            "static_cast<int64_t>(block - e.tile_begin) * kUnitsPerBlock",
            "static_cast<int64_t>(block) * kUnitsPerBlock",
        ),
        ("skip flag ignored", "  if (s.active == 0) return;\n", ""),
        ("root is not corrected", "row_root[place.row] * s.correction2", "row_root[place.row]"),
        (
            "roots of another column",
            "col_root + place.col, place.count",
            "col_root + place.col / 16 * 8, place.count",
        ),
        (
            "update_rms ignores the skip flag",
            "if (matrices.scalars[r.matrix_idx].active == 0) return;",
            "",
        ),
        ("update_rms of a row", "static_cast<double>(p.m * p.n)", "static_cast<double>(p.n)"),
    )
    + faults(
        "elements.cu",
        ("epilogue adam medium", "step long sides"),
        (
            "update_rms adds every sum",
            "static_cast<int64_t>(i) * r.stride",
            "static_cast<int64_t>(i)",
        ),
        (
            "update_rms of the first 32 tiles",
            "i < r.num_partials; i += kWarpSize",
            "i < min(r.num_partials, kWarpSize); i += kWarpSize",
        ),
    )
    + faults(
        "elements.cu",
        FACTORS,
        ("columns weighed by a row's weight", "x[i] *= e.row[place.row];", "x[i] *= e.row[0];"),
        ("columns are not weighed", "x[i] *= weights[i];", "x[i] *= 1.0f;"),
        ("increment of NaN is added", "if (keep == 1.0f && gain == 0.0f) return;", ""),
        ("zero gradient blends", "s.zero_gradient != 0 || ", ""),
        ("stopped matrix blends", " || s.stopped != 0) return;", ") return;"),
        ("blending ignores the skip flag", "if (s.active == 0 || s.zero", "if (s.zero"),
        ("factor taken for aligned", "is_aligned(b.factor, start, 4) && ", ""),
        ("factor's tail", "min(int64_t{kUnit}, b.size - start)", "int64_t{kUnit}"),
        ("blend a block too far", "if (start >= b.size) return;", "if (start > b.size) return;"),
    )
)

FACTOR_SCALARS = faults(
    "factor_scalars.cu",
    FACTORS,
    (
        "ksl: c without a",
        "s.c = a * K.with_factor(a, b) / norm;",
        "s.c = K.with_factor(a, b) / norm;",
    ),
    ("ksl: never stops", "s.stopped = norm > 0 ? 0 : 1;\n  s.c", "s.stopped = 0;\n  s.c"),
    (
        "ksl: the right side goes on",
        "  if (s.stopped != 0) return;\n  const double norm = B.norm(s.c, b);\n"
        "  s.stopped = norm > 0 ? 0 : 1;\n  if (s.stopped != 0) return;\n",
        "  const double norm = B.norm(s.c, b);\n",
    ),
    ("norm with half its mixed term", "2 * a * b * FA", "a * b * FA"),
    ("bug: one increment's square", "a * b * (K.AA + J.AA)", "a * b * (K.AA + K.AA)"),
    ("bug: no coupling", " + b * b * coupling", ""),
    (
        "bug: never stops",
        "s.stopped = norm > 0 ? 0 : 1;\n  if (s.stopped != 0) return;\n  set_blend(s, Side::kLeft",
        "set_blend(s, Side::kLeft",
    ),
    ("average: never stops", "if (!(norm > 0)) {", "if (norm < 0) {"),
    (
        "average: rho of one side",
        "if (p.L == nullptr || p.R == nullptr) {",
        "if (p.L == nullptr && p.R == nullptr) {",
    ),
    (
        "average: not over the size",
        "average(s, p, side, left, a, b / f.size)",
        "average(s, p, side, left, a, b)",
    ),
    ("rho decays twice", "} else if (f.stage != FactorStage::kKslLeft) {", "} else {"),
    ("rho decays by the whole beta", "p.rho[0] * sqrt(beta)", "p.rho[0] * beta"),
    (
        "rho of the other side decays",
        "p.rho[static_cast<int>(side)] *= sqrt(beta)",
        "p.rho[1 - static_cast<int>(side)] *= beta",
    ),
    ("a from the other side's rho", "p.rho[is_average ? static_cast<int>(side) : 0]", "p.rho[0]"),
    ("skip flag ignored", "  if (s.active == 0) return;\n", ""),
    (
        "weights ignore the skip flag",
        "  if (matrices.scalars[p.matrix_idx].active == 0) return;\n",
        "",
    ),
    (
        "weights without a least one",
        "fmax(diagonal(i) / (mean[0] / n), kLeastWeight)",
        "diagonal(i) / (mean[0] / n)",
    ),
    ("weights not of mean one", "weight(i) / (total[0] / n)", "weight(i)"),
    (
        "diagonal out of step",
        "static_cast<int64_t>(i) * p.n + i]",
        "static_cast<int64_t>(i) * p.n]",
    ),
    (
        "sums of the first 128 tiles",
        "tile < num_tiles; tile += kThreads",
        "tile < min(num_tiles, kThreads); tile += kThreads",
    ),
)

PREPARE = faults(
    "prepare.cu",
    ("adam", "apply", "factors", "skip", "step amp", "step many"),
    ("amp_scale ignored", "if (inputs.amp_scale != nullptr) scale", "if (false) scale"),
    ("lr on the device ignored", "inputs.lr == nullptr ?", "true ?"),
    ("a skipped step counts", "if (s.active != 0 && step_count", "if (step_count"),
    ("every call counts", " && step_count == StepCount::kAdvance) *p.step", ") *p.step"),
    ("skip flag ignored", "*inputs.skip == 0 ? 1 : 0", "*inputs.skip == 0 ? 1 : 1"),
    ("a negated gradient has no size", "grad_max * fabs(scale)", "grad_max * scale"),
    ("rho has no size", "largest = largest < p.rho[side] ? p.rho[side] : largest;", ""),
    ("any exponent", "kMaxExponent = 125", "kMaxExponent = 150"),
    ("tau far below", "exponent = max(-kMaxExponent", "exponent = max(-kMaxExponent + 60"),
    ("zero gradient unnoticed", "grad_max == 0.0 ? 1 : 0", "grad_max < 0.0 ? 1 : 0"),
    (
        "no root in a correction",
        "1 / sqrt(1 - pow(options.beta2, step))",
        "1 / (1 - pow(options.beta2, step))",
    ),
    ("one random stream", "rounding_key(options.seed, p.stream,", "rounding_key(options.seed, 0,"),
    ("the same random numbers each step", "static_cast<uint64_t>(*p.step))", "0)"),
    ("a matrix too many", "if (idx >= matrices.num) return;", "if (idx > matrices.num) return;"),
    ("gradient not over tau", "scale / static_cast<double>(s.tau)", "scale"),
    ("no weight decay", "1 - lr * options.weight_decay", "1.0"),
)

SECOND_MOMENT = faults(
    "second_moment.cu",
    ("adam rank_one", "adam factored", "skip adam"),
    ("a row too many", "if (row >= p.m) return;", "if (row > p.m) return;"),
    (
        "columns are not weighed",
        "rank_one ? unit_entry(p.exp_avg_sq_col",
        "false ? unit_entry(p.exp_avg_sq_col",
    ),
    ("old vectors read at the start", "return scale == 0.0 ?", "return scale < 0.0 ?"),
    ("no barrier between the warps", "lane] = sum;\n  __syncthreads();\n", "lane] = sum;\n"),
    ("columns outside are read", "i < p.m && col < p.n;", "i < p.m;"),
    (
        "columns outside are written",
        "if (warp != 0 || col >= p.n) return;",
        "if (warp != 0) return;",
    ),
    (
        "every warp writes the columns",
        "if (warp != 0 || col >= p.n) return;",
        "if (col >= p.n) return;",
    ),
    ("half of a row is summed", "int offset = kWarpSize / 2;", "int offset = kWarpSize / 4;"),
    ("rows are not weighed", "q.u != nullptr ? q.u[i] : 1.0", "1.0"),
    ("u is not normalised", "q.u[i] /= norm;", "q.u[i] /= 1.0;"),
    ("c without a", "q.scratch[0] = w.a * sums[1] / norm;", "q.scratch[0] = sums[1] / norm;"),
    (
        "moves where the norm vanishes",
        "q.scratch[1] != 0.0 && norm > 0",
        "norm >= 0 || norm != norm",
    ),
    ("scale without its root", "w.unit * sqrt(norm)", "w.unit * norm"),
    ("root without the scale", " * static_cast<float>(new_scale);", ";"),
    (
        "no guard of a mean of zero",
        "mean[0] > 0 ? static_cast<float>(1 / sqrt(mean[0])) : 0.0f",
        "static_cast<float>(1 / sqrt(mean[0]))",
    ),
    ("row means over the rows", "gain / n * q.row_sums[i]", "gain / m * q.row_sums[i]"),
    ("means without tau", "(1 - beta2) * tau * tau;", "(1 - beta2);"),
    ("weights without tau", "(1 - beta2) * new_part * new_part", "(1 - beta2)"),
    (
        "row sums ignore the skip flag",
        "if (matrices.scalars[q.matrix_idx].active == 0) return;\n  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int64_t row",
        "const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int64_t row",
    ),
    (
        "column sums ignore the skip flag",
        "if (matrices.scalars[q.matrix_idx].active == 0) return;\n  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int warp",
        "const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int warp",
    ),
    (
        "row vector ignores the skip flag",
        "if (s.active == 0 || q.u == nullptr) return;",
        "if (q.u == nullptr) return;",
    ),
    ("vectors ignore the skip flag", "  if (s.active == 0) return;\n", ""),
)

GRAD_MAX = faults(
    "grad_max.cu",
    ("grad_max",),
    ("NaN lost between lanes", "a > b || a != a ? a : b", "a > b ? a : b"),
    (
        "NaN lost in a thread",
        "magnitude(x[j]);\n      largest = value > largest || value != value ?",
        "magnitude(x[j]);\n      largest = value > largest ?",
    ),
    (
        "NaN lost between blocks",
        "p.partials[i];\n    largest = value > largest || value != value ?",
        "p.partials[i];\n    largest = value > largest ?",
    ),
    ("infinity is a number", "x - x == 0.0f ?", "x == x ?"),
    ("signs stay", "? fabsf(x) :", "? x :"),
    (
        "no barrier between the warps",
        "scratch[warp] = value;\n  __syncthreads();\n",
        "scratch[warp] = value;\n",
    ),
    ("a warp is left out", "w < kThreads / 32;", "w < kThreads / 32 - 1;"),
    (
        "block reads on",
        "min(gradient.size, begin + kElementsPerBlock)",
        "min(gradient.size + 1, begin + kElementsPerBlock)",
    ),
    ("tail of a gradient", "min(int64_t{kUnit}, end - i)", "int64_t{kUnit}"),
    ("partial maxima of another gradient", "p.partials[block - p.tile_begin]", "p.partials[block]"),
    (
        "block of another gradient",
        "(block - p.tile_begin) * kElementsPerBlock",
        "block * kElementsPerBlock",
    ),
    (
        "maximum of the first 256 blocks",
        "i < p.num_tiles; i += kThreads",
        "i < min(p.num_tiles, kThreads); i += kThreads",
    ),
    ("taken for aligned", "is_aligned(gradient.data, 0, 0)", "true"),
)

PLANS = (
    faults(
        "gemm_plan.cu",
        ("plan", "step ksl"),
        (
            "a symmetric product's grid is full",
            "symmetric ? tiles_m * (tiles_m + 1) / 2",
            "symmetric ? tiles_m * tiles_m",
        ),
        (
            "tiles rounded down",
            "tiles_m * ceil_div(n, Tile::kN)",
            "tiles_m * (1 + (n - 1) / Tile::kN + n / 500)",
        ),
    )
    + faults(
        "step.cu",
        ("step ksl", "step rank_one"),
        ("gradient overwritten, two bases", "both ? update : product", "product"),
        ("gradient overwritten, one basis", "both ? update : product", "update"),
        ("sums of another stride", "num_partials, kNumSums, i}", "num_partials, 1, i}"),
    )
    + faults(
        "factor_update.cu",
        ("factors bug", "factors ksl", "factors diagonal"),
        (
            "bug: the left factor moves too early",
            "blend_of(Side::kLeft, i, left_increment_, right_blends_)",
            "blend_of(Side::kLeft, i, left_increment_, left_blends_)",
        ),
        (
            "weights of the other side",
            "weigh_left_.back().col = w_R",
            "weigh_left_.back().row = w_L",
        ),
    )
    + faults(
        "adam_update.cu",
        ("adam",),
        (
            "roots swapped",
            "e.row = q.row_root;\n    e.col = q.col_root;",
            "e.row = q.col_root;\n    e.col = q.row_root;",
        ),
    )
)

MUTANTS = [
    *TILE_LOADER,
    *FRAGMENTS,
    *MAIN_LOOP,
    *EPILOGUES,
    *DEVICE,
    *ELEMENT_KERNELS,
    *FACTOR_SCALARS,
    *PREPARE,
    *SECOND_MOMENT,
    *GRAD_MAX,
    *PLANS,
]
