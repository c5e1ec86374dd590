"""Faults in the matrix multiplication."""

from .fault import faults

GEMM = ("gemm highest medium", "epilogue adam medium", "epilogue parameter medium")
SKIP_GEMM = ("skip epilogue adam medium",)
ALL_TILES = ("Medium", "Wide", "Tall")

TILE_LOADER = faults(
    "kernels/gemm_tile.cuh",
    GEMM,
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
    "kernels/gemm_tile.cuh",
    ("banks highest medium",),
    ("no padding along k", "(kAlongK ? 4 : 8)", "(kAlongK ? 0 : 8)"),
    ("no padding across k", "(kAlongK ? 4 : 8)", "(kAlongK ? 4 : 0)"),
    ("padding of half a line", "(kAlongK ? 4 : 8)", "(kAlongK ? 4 : 4)"),
)

FRAGMENTS = (
    faults(
        "kernels/gemm_fragments.cuh",
        GEMM,
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
        "kernels/gemm_fragments.cuh",
        ("gemm high medium",),
        ("B is truncated", "      round_fragments(x.b);\n", ""),
        precision="High",
    )
    + faults(
        "kernels/gemm_fragments.cuh",
        ("gemm medium medium",),
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
        "kernels/gemm.cuh",
        GEMM,
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
        (
            "tile written over the ring",
            "in flight are empty.\n  __syncthreads();\n",
            "in flight are empty.\n",
        ),
        (
            "finished tile read too early",
            "warp_row, warp_col, lane);\n  __syncthreads();\n",
            "warp_row, warp_col, lane);\n",
        ),
        ("rest of k left out", "(p.k + Tile::kK - 1) / Tile::kK", "max(1, p.k / Tile::kK)"),
        ("accumulator is not cleared", "        acc[i][j][r] = 0.0f;\n", ""),
        (
            "second accumulator is forgotten",
            "add_and_clear(acc, total);\n  // The",
            "{}\n  // The",
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
        "kernels/gemm.cuh",
        ("truncated sums",),
        (
            "one accumulator for all of k",
            "if ((stage + 1) % kStagesOfSum == 0) add_and_clear(total, acc);",
            "(void)kStagesOfSum;",
        ),
        ("sums of half the depth again", "kDepthOfSum = 256", "kDepthOfSum = 512"),
    )
    + faults(
        "kernels/gemm.cuh",
        SKIP_GEMM,
        (
            "skip flag ignored",
            "scalars[p.matrix_idx].active == 0) return;",
            "num_problems < 0) return;",
        ),
    )
)

EPILOGUES = (
    faults(
        "kernels/gemm_epilogue.cuh",
        GEMM,
        ("lower triangle and one more", "min(place_.cols, row + 1)", "min(place_.cols, row + 2)"),
        ("rows outside are stored", "if (row < place_.rows && count > 0)", "if (count > 0)"),
        (
            "diagonal stored twice",
            "(!place_.diagonal || col < row)",
            "(!place_.diagonal || col <= row)",
        ),
        (
            "nothing is mirrored beside the diagonal",
            "(!place_.diagonal || col < row)",
            "place_.diagonal && col < row",
        ),
        (
            "mirrored tile is transposed back",
            "product = staged_[row * stride_ + col];",
            "product = staged_[col * stride_ + row];",
        ),
        ("D's alignment is taken for granted", "is_aligned(p_.D, p_.n, 4) && ", ""),
        (
            "alignment hangs on the bases",
            "is_aligned(p_.D, p_.n, 4) && is_aligned(p_.C, p_.n, 4)",
            "is_aligned(p_.D, 0, 4) && is_aligned(p_.C, 0, 4)",
        ),
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
    )
    + faults(
        "kernels/gemm_epilogue.cuh",
        ("gemm highest medium", "orthogonalize 0"),
        (
            "the square is mirrored alone",
            "p_.epilogue == Epilogue::kQuadratic ? quadratic(p_.C[place], product) : product",
            "product",
        ),
        (
            "c for b",
            "static_cast<float>(NewtonSchulz::kB) * inverse_ * c",
            "static_cast<float>(NewtonSchulz::kC) * inverse_ * c",
        ),
        ("A over the bound's root", "(NewtonSchulz::kB) * inverse_ * c", "(NewtonSchulz::kB) * c"),
        ("A^2 over the bound", "inverse_ * inverse_ * product", "inverse_ * product"),
        ("X over the bound", "sqrtf(inverse_)", "inverse_"),
        ("C of no array", "if (p_.C != nullptr) load_unit", "load_unit"),
        ("no scale at the end", "kLastQuintic ? last_scale()", "kLastQuintic ? 1.0f"),
        ("scale in every step", "last_scale() : 1.0f", "last_scale() : last_scale()"),
        ("scale of the short side", "max(p_.m, p_.n)", "min(p_.m, p_.n)"),
        tiles=ALL_TILES,
    )
    + faults(
        "kernels/device/elements.cuh",
        ("gemm highest medium", "orthogonalize 0"),
        (
            "over a bound of zero",
            "*bound == 0.0f ? 1.0f : 1.0f / *bound",
            "*bound < 0.0f ? 1.0f : 1.0f / *bound",
        ),
        ("X without a", "static_cast<float>(NewtonSchulz::kA) * x", "x"),
        ("no update fades", "full_rms == 0.0f ? scale :", "true ? scale :"),
        ("large updates grow", "fminf(1.0f, *update_rms", "fmaxf(0.0f, *update_rms"),
        tiles=ALL_TILES,
    )
    + faults(
        "kernels/gemm_epilogue.cuh",
        ("step ksl",),
        (
            "Adam keeps the gradient for itself",
            "    store_unit(p_.D + start, count, aligned, h);\n",
            "",
        ),
        tiles=ALL_TILES,
    )
)
