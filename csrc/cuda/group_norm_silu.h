#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cuda {

// What group_norm_silu and its gradient share. x is (batch, rows, channels) in memory, rows = H W.
struct GroupNormSiluArgs {
  TensorView x;             // (N, S, C)
  TensorView weight, bias;  // (C,), each of its own dtype
  std::int64_t batch, rows, channels;
  int groups;  // a divisor of channels
  bool silu;
};

struct GroupNormSiluResults {
  std::uintptr_t y;    // (N, S, C), x's dtype
  float *mean, *rstd;  // (N, groups)
};

struct GroupNormSiluGradients {
  std::uintptr_t grad;          // (N, S, C), x's dtype: the gradient of y
  const float *mean, *rstd;     // (N, groups), what the forward wrote
  std::uintptr_t x;             // (N, S, C), x's dtype, written
  std::uintptr_t weight, bias;  // (C,), each of its parameter's dtype, written; both 0: not wanted
};

// How many floats of scratch memory either direction needs.
std::int64_t group_norm_silu_scratch(std::int64_t batch, std::int64_t rows, std::int64_t channels, int groups,
                                     DType of_x, bool parameters);

// Everything is enqueued on `stream` of `device`, the caller's current one; nothing is waited for.
void group_norm_silu(const GroupNormSiluArgs& args, const GroupNormSiluResults& results, float eps, float* scratch,
                     int device, std::uintptr_t stream);
void group_norm_silu_backward(const GroupNormSiluArgs& args, const GroupNormSiluGradients& gradients, float* scratch,
                              int device, std::uintptr_t stream);

}  // namespace esd::cuda
