// Matrix multiplications as the hardware meets them: free of bank conflicts, and with sums that are
// truncated.
#include "cuda/kernels/gemm.h"
#include "cuda/plan/plan_builder.h"
#include "kernel_check.h"

namespace kernel_check {
namespace {

using namespace dykaf;
using namespace dykaf::cuda;

// D = op(A) op(B), D [n, n], of one matrix.
void multiply(const Array<float>& A, const Array<float>& B, const Array<float>& D, int n, int k,
              GemmForm form, TileClass tile_class, MatmulPrecision precision) {
  GemmProblem p{};
  p.A = A.get();
  p.B = B.get();
  p.D = D.get();
  p.m = p.n = n;
  p.k = k;
  const Array<GemmProblem> problem(std::vector<GemmProblem>{p});
  const GemmLaunch launch{problem.get(), nullptr, nullptr, 1, num_tiles(tile_class, form, n, n),
                          nullptr};
  require("launch", launch_gemm(precision, form, tile_class, launch, nullptr) == 0);
}

bool has_kernel(GemmForm form, TileClass tile_class) {
  const bool symmetric = is_symmetric(form);
  return !symmetric || tile_class == TileClass::kLarge || tile_class == TileClass::kMedium;
}

void no_conflicts(MatmulPrecision precision, TileClass tile_class) {
  Rng rng(2);
  constexpr int kSize = 128;
  const Array<float> A = randn(kSize * kSize, rng);
  const Array<float> D(kSize * kSize);
  simt::options().check_banks = true;
  for (int form = 0; form < kNumForms; ++form) {
    const auto gemm_form = static_cast<GemmForm>(form);
    if (!has_kernel(gemm_form, tile_class)) continue;
    simt::reset();
    multiply(A, A, D, kSize, kSize, gemm_form, tile_class, precision);
    const simt::Stats& stats = simt::stats();
    const std::string where = "form " + std::to_string(form);
    require(where + ": shared memory is read", stats.ldmatrix + stats.shared_loads > 0);
    require(where + ": ldmatrix conflicts", stats.ldmatrix_conflicts == 0);
    require(where + ": load conflicts", stats.shared_load_conflicts == 0);
  }
}

// Tensor cores truncate. Of positive numbers every sum comes out too small, by at most 2^-23 of the
// running sum at each instruction. Over kDepthOfSum = 256 of k there are 3 * 256 / 8 = 96 of them,
// and the running sum is half of its last value on average (a little more: (96 + 1) / 96): at most
// 48.5 * 2^-23 of the chunk's sum, so of the whole. The chunks are added to nearest, 4 * 2^-24, and
// the inputs are split with 2^-20. On average a truncation takes half as much, and what is rounded
// to nearest averages out over thousands of entries: 2^-23 of room. An ulp is about 0.72 * 2^-23
// of a number: with one accumulator for all of k = 1024, expect 192 * 0.36 = 69 * 2^-23; with two,
// of twice the depth, 35.
std::vector<std::byte> truncated_sums() {
  constexpr int kSize = 64;
  constexpr int kDepth = 1024;
  constexpr double kLargest = 48.5 * 0x1p-23 + 4 * 0x1p-24 + 0x1p-20;
  constexpr double kMean = 48.5 / 2 * 0x1p-23 + 0x1p-23;
  Rng rng(8);
  std::uniform_real_distribution<float> uniform(0.5f, 1);
  Array<float> A(kSize * kDepth);
  for (int64_t i = 0; i < A.size(); ++i) A[i] = uniform(rng);
  const Array<float> D(kSize * kSize);
  simt::options().round_toward_zero = true;
  multiply(A, A, D, kSize, kDepth, GemmForm::kNT, TileClass::kMedium, MatmulPrecision::kHighest);
  simt::options().round_toward_zero = false;
  double largest = 0;
  double mean = 0;
  for (int64_t i = 0; i < kSize; ++i) {
    for (int64_t j = 0; j < kSize; ++j) {
      double exact = 0;
      for (int64_t k = 0; k < kDepth; ++k) {
        exact += double{A[i * kDepth + k]} * double{A[j * kDepth + k]};
      }
      const double error = (exact - double{D[i * kSize + j]}) / exact;
      largest = std::max(largest, std::fabs(error));
      mean += error / (kSize * kSize);
    }
  }
  require_close("largest relative error", largest, 0, kLargest);
  require_close("mean relative error", mean, 0, kMean);
  std::vector<std::byte> bytes;
  append_bytes(bytes, D);
  return bytes;
}

}  // namespace

void check_hardware() {
  const char* const precisions[] = {"highest", "high", "medium"};
  const char* const tiles[] = {"large", "medium", "wide", "tall"};
  for (int precision = 0; precision < 3; ++precision) {
    for (int tile = 0; tile < kNumTileClasses; ++tile) {
      check_once(std::string("banks ") + precisions[precision] + " " + tiles[tile], [&] {
        no_conflicts(static_cast<MatmulPrecision>(precision), static_cast<TileClass>(tile));
      });
      simt::options().check_banks = false;
    }
  }
  check_schedules("truncated sums", truncated_sums);
  simt::options().round_toward_zero = false;
}

}  // namespace kernel_check
