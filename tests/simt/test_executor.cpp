// Tests of the executor itself: faulty kernels are noticed, correct ones give the right values.
//   test_executor           all cases, one line each; the exit code says whether one failed
//   test_executor --speed   costs of the executor
#include <limits.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "test_check.h"
#include "test_faults.h"
#include "test_memory.h"
#include "test_speed.h"
#include "test_values.h"

namespace {

constexpr uint64_t kSeeds[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int kExitOfThreadSanitizer = 66;

// Two floats for each thread. Allocated with its exact size, so that AddressSanitizer guards its
// end; `new` aligns it to 16 bytes.
std::unique_ptr<float[]> make_output() { return std::make_unique<float[]>(2 * kThreads); }

template <typename Launch>
std::string message_of(Launch&& launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

bool contains(const std::string& text, const char* part) {
  return part != nullptr && text.find(part) != std::string::npos;
}

void test_faults() {
  const auto out = make_output();
  for (const Fault& fault : kFaults) {
    std::string unexpected;
    for (const uint64_t seed : kSeeds) {
      simt::options().seed = seed;
      const std::string message = message_of(
          [&] { DYKAF_LAUNCH(fault.kernel, 3, kThreads, kDynamicBytes, nullptr, out.get()); });
      const bool is_expected =
          message.starts_with("simt: ") &&
          (contains(message, fault.message) || contains(message, fault.other_message));
      if (!is_expected) {
        unexpected = "seed " + std::to_string(seed) + ": " + message;
      }
    }
    check(fault.name, unexpected.empty(), unexpected);
  }
}

void test_launch_limits() {
  const auto message = [](dim3 grid, dim3 block, size_t shared_bytes) {
    return message_of([&] { DYKAF_LAUNCH(nothing_kernel, grid, block, shared_bytes, nullptr); });
  };
  check("empty grid", contains(message(0, 32, 0), "simt: bad grid"));
  check("grid too high", contains(message(dim3(1, 65536), 32, 0), "simt: bad grid"));
  check("block of 33", contains(message(1, 33, 0), "simt: block size"));
  check("block of 1056", contains(message(1, 1056, 0), "simt: block size"));
  check("too much dynamic shared memory",
        contains(message(1, 32, 227 * 1024 + 1), "simt: dynamic shared memory over"));
  check("load outside of a kernel, misaligned", contains(message_of([] {
                                                           alignas(16) static float values[8] = {};
                                                           load_global4(values + 1);
                                                         }),
                                                         "outside of a kernel"));
}

void launch_last_block(bool has_fence) {
  constexpr int kBlocks = 4000;
  std::vector<float> partials(kBlocks);
  float sum = 0.0f;
  unsigned num_done = 0;
  simt::options().workers = 2;
  const auto kernel = has_fence ? last_block_adds<true> : last_block_adds<false>;
  DYKAF_LAUNCH(kernel, kBlocks, 32, 0, nullptr, &sum, partials.data(), &num_done);
  simt::options().workers = 0;
  check("sum of the last block", sum == kBlocks);
}

// The other process: runs the case of this name. Whether its end is the right one, the parent says.
int run_case(const std::string& name) {
  simt::options().seed = 3;
  const auto out = make_output();
  const auto launch_if_named = [&](const SanitizerFault& fault) {
    if (name == fault.name) {
      DYKAF_LAUNCH(fault.kernel, 1, kThreads, kDynamicBytes, nullptr, out.get());
    }
  };
  for (const SanitizerFault& fault : kAddressFaults) {
    launch_if_named(fault);
  }
  for (const SanitizerFault& fault : kRaces) {
    launch_if_named(fault);
  }
  if (name == "missing fence" || name == "fence") {
    launch_last_block(name == "fence");
  }
  return g_num_failed;
}

int exit_code_of_case(const std::string& name) {
  char program[PATH_MAX] = {};
  if (readlink("/proc/self/exe", program, sizeof program - 1) < 0) {
    return -1;
  }
  const std::string command =
      "'" + std::string(program) + "' --case '" + name + "' > /dev/null 2>&1";
  const int status = std::system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void test_sanitizer_faults() {
  for (const SanitizerFault& fault : kAddressFaults) {
    if (SIMT_ASAN) {
      check(fault.name, exit_code_of_case(fault.name) != 0);
    } else {
      skip(fault.name, "needs AddressSanitizer");
    }
  }
  for (const SanitizerFault& race : kRaces) {
    if (SIMT_TSAN) {
      const int code = exit_code_of_case(race.name);
      check(race.name, code == kExitOfThreadSanitizer, "exit code " + std::to_string(code));
    } else {
      skip(race.name, "needs ThreadSanitizer");
    }
  }
  if (SIMT_TSAN) {
    check("missing fence", exit_code_of_case("missing fence") == kExitOfThreadSanitizer);
  } else {
    skip("missing fence", "needs ThreadSanitizer");
  }
  check("fence", exit_code_of_case("fence") == 0);
}

void test_race_over_seeds() {
  if (SIMT_TSAN) {
    skip("missing barrier changes the result over seeds", "ThreadSanitizer would report it");
    return;
  }
  std::set<std::vector<uint32_t>> results;
  for (const uint64_t seed : kSeeds) {
    simt::options().seed = seed;
    const auto out = make_output();
    DYKAF_LAUNCH(race_without_barrier, 1, kThreads, 0, nullptr, out.get());
    std::vector<uint32_t> bits(kThreads);
    memcpy(bits.data(), out.get(), kThreads * sizeof(float));
    results.insert(bits);
  }
  check("missing barrier changes the result over seeds", results.size() > 1,
        std::to_string(results.size()) + " results of " + std::to_string(std::size(kSeeds)));
}

// Reads the reversed block, sums it in a fixed order; out[block][thread].
__global__ void clean_kernel(float* __restrict__ out, const float* __restrict__ in) {
  DYKAF_SHARED(float, partials, [32]);
  DYKAF_DYNAMIC_SHARED(base);
  SharedCarver carver(base);
  auto* tile = carver.take<float>(blockDim.x * blockDim.y);
  const int num_threads = blockDim.x * blockDim.y;
  const int i = threadIdx.x + threadIdx.y * blockDim.x;
  const int block = blockIdx.x + blockIdx.y * gridDim.x;
  cp_async4(&tile[i], &in[block * num_threads + i], 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float sum = tile[num_threads - 1 - i];
  const float own = sum;
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  }
  if (i % 32 == 0) {
    partials[i / 32] = sum;
  }
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < num_threads / 32; ++warp) {
    total += partials[warp];
  }
  out[block * num_threads + i] = total + own;
}

void test_clean_kernel() {
  const dim3 grid(5, 3);
  const dim3 block(48, 4);
  std::vector<float> in(15 * 192);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<float>(i * 2654435761u % 1000) / 7.0f;
  }
  std::set<std::vector<float>> results;
  bool is_logged = true;
  for (const uint64_t seed : kSeeds) {
    for (const int workers : {1, 2}) {
      simt::options().seed = seed;
      simt::options().workers = workers;
      std::vector<float> out(in.size(), NAN);
      simt::reset();
      DYKAF_LAUNCH(clean_kernel, grid, block, 768, nullptr, out.data(), in.data());
      DYKAF_LAUNCH(nothing_kernel, 2, 32, 0, nullptr);
      results.insert(out);
      const auto& log = simt::launch_log();
      is_logged &= log.size() == 2 && log[0].kernel == "clean_kernel" && log[0].grid.y == 3 &&
                   log[0].block.x == 48 && log[0].shared_bytes == 768 &&
                   log[1].kernel == "nothing_kernel" && simt::stats().launches == 2 &&
                   simt::stats().barriers == 30 && simt::stats().collectives == 15 * 6 * 5;
    }
  }
  simt::options().workers = 0;
  const float own = in[191];
  const float total = (*results.begin())[0];
  check("clean kernel: equal over seeds and workers", results.size() == 1);
  check("clean kernel: value", !std::isnan(total) && total > own);
  check("launch log and totals", is_logged);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--speed") {
    measure_speed();
    return 0;
  }
  if (mode == "--case" && argc > 2) {
    return run_case(argv[2]);
  }
  test_faults();
  test_launch_limits();
  test_sanitizer_faults();
  test_race_over_seeds();
  for (const uint64_t seed : {0, 1, 5}) {
    simt::options().seed = seed;
    test_stale_memory();
    test_pipeline();
    test_banks();
    test_mma<false>("mma tf32", Rounding::kNearest);
    test_mma<true>("mma bf16", Rounding::kNearest);
    test_mma<false>("mma tf32, toward zero", Rounding::kTowardZero);
    test_mma<true>("mma bf16, toward zero", Rounding::kTowardZero);
    test_ldmatrix();
    test_shuffles_and_votes();
    test_atomics();
    test_conversions();
  }
  test_clean_kernel();
  printf("%s\n", g_num_failed == 0 ? "all passed" : "FAILED");
  return g_num_failed != 0;
}
