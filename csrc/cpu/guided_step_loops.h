// The inner loop of guided_step, compiled once for each instruction-set level.
#pragma once

#include "cpu/guided_step.h"

namespace esd::cpu {

// Elements [begin, end) of trajectory b.
using GuidedStepLoop = void (*)(const GuidedStepArgs&, std::int64_t b, std::int64_t begin, std::int64_t end);

namespace baseline {
void guided_step(const GuidedStepArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}
namespace avx2 {
void guided_step(const GuidedStepArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}
namespace avx512 {
void guided_step(const GuidedStepArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
}

}  // namespace esd::cpu
