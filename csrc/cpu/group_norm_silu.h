#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cpu {

// What forward and gradient share. Pictures are (batch, channels, pixels), or (batch, pixels, channels)
// where `channels_last`; all pictures of one call in the same order.
struct GroupNorm {
  std::int64_t batch, channels, pixels, groups;
  bool silu, channels_last;
};

// static: a copy for each file, so that the linker cannot hand AVX-512 code to the baseline.
static inline std::int64_t group_width(const GroupNorm& norm) { return norm.channels / norm.groups; }     // of a group
static inline std::int64_t group_size(const GroupNorm& norm) { return group_width(norm) * norm.pixels; }  // of a group
static inline std::int64_t sample_size(const GroupNorm& norm) { return norm.channels * norm.pixels; }  // its elements

struct GroupNormArgs {
  GroupNorm norm;
  TensorView x, weight, bias;  // a picture; (channels,) each
  TensorView y;                // a picture, x's dtype
  float* mean;                 // (batch, groups)
  float* rstd;                 // (batch, groups)
  double eps;
};

struct GroupNormBackwardArgs {
  GroupNorm norm;
  TensorView grad, x;       // pictures
  TensorView weight, bias;  // (channels,)
  const float* mean;        // (batch, groups), as rstd what the forward wrote
  const float* rstd;
  TensorView of_x;                // a picture, x's dtype
  TensorView of_weight, of_bias;  // (channels,), the dtypes of weight and bias; address 0: not wanted
};

void group_norm_silu(const GroupNormArgs& args, int threads);
void group_norm_silu_backward(const GroupNormBackwardArgs& args, int threads);

}  // namespace esd::cpu
