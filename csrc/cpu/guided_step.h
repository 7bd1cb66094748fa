#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cpu {

// One call of a scheduler that is a table; see kernels/reference.py. N prompts, B trajectories, samples of
// M elements.
struct GuidedStepArgs {
  TensorView predictions;     // (N, B, M)
  const float* coefficients;  // row call + 1 of the table: call + 2 of them count
  float input_scale;          // of the state after this call
  float guidance_scale;
  float* history;     // (calls + 1, B, M)
  TensorView inputs;  // (N, B, M)
  TensorView seen;    // (B, calls, M), the dtype of inputs; address 0: not wanted
  TensorView said;    // (N, B, calls, M), the dtype of predictions; address 0: not wanted
  std::int64_t prompts, batch, elements, calls, call, rolled;
};

void guided_step(const GuidedStepArgs& args, int threads);

}  // namespace esd::cpu
