// The inner loop of guidance_loss, compiled once for each instruction-set level.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace esd::cpu {

// Writes the gradient of elements [begin, end) of sample b and returns the sum of their squared errors.
using GuidanceLossLoop = double (*)(const GuidanceLossArgs&, std::int64_t b, std::int64_t begin, std::int64_t end);

namespace baseline {
double guidance_loss(const GuidanceLossArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}
namespace avx2 {
double guidance_loss(const GuidanceLossArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}
namespace avx512 {
double guidance_loss(const GuidanceLossArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}

}  // namespace esd::cpu
