#pragma once

#include "cpu/convert.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) { return esd::cpu::from_float16(x.bits); }
inline __half __float2half_rn(float x) { return {esd::cpu::to_float16(x)}; }
