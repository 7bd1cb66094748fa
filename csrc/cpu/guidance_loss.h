#pragma once

#include "tensor_view.h"

namespace esd::cpu {

void guidance_loss(const GuidanceLossArgs& args, int threads);

}  // namespace esd::cpu
