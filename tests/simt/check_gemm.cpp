// The grouped matrix multiplication: every block shape, form, precision and epilogue sum on odd
// sizes.
#include "cuda/kernels/gemm.h"
#include "cuda/plan/plan_builder.h"
#include "dykaf/newton_schulz.h"
#include "kernel_check.h"

namespace kernel_check {
namespace {

using namespace dykaf;
using namespace dykaf::cuda;

struct Shape {
  int m, n, k;
  int offset = 0;   // of every array, in elements
  int c_shift = 0;  // of C and D beyond that: one of them may be aligned and the other not
  int d_shift = 0;
};

bool leaves_sums(Epilogue epilogue) {
  return epilogue == Epilogue::kSums || epilogue == Epilogue::kInner ||
         epilogue == Epilogue::kLastQuintic;
}

// An operand as the tensor cores see it.
double rounded(float x, MatmulPrecision precision) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (precision == MatmulPrecision::kHigh) {
    return std::bit_cast<float>((bits + 0x1000u) & 0xffffe000u);
  }
  if (precision == MatmulPrecision::kMedium) {
    return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
  return x;
}

struct GemmCase {
  Shape shape;
  Array<float> A, B, C, D;
  Array<float> bound;       // of Newton-Schulz; none: 1
  Array<float> update_rms;  // of Adam's direction
  Array<double> partials;

  bool has_C() const { return C.size() > 0; }
};

// Of a symmetric form with the increment H M H^T: A = P, B = H with P = H M, M symmetric; here
// M = I, so that A = B.
GemmCase random_case(const Shape& s, GemmForm form, int64_t tiles, Rng& rng) {
  GemmCase p;
  p.shape = s;
  p.A = randn(int64_t{s.m} * s.k, rng, s.offset);
  p.B = is_symmetric(form) ? p.A : randn(int64_t{s.k} * s.n, rng, s.offset);
  p.C = randn(int64_t{s.m} * s.n, rng, s.offset + s.c_shift);
  if (is_symmetric(form)) {  // so is the factor that C stands for
    for (int i = 0; i < s.m; ++i) {
      for (int j = 0; j < i; ++j) p.C[int64_t{j} * s.n + i] = p.C[int64_t{i} * s.n + j];
    }
  }
  p.D = Array<float>(int64_t{s.m} * s.n, s.offset + s.d_shift);
  p.partials = Array<double>(tiles * kNumSums);
  return p;
}

constexpr double kFullRms = 0.5;

// D = of_C C + of_product A B.
struct Combination {
  double of_C;
  double of_product;
};

Combination combination_of(Epilogue epilogue, const GemmCase& p) {
  const double scale = 0.2 * std::sqrt(std::max(p.shape.m, p.shape.n));
  const double bound = p.bound.size() > 0 && p.bound[0] != 0 ? double{p.bound[0]} : 1;
  const double root = std::sqrt(bound);
  const double share = std::min(1.0, p.update_rms[0] / kFullRms);
  switch (epilogue) {
    case Epilogue::kQuadratic:
      return {NewtonSchulz::kB / bound, NewtonSchulz::kC / (bound * bound)};
    case Epilogue::kQuintic:
      return {NewtonSchulz::kA / root, 1 / root};
    case Epilogue::kLastQuintic:
      return {share * scale * NewtonSchulz::kA / root, share * scale / root};
    default:
      return {0, 1};
  }
}

void require_right(const GemmCase& p, GemmForm form, MatmulPrecision precision, Epilogue epilogue) {
  const int m = p.shape.m;
  const int n = p.shape.n;
  const int k = p.shape.k;
  const bool transpose_a = form == GemmForm::kTN || form == GemmForm::kSymmetricTN;
  const bool transpose_b = form == GemmForm::kNT || form == GemmForm::kSymmetricNT;
  std::vector<double> expected(static_cast<size_t>(m) * n);
  std::vector<double> bound(expected.size());
  double sums[kNumSums] = {};
  double magnitude = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      double total = 0;
      for (int l = 0; l < k; ++l) {
        const double a =
            rounded(p.A[transpose_a ? int64_t{l} * m + i : int64_t{i} * k + l], precision);
        const double b =
            rounded(p.B[transpose_b ? int64_t{j} * k + l : int64_t{l} * n + j], precision);
        sum += a * b;
        total += std::fabs(a * b);
      }
      const size_t at = static_cast<size_t>(i) * n + j;
      // k sums to nearest; 3xTF32 leaves out 2^-22 of a product and rounds its parts by as much.
      bound[at] =
          total * ((k + 2) * 0x1p-24 + (precision == MatmulPrecision::kHighest ? 0x1p-20 : 0));
      const double c = p.has_C() ? double{p.C[static_cast<int64_t>(at)]} : 0;
      // Two coefficients, the inverse twice, its root, two products, the scale, the share twice and
      // the sum round.
      const auto [of_C, of_product] = combination_of(epilogue, p);
      expected[at] = of_C * c + of_product * sum;
      bound[at] *= of_product;
      if (of_C != 0)
        bound[at] += 12 * 0x1p-24 * (std::fabs(of_C * c) + std::fabs(of_product * sum));
      const double square =
          epilogue == Epilogue::kLastQuintic ? expected[at] * expected[at] : c * c;
      sums[0] += square;
      sums[1] += c * sum;
      sums[2] += sum * sum;
      magnitude += square + std::fabs(c * sum) + sum * sum;
    }
  }
  if (epilogue != Epilogue::kInner) require_close("D", p.D, expected, bound);
  if (is_symmetric(form)) {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < i; ++j) {
        require("D is symmetric", p.D[int64_t{i} * n + j] == p.D[int64_t{j} * n + i]);
      }
    }
  }
  if (!leaves_sums(epilogue)) return;
  const int num_sums = epilogue == Epilogue::kLastQuintic ? 1 : kNumSums;  // the first is D^2
  for (int q = 0; q < num_sums; ++q) {
    double actual = 0;
    for (int64_t t = q; t < p.partials.size(); t += kNumSums) actual += p.partials[t];
    require_close("sum " + std::to_string(q), actual, sums[q], magnitude * 1e-5);
  }
}

