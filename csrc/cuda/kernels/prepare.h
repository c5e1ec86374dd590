// The scalars of each matrix's step.
#pragma once

#include "cuda/kernels/matrices.h"

namespace dykaf::cuda {

// Fills in the scalars; kAdvance: a step begins.
enum class StepCount : int32_t { kKeep, kAdvance };
int launch_prepare(const Group& group, const Options& options, const DeviceInputs& inputs,
                   StepCount step_count, Stream stream);

}  // namespace dykaf::cuda
