"""Faults in what skinny matrices have of their own."""

from .fault import faults

CHECKS = ("skinny step", "skip skinny")

SKINNY = (
    faults(
        "kernels/skinny.cu",
        CHECKS,
        (
            "no barrier before the rows",
            "  __syncthreads();\n  const int64_t l",
            "  const int64_t l",
        ),
        ("writes beyond a row", "j + kQuad <= part.num_j && ", ""),
        ("rows taken for aligned", " && is_aligned(to, 0, 4)", ""),
        ("a row's tail is left out", "e < kQuad && j + e < part.num_j", "false"),
        ("rows over those in use", "p.basis + q.used * l", "p.basis + q.inner * l"),
        (
            "tail of the short side",
            "min(int64_t{kShort}, p.short_side() - part.i)",
            "int64_t{kShort}",
        ),
        ("tail of the long side", "min(int64_t{kLong}, p.long_side() - part.j)", "int64_t{kLong}"),
        ("parts of the short side", "tile % parts_i * kShort", "0 * kShort"),
        (
            "a tall tile is not turned",
            "(col + e) * kStride + row;",
            "(row + e) * kStride + col;",
        ),
        ("momentum without tau", "gradient_of(x[e], s), o)", "x[e], o)"),
        (
            "rounding enters the basis",
            "fabsf(x[e]) < s.noise ? 0.0f : x[e]",
            "x[e]",
        ),
        ("rounding in V", "fabsf(x) < noise ? 0.0f : x", "x"),
        ("rounding as of one entry", "s.noise * sqrtf(static_cast<float>(l))", "s.noise"),
        (
            "momentum's rounding in V",
            "fabsf(MV) < momentum_noise ? 0.0f : MV",
            "MV",
        ),
        ("no sum of the momentum", "  momentum_total = warp_sum(momentum_total);\n", ""),
        (
            "updates have no bound",
            "fminf(fmaxf(known * within, -s.update_bound), s.update_bound)",
            "known * within",
        ),
        ("Nesterov: nothing in V", ": MV, g, s);", ": MV, 0.0f, s);"),
        (
            "Nesterov: gradient over tau in V",
            ": MV, g, s);",
            ": MV, gradient_in(j), s);",
        ),
        (
            "sums of the first row",
            "q.sums[part.piece * p.short_side() + part.i + i] = sum",
            "q.sums[i] = sum",
        ),
        ("a piece is left out", "piece < ceil_div(l, kLong);", "piece < l / kLong;"),
        ("rows beyond the matrix", "if (i >= num_rows) return;", ""),
        ("no warp sum", "  total = warp_sum(total);\n", ""),
        ("what V sees is not taken off", "fmax(total - inside,", "fmax(total,"),
        ("no floor", "fmax(total - inside, o.least_outside * total)", "total - inside"),
        ("mean over all directions", "(l - q.inner)", "(l)"),
        (
            "the rest without tau",
            "exp_avg_sq[p.skinny_rank], s.adam_tau * rest",
            "exp_avg_sq[p.skinny_rank], rest",
        ),
        ("no broadcast", "  beyond = __shfl_sync(kFullMask, beyond, 0);\n", ""),
        (
            "V as if its part were not beyond",
            "s.update_bound) - known * beyond;",
            "s.update_bound);",
        ),
        (
            "no bias correction",
            "(sqrtf(second_moment) * s.correction2 + o.eps)",
            "(sqrtf(second_moment) + o.eps)",
        ),
        ("core does not decay", "*= decay;\n  }", "*= 1.0f;\n  }"),
        ("flat does not decay", "*p.flat *= decay;", ""),
        ("rows in use from the stride", "p.core[i / q.used * size + i % q.used]", "p.core[i]"),
        ("new rows weigh nothing", "(size + 1)] = added", "(size + 1)] = 0.0f"),
        ("rho of the short side", "p.rho[p.is_wide() ? 1 : 0]", "p.rho[p.is_wide() ? 0 : 1]"),
        ("rho is written too early", "  __syncthreads();  // all have read rho\n", ""),
        ("no trace", "  if (!(trace > 0)) return;\n", ""),
        ("skipped steps move on", "if (s.active == 0) return;\n  const Part", "const Part"),
    )
    + faults(
        "plan/skinny_update.cpp",
        CHECKS,
        (
            "V has all rows in use",
            "q.inner = static_cast<int32_t>(inner)",
            "q.inner = static_cast<int32_t>(p.rows[1])",
        ),
        (
            "beyond along the wrong side",
            "(p.is_wide() ? beyond.row : beyond.col)",
            "(p.m > p.n ? beyond.row : beyond.col)",
        ),
        (
            "Nesterov: no gradient beyond V",
            "options_.nesterov ? adam.H : nullptr",
            "nullptr",
        ),
        (
            "long factor before the moments",
            "    stage(SkinnyStage::kMoments);\n",
            "    stage(SkinnyStage::kLongFactor);\n",
        ),
    )
    + faults(
        "kernels/elements.cu",
        CHECKS,
        (
            "the rest without bias correction",
            "update[i] = numerator(update[i], gradient_of(h[i], s), s);",
            "update[i] += s.of_gradient * gradient_of(h[i], s);",
        ),
        (
            "Nesterov: rounding beyond V",
            "update[i] = numerator(update[i], gradient_of(h[i], s), s);",
            "update[i] = numerator(update[i], s.adam_tau * h[i], s);",
        ),
        ("rows weighed by the first's weight", "x[i] *= row[place.row];", "x[i] *= row[0];"),
        ("columns are not weighed", "x[i] *= weights[i];", "x[i] *= 1.0f;"),
        ("what V sees is lost", "update[i] += within[i];", "update[i] += 0 * within[i];"),
    )
    + faults(
        "plan/on_device.h",
        CHECKS,
        ("both sides take the short one's rho", " || p.is_skinny()", ""),
    )
)
