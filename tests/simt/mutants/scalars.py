"""Faults in the scalars, the second moments, max|G| and the planning."""

from .fault import faults

FACTORS = ("factors", "skip factors")

FACTOR_SCALARS = faults(
    "kernels/factor_scalars.cu",
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
        "sums of the first 128 tiles",
        "tile < num_tiles; tile += kThreads",
        "tile < min(num_tiles, kThreads); tile += kThreads",
    ),
)

PREPARE = faults(
    "kernels/prepare.cu",
    ("adam", "apply", "factors", "skip", "step amp", "step many"),
    ("amp_scale ignored", "if (inputs.amp_scale != nullptr) scale", "if (false) scale"),
    ("lr on the device ignored", "inputs.lr == nullptr ?", "true ?"),
    ("the rate of another matrix", "p.rate.lr", "group.matrices[0].rate.lr"),
    ("a skipped step counts", "if (s.active != 0 && step_count", "if (step_count"),
    ("every call counts", " && step_count == StepCount::kAdvance) *p.step", ") *p.step"),
    ("skip flag ignored", "*inputs.skip == 0 ? 1 : 0", "*inputs.skip == 0 ? 1 : 1"),
    (
        "a negated gradient has no size",
        "largest = grad_max * fabs(scale)",
        "largest = grad_max * scale",
    ),
    (
        "rounding of a negated gradient",
        "static_cast<float>(grad_max * fabs(scale)",
        "static_cast<float>(grad_max * scale",
    ),
    ("rounding in units of the gradient", " / static_cast<double>(s.tau) *", " *"),
    (
        "any tau for Adam",
        "fminf(s.tau, static_cast<float>(largest_adam_tau<float>(p.m, p.n)))",
        "s.tau",
    ),
    ("bound of the step before", "update_bound(options, step)", "update_bound(options, step + 1)"),
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
    ("a matrix too many", "if (idx >= group.num) return;", "if (idx > group.num) return;"),
    ("gradient not over tau", "scale / static_cast<double>(s.tau)", "scale"),
    ("no weight decay", "1 - lr * p.rate.weight_decay", "1.0"),
    ("Nesterov's momentum of AdamW", "options.nesterov && p.rho != nullptr", "options.nesterov"),
    (
        "Nesterov's momentum in full",
        "options.beta1 * correction1 : correction1",
        "correction1 : correction1",
    ),
)

