// What the kernels are told of a tensor: where it lies and what it holds. The caller (esd_fast/ops.py)
// has already made shapes, devices and memory layouts agree.
#pragma once

#include <cstdint>

namespace esd {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct TensorView {
  std::uintptr_t address;
  DType dtype;
};

// Arguments of guidance_loss, the same for the CPU and for CUDA. All predictions are (batch, elements).
struct GuidanceLossArgs {
  TensorView student, anchor, concept_, null;  // (B, M)
  const float* negative_guidance;              // (B,)
  const float* weight;                         // (B,)
  float* loss;                                 // ()
  float* per_sample;                           // (B,)
  TensorView gradient;                         // (B, M), the student's dtype
  std::int64_t batch, elements;                // B, M
  float gradient_scale;
};

}  // namespace esd
