"""Faults in the pieces that kernels share and in the element-wise kernels."""

from .fault import faults

ELEMENTS = ("adam", "apply", "skip adam", "skip apply")
FACTORS = ("factors", "skip factors")

DEVICE = (
    faults(
        "kernels/device/reduce.cuh",
        ("adam full", "gemm highest medium NN sums"),
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
        "kernels/device/reduce.cuh",
        ("factors many tiles",),
        ("no barrier after the sum", "  }\n  __syncthreads();\n}", "  }\n}"),
    )
    + faults(
        "kernels/device/lookup.cuh",
        ("gemm highest medium NN", "adam full"),
        ("first tile belongs to the problem before", ".tile_begin <= tile", ".tile_begin < tile"),
        ("last problem is not found", "hi = num_problems - 1", "hi = max(0, num_problems - 2)"),
    )
    + faults(
        "kernels/device/vector.cuh",
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
            "DYKAF_DEVICE void store_unit(float* p, int count, bool aligned, "
            "const float (&x)[kUnit]) {\n"
            "  if (aligned && count == kUnit) {",
            "DYKAF_DEVICE void store_unit(float* p, int count, bool aligned, "
            "const float (&x)[kUnit]) {\n"
            "  if (aligned) {",
        ),
    )
    + faults(
        "kernels/device/elements.cuh",
        ("adam", "apply", "epilogue parameter medium"),
        (
            "eps is corrected too",
            "/= sqrtf(exp_avg_sq[i]) * s.correction2 + o.eps",
            "/= (sqrtf(exp_avg_sq[i]) + o.eps) * s.correction2",
        ),
        ("gradient without tau", "0.0f : s.adam_tau * h;", "0.0f : h;"),
        ("rounding counts", "fabsf(h) < s.noise ? 0.0f : ", ""),
        ("squares overflow", "0.0f : s.adam_tau * h;", "0.0f : s.tau * h;"),
        (
            "momentum is not corrected",
            "s.of_momentum * exp_avg + s",
            "exp_avg + s",
        ),
        ("Nesterov's gradient is left out", " + s.of_gradient * g;", ";"),
        (
            "Nesterov's gradient is not over the root",
            "update[i] /= sqrtf(exp_avg_sq[i]) * s.correction2 + o.eps;",
            "update[i] = (update[i] - s.of_gradient * g[i]) / "
            "(sqrtf(exp_avg_sq[i]) * s.correction2 + o.eps) + s.of_gradient * g[i];",
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
        ("random numbers of a whole matrix", "if (kExtent == Extent::kShard)", "if (false)"),
        (
            "master rounds at random",
            "p.master != nullptr\n                  ?",
            "false\n                  ?",
        ),
        (
            "exp_avg_sq is not stored",
            "  store_unit(p.exp_avg_sq + start, count, aligned, exp_avg_sq);\n",
            "",
        ),
        ("a second moment of no array", "if (p.exp_avg_sq == nullptr) return;", ""),
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
        "kernels/elements.cu",
        ELEMENTS,
        (
            "units cross rows",
            "min(int64_t{kUnit}, n - place.col)",
            "min(int64_t{kUnit}, n + 1 - place.col)",
        ),
        ("a unit too many", "if (unit >= num_units) break;", "if (unit > num_units) break;"),
        (
            "compact updates have no bound",
            "fminf(fmaxf(ratio, -s.update_bound), s.update_bound)",
            "ratio",
        ),
        ("gradient is not scaled", "x[i] *= s.load_scale;", "x[i] *= 1.0f / s.tau;"),
        (
            "input taken for aligned",
            "load_unit(array + place.start, place.count, is_aligned(array, place.start, 4)",
            "load_unit(array + place.start, place.count, true",
        ),
        (
            "output taken for aligned",
            "store_unit(array + place.start, place.count, is_aligned(array, place.start, 4)",
            "store_unit(array + place.start, place.count, true",
        ),
        (
            "gradient taken for aligned",
            "is_aligned(p.grad, place.start, element_size(p.dtype))",
            "true",
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
            "if (group.scalars[r.matrix_idx].active == 0) return;",
            "",
        ),
        ("update_rms of a row", "static_cast<double>(p.m * p.n)", "static_cast<double>(p.n)"),
        (
            "compact: momentum of noise",
            "const float g = gradient_of(h[i], s);",
            "const float g = s.adam_tau * h[i];",
        ),
    )
    + faults(
        "kernels/elements.cu",
        ("orthogonalize",),
        ("norm of a row", "sqrtf(static_cast<float>(p.m * p.n))", "sqrtf(static_cast<float>(p.n))"),
        ("bound of a mean", "*r.norm = static_cast<float>(sqrt(sum[0]))", "*r.norm = sum[0] / p.m"),
        ("update_rms for the bound", "if (r.norm != nullptr) {", "if (false) {"),
        ("zero over zero", "norm == 0.0f ? 1.0f : norm", "norm"),
        ("update is not normalised", "update[i] /= divisor;", "update[i] /= 1.0f + 0 * divisor;"),
        (
            "X lands in the update",
            "store_place(e.X, place, update);",
            "store_place(const_cast<float*>(e.update), place, update);",
        ),
    )
    + faults(
        "kernels/elements.cu",
        ("epilogue adam medium", "step long sides"),
        (
            "update_rms adds every sum",
            "static_cast<int64_t>(i) * r.stride",
            "static_cast<int64_t>(i)",
        ),
        (
            "update_rms of the first 256 tiles",
            "i < r.num_partials; i += kThreads",
            "i < min(r.num_partials, kThreads); i += kThreads",
        ),
    )
    + faults(
        "kernels/elements.cu",
        FACTORS,
        ("increment of NaN is added", "if (keep == 1.0f && gain == 0.0f) return;", ""),
        ("zero gradient blends", "s.zero_gradient != 0 || ", ""),
        ("stopped matrix blends", " || s.stopped != 0) return;", ") return;"),
        ("blending ignores the skip flag", "if (s.active == 0 || s.zero", "if (s.zero"),
        ("factor taken for aligned", "is_aligned(b.factor, start, 4) && ", ""),
        ("factor's tail", "min(int64_t{kUnit}, b.size - start)", "int64_t{kUnit}"),
        (
            "units are blended twice, others never",
            "(first + u * kThreads + static_cast<int>(threadIdx.x)) * kUnit",
            "(first + u * kThreads / 2 + static_cast<int>(threadIdx.x)) * kUnit",
        ),
    )
)