// All shapes in one launch.
std::vector<std::byte> run_gemms(const std::vector<Shape>& shapes, TileClass tile_class,
                                 GemmForm form, MatmulPrecision precision, Epilogue epilogue) {
  Rng rng(7);
  std::vector<GemmCase> cases;
  std::vector<GemmProblem> problems;
  std::vector<MatrixOnDevice> matrices;
  for (const Shape& s : shapes) {
    GemmCase p = random_case(s, form, num_tiles(tile_class, form, s.m, s.n), rng);
    if (epilogue == Epilogue::kStore || (epilogue == Epilogue::kSums && cases.size() % 3 == 1)) {
      p.C = Array<float>();
    }
    // A bound, one of zero, and none.
    if (cases.size() % 3 != 2) p.bound = Array<float>(std::vector{cases.size() % 3 * 0.3f});
    // A small direction and large ones.
    p.update_rms = Array<float>(std::vector{cases.size() % 3 * 0.4f + 0.2f});
    GemmProblem problem{};
    problem.A = p.A.get();
    problem.B = p.B.get();
    problem.C = p.has_C() ? p.C.get() : nullptr;
    problem.bound = p.bound.size() > 0 ? p.bound.get() : nullptr;
    problem.D = epilogue == Epilogue::kInner ? nullptr : p.D.get();
    problem.partials = leaves_sums(epilogue) ? p.partials.get() : nullptr;
    problem.m = s.m;
    problem.n = s.n;
    problem.matrix_idx = static_cast<int32_t>(cases.size());
    MatrixOnDevice matrix{};
    matrix.update_rms = p.update_rms.get();
    matrices.push_back(matrix);
    problem.k = s.k;
    problem.epilogue = epilogue;
    cases.push_back(p);
    problems.push_back(problem);
  }
  const int64_t grid = assign_tiles(
      problems, [&](const GemmProblem& p) { return num_tiles(tile_class, form, p.m, p.n); });
  const Array<GemmProblem> device_problems(problems);
  const Array<MatrixOnDevice> device_matrices(matrices);
  AdamOptions adam{};
  adam.full_rms = kFullRms;
  const Array<AdamOptions> device_adam(std::vector{adam});
  const GemmLaunch launch{device_problems.get(),
                          device_matrices.get(),
                          nullptr,
                          static_cast<int32_t>(problems.size()),
                          grid,
                          device_adam.get()};
  require("launch", launch_gemm(precision, form, tile_class, launch, nullptr) == 0);
  std::vector<std::byte> outputs;
  for (const GemmCase& p : cases) {
    require_right(p, form, precision, epilogue);
    append_bytes(outputs, p.D);
    append_bytes(outputs, p.partials);
  }
  return outputs;
}

