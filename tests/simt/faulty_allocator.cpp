// For tests of what a failed allocation leaves behind: every allocation of a tensor's memory on the
// CPU, which stands for the device here, is counted, and one may be made to fail.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <limits>
#include <vector>

#include "bindings/register.h"
#include "cublas_on_host.h"

namespace dykaf::bindings {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

class FaultyAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    if (left_.fetch_sub(1) == 0) {
      C10_THROW_ERROR(OutOfMemoryError, "an allocation was made to fail");
    }
    return c10::GetDefaultCPUAllocator()->allocate(num_bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return c10::GetDefaultCPUAllocator()->raw_deleter();
  }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }

  std::atomic<int64_t> left_ = kNever;  // until one fails
};

FaultyAllocator& allocator() {
  static FaultyAllocator instance;
  return instance;
}

}  // namespace

void register_faults(py::module_& module) {
  c10::SetAllocator(c10::DeviceType::CPU, &allocator(), /*priority=*/100);
  // The allocation after `num` others fails, once; None: none does.
  module.def("fail_allocation",
             [](std::optional<int64_t> num) { allocator().left_ = num ? *num : kNever; });
  // The counts of the library's calls since the last look at them.
  module.def("library_calls", [] {
    std::vector<int> counts;
    for (const simt::LibraryCall& call : simt::library_calls()) counts.push_back(call.count);
    simt::library_calls().clear();
    return counts;
  });
}

}  // namespace dykaf::bindings
