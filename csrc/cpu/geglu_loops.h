// The inner loops of geglu, compiled once for each instruction-set level.
#pragma once

#include "cpu/geglu.h"

namespace esd::cpu {

struct GegluLoops {
  // Rows [begin, end).
  void (*forward)(const GegluArgs&, std::int64_t begin, std::int64_t end);
  void (*backward)(const GegluArgs&, std::int64_t begin, std::int64_t end);
};

namespace baseline {
extern const GegluLoops geglu_loops;
}
namespace avx2 {
extern const GegluLoops geglu_loops;
}
namespace avx512 {
extern const GegluLoops geglu_loops;
}

}  // namespace esd::cpu
