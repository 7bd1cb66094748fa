#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cpu {

struct GegluArgs {
  TensorView x;     // (rows, 2, width): hidden, then gate
  TensorView grad;  // (rows, width); for the gradient alone
  TensorView out;   // y (rows, width), or the gradient of x (rows, 2, width); x's dtype
  std::int64_t rows, width;
};

// y = hidden * gelu(gate)
void geglu(const GegluArgs& args, int threads);
void geglu_backward(const GegluArgs& args, int threads);

}  // namespace esd::cpu
