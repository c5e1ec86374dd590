// MKL within a parallel region of torch.
#pragma once

#include <ATen/Parallel.h>

// Where torch has no MKL the address is null.
extern "C" int MKL_Set_Num_Threads_Local(int num_threads) __attribute__((weak));

namespace dykaf::cpu {

// On the thread that it lives on MKL computes with one thread. After torch.set_num_threads MKL asks
// for that many in a parallel region too, is given one, and its decompositions then wait for the
// others for ever.
class OneMklThread {
 public:
  OneMklThread() {
    // A thread's first call of torch sets MKL's number, and so does its first call of the inline
    // function, which remembers for itself in every library.
    (void)at::get_num_threads();
    at::internal::lazy_init_num_threads();
    if (MKL_Set_Num_Threads_Local != nullptr) previous_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(previous_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace dykaf::cpu
