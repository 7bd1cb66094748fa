#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cuda {

// How many floats of scratch memory guidance_loss needs.
std::int64_t guidance_loss_scratch(std::int64_t batch, std::int64_t elements);

// Everything is enqueued on `stream` of `device`, the caller's current one; nothing is waited for.
void guidance_loss(const GuidanceLossArgs& args, float* scratch, int device, std::uintptr_t stream);

}  // namespace esd::cuda