SECOND_MOMENT = faults(
    "kernels/second_moment.cu",
    ("adam rank_one", "adam factored", "skip adam"),
    ("a row too many", "if (row >= p.m) return;", "if (row > p.m) return;"),
    (
        "columns are not weighed",
        "rank_one ? unit_entry(p.exp_avg_sq_col",
        "false ? unit_entry(p.exp_avg_sq_col",
    ),
    ("squares of large gradients", "const double tau = s.adam_tau;", "const double tau = s.tau;"),
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
    ("a row is not summed", "  sum = warp_sum(sum);\n", ""),
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
        "if (group.scalars[q.matrix_idx].active == 0) return;\n"
        "  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int64_t row",
        "const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int64_t row",
    ),
    (
        "column sums ignore the skip flag",
        "if (group.scalars[q.matrix_idx].active == 0) return;\n"
        "  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;\n  const int warp",
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
    "kernels/grad_max.cu",
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
    ("a warp is left out", "w < kThreads / kWarpSize;", "w < kThreads / kWarpSize - 1;"),
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
        "kernels/gemm.cu",
        ("plan", "step ksl"),
        (
            "a symmetric result's grid is full",
            "is_symmetric(form) ? tiles_m * (tiles_m + 1) / 2",
            "is_symmetric(form) ? tiles_m * tiles_m",
        ),
        (
            "tiles rounded down",
            "tiles_m * ceil_div(n, Tile::kN)",
            "tiles_m * (n / Tile::kN)",
        ),
    )
    + faults(
        "plan/on_device.h",
        ("factors diagonal", "factors one-sided"),
        (
            "average: rho of one side",
            "(p.L != nullptr && p.R != nullptr) ||",
            "(p.L != nullptr || p.R != nullptr) ||",
        ),
    )
    + faults(
        "plan/on_device.h",
        ("orthogonalize",),
        ("momentum fades", "static_cast<float>(full_rms(options))", "0.3f"),
    )
    + faults(
        "plan/step.cpp",
        ("step ksl", "step rank_one"),
        ("gradient overwritten, two bases", "both ? update : scratch", "scratch"),
        ("gradient overwritten, one basis", "both ? update : scratch", "update"),
        ("sums of another stride", "sums.num, sums.stride, i}", "sums.num, 1, i}"),
    )
    + faults(
        "plan/factor_update.cpp",
        ("factors bug", "factors ksl", "factors diagonal"),
        (
            "bug: the left factor moves too early",
            "blend_of(Side::kLeft, i, arrays_.left_increment, right_blends_)",
            "blend_of(Side::kLeft, i, arrays_.left_increment, left_blends_)",
        ),
    )
    + faults(
        "plan/step.cpp",
        ("step orthogonalize", "skip step orthogonalize"),
        ("A is B", "/*A=*/left, /*B=*/right", "/*A=*/left, /*B=*/left"),
        ("A lies in the gradient", "/*A=*/left", "/*A=*/H"),
        ("Adam's update stays", "if (!orthogonal_.empty())", "if (false)"),
        ("without factors A is B", "scratch, A, B}", "scratch, A, A}"),
        ("without factors the parameter stays", "plan_.elements(applies_);", ""),
        (
            "without factors the bases are used",
            "} else if (p.is_unsided()) {",
            "} else if (false) {",
        ),
    )
    + faults(
        "plan/step_arrays.h",
        ("skinny step nesterov", "step orthogonalize", "plan workspace"),
        ("skinny updates made orthogonal", " && !p.is_skinny();", ";"),
        (
            "without factors no update is made orthogonal",
            "p.exp_avg_sq_row == nullptr && !orthogonalizes(p, options);",
            "p.exp_avg_sq_row == nullptr;",
        ),
        (
            "no room without a right factor",
            "right_increment = std::max(right_increment, square);",
            "(void)square;",
        ),
    )
    + faults(
        "plan/orthogonalize.cpp",
        ("orthogonalize",),
        (
            "Gram matrix of the long side's rows",
            "is_tall ? tall_grams : wide_grams;",
            "is_tall ? wide_grams : tall_grams;",
        ),
        ("bound from the sums of C", "sums.partials + kNumSums - 1", "sums.partials"),
        ("a bound for momentum", "starts_from_gram(options) ?", "true ?"),
        ("a bound in every step", "bound = nullptr;  // of the first step", ""),
        ("A without its bound", "    square.bound = bound;\n", ""),
        ("X without its bound", "    product.bound = bound;\n", ""),
        ("A^2 alone", "square.epilogue = Epilogue::kQuadratic;", ""),
        (
            "B X for X B",
            "is_tall ? gemm_problem(X, arrays.B, next",
            "is_tall ? gemm_problem(arrays.B, X, next",
        ),
        ("X is not added", "product.C = X;", "product.C = next;"),
        ("ends in scratch", "num_steps % 2 == 0 ? arrays.update : arrays.scratch", "arrays.update"),
        (
            "every step starts from the first X",
            "std::swap(X, next);",
            "std::swap(X, next);\n      if (!is_last) std::swap(X, next);",
        ),
        ("sums of another stride", "last.num, last.stride, i}", "last.num, 1, i}"),
        ("update_rms of the update before", "  plan.update_rms(sums);\n}\n\nPlan", "}\n\nPlan"),
    )
    + faults(
        "plan/adam_update.cpp",
        ("adam",),
        (
            "roots swapped",
            "q.row_root, q.col_root,",
            "q.col_root, q.row_root,",
        ),
    )
)
