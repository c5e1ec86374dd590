"""Faults in what a library is asked for, in the rule, and in the kernels that follow it."""

from .fault import faults

STEPS = ("library",)

LIBRARY = (
    faults(
        "library/products.cpp",
        STEPS,
        (
            "A and B transposed the wrong way round",
            "batch.transpose_a = transposes_b(form)",
            "batch.transpose_a = transposes_a(form)",
        ),
        (
            "B is not transposed",
            "batch.transpose_b = transposes_a(form)",
            "batch.transpose_b = false",
        ),
        ("rows and columns stay", "batch.m = n;\n  batch.n = m;", "batch.m = m;\n  batch.n = n;"),
        (
            "columns of B as long as rows",
            "transposes_b(form) ? k : n;",
            "transposes_b(form) ? n : k;",
        ),
        (
            "columns of A as long as rows",
            "transposes_a(form) ? m : k;",
            "transposes_a(form) ? k : m;",
        ),
        ("D by its other side", "batch.ldd = n;", "batch.ldd = m;"),
        ("full precision is rounded", "precision == MatmulPrecision::kHighest || ", ""),
        ("symmetric results, too", " || is_symmetric(form)", ""),
        ("a rule of another precision", "rule.precision == precision && ", ""),
        ("a rule of another form", "rule.form == form && ", ""),
        ("a rule of other rows", "rule.m.has(m) && ", ""),
        ("a rule of other columns", "rule.n.has(n) &&", "true &&"),
        ("a rule of another depth", "rule.k.has(k)", "true"),
        ("every rule gives it away", "return rule.by_library;", "return true;"),
    )
    + faults(
        "library/cublas.cpp",
        STEPS,
        ("operands change places", "batch.first_a,\n", "batch.first_b,\n"),
        (
            "the stream is not set",
            'check("cublasSetStream"',
            'if (stream != nullptr) check("cublasSetStream"',
        ),
        (
            "no workspace",
            "functions_.set_workspace(handle_, batch.workspace,",
            "functions_.set_workspace(handle_, nullptr,",
        ),
        ("D is added to", "const float zero = 0;", "const float zero = 1;"),
        ("half the product", "const float one = 1;", "const float one = 0.5f;"),
        ("high as medium", "== MatmulPrecision::kMedium ?", "!= MatmulPrecision::kMedium ?"),
        ("a status is overlooked", "if (status == kSuccess) return;", "return;"),
        ("a function that is missing", "return function != nullptr;", "return true;"),
        ("one of a batch", "if (batch.count == 1) {", "if (batch.count >= 1) {"),
    )
    + faults(
        "plan/gemm_plan.cpp",
        STEPS,
        (
            "operands in the kernels' order",
            "place->A.push_back(p.B);\n  place->B.push_back(p.A);",
            "place->A.push_back(p.A);\n  place->B.push_back(p.B);",
        ),
        (
            "shapes of as many columns are one",
            " && other.batch.n == batch.n && other.batch.k == batch.k",
            "",
        ),
        ("shapes of as many rows are one", "other.batch.m == batch.m && ", ""),
        ("the precision is lost", "  batch.precision = products_->precision;\n", ""),
        (
            "sums are left to nobody",
            "case Epilogue::kQuadratic:\n      return false;",
            "case Epilogue::kQuadratic:\n      return true;",
        ),
        (
            "every step is the last",
            "p.epilogue == Epilogue::kLastQuintic, partials",
            "true, partials",
        ),
        (
            "no step is the last",
            "p.epilogue == Epilogue::kLastQuintic, partials",
            "false, partials",
        ),
        ("the bound is lost", "p.C, p.D, p.bound,", "p.C, p.D, nullptr,"),
        ("the parameter stays", "applies_.push_back({row, p.D});", ""),
        (
            "Adam reads the gradient itself",
            "{row, p.D, p.update, partials}",
            "{row, nullptr, p.update, partials}",
        ),
        ("sums as a block leaves them", "/*stride=*/1};", "kNumSums};"),
        ("a call for each product", "if (place == by_library_.end()) {", "{"),
    )
    + faults(
        "plan/group_plan.h",
        STEPS,
        ("Adam does not follow", "elements(site.adams());", ""),
        ("Newton-Schulz does not follow", "elements(site.quintics());", ""),
        ("the parameter does not follow", "elements(site.applies());", ""),
        ("one product of a batch", "static_cast<int32_t>(products.D.size())", "1"),
        (
            "results of other matrices",
            "builder_.add(products.D)",
            "builder_.add(std::vector(products.D.rbegin(), products.D.rend()))",
        ),
        (
            "operands of other matrices",
            "builder_.add(products.A)",
            "builder_.add(std::vector(products.A.rbegin(), products.A.rend()))",
        ),
        (
            "the second operands of other matrices",
            "builder_.add(products.B)",
            "builder_.add(std::vector(products.B.rbegin(), products.B.rend()))",
        ),
        (
            "the workspace is anyone's",
            "builder_.take<std::byte>(kLibraryWorkspaceBytes)",
            "builder_.take<std::byte>(256)",
        ),
    )
    + faults(
        "plan/step.cpp",
        STEPS,
        (
            "out of the basis over its operand, two bases",
            "update, scratch, loaded,",
            "update, scratch, scratch,",
        ),
        (
            "out of the basis over its operand, one basis",
            "update, scratch, loaded,",
            "update, scratch, update,",
        ),
    )
    + faults(
        "plan/skinny_update.cpp",
        ("skinny step",),
        (
            "skinny projections are rounded",
            "full_{MatmulPrecision::kHighest}",
            "full_{MatmulPrecision::kHigh}",
        ),
    )
    + faults(
        "kernels/elements.cu",
        STEPS,
        (
            "Adam of the gradient, not of H",
            "if (e.H != nullptr) {\n    load_place(e.H, place, h);\n  } else {",
            "{",
        ),
        ("X is not added", "quintic(x[i], next[i], scale)", "quintic(0.0f, next[i], scale)"),
        (
            "the short side's scale",
            "static_cast<float>(max(p.m, p.n))",
            "static_cast<float>(min(p.m, p.n))",
        ),
        ("the bound, not its root", "sqrtf(inverse_bound(e.bound))", "inverse_bound(e.bound)"),
        ("the next X stays", "store_place(e.next, place, next);", ""),
    )
)