bool occurs(Epilogue epilogue, GemmForm form) {
  if (epilogue == Epilogue::kQuadratic) return form == GemmForm::kSymmetricNT;
  if (epilogue == Epilogue::kStore || epilogue == Epilogue::kSums) return true;
  return form == GemmForm::kNN;
}

std::vector<Shape> shapes_of(GemmForm form, TileClass tile_class) {
  // Aligned and whole tiles; odd sizes; odd bases; several stages of k; one row, one column.
  std::vector<Shape> shapes = {{64, 64, 64},          {33, 70, 19, 1},      {1, 1, 1},
                               {80, 20, 300},         {20, 76, 8},          {5, 3, 64, 4},
                               {20, 16, 12, 0, 1, 0}, {20, 16, 12, 0, 0, 1}};
  if (tile_class == TileClass::kLarge) shapes.push_back({132, 140, 36});
  if (is_symmetric(form)) {
    for (Shape& s : shapes) s.n = s.m;
    shapes.push_back({150, 150, 40});
    shapes.push_back({150, 150, 41, 3});
  }
  return shapes;
}

const char* const kFormNames[] = {"NN", "TN", "NT", "symmetric NT", "symmetric TN"};
const char* const kTileNames[] = {"large", "medium", "wide", "tall"};
const char* const kPrecisionNames[] = {"highest", "high", "medium"};

}  // namespace

void check_gemms() {
  for (int precision = 0; precision < 3; ++precision) {
    for (int tile = 0; tile < kNumTileClasses; ++tile) {
      for (int form = 0; form < kNumForms; ++form) {
        const auto gemm_form = static_cast<GemmForm>(form);
        const auto tile_class = static_cast<TileClass>(tile);
        const bool square = tile_class == TileClass::kLarge || tile_class == TileClass::kMedium;
        if (is_symmetric(gemm_form) && !square) continue;
        for (const Epilogue epilogue :
             {Epilogue::kStore, Epilogue::kSums, Epilogue::kInner, Epilogue::kQuadratic,
              Epilogue::kQuintic, Epilogue::kLastQuintic}) {
          if (!occurs(epilogue, gemm_form)) continue;
          const char* const epilogues[] = {"store", "",          "",        "sums",
                                           "inner", "quadratic", "quintic", "last quintic"};
          check_schedules(
              std::string("gemm ") + kPrecisionNames[precision] + " " + kTileNames[tile] + " " +
                  kFormNames[form] + " " + epilogues[static_cast<int>(epilogue)],
              [&] {
                return run_gemms(shapes_of(gemm_form, tile_class), tile_class, gemm_form,
                                 static_cast<MatmulPrecision>(precision), epilogue);
              });
        }
      }
    }
  }
}

}  // namespace kernel_check
