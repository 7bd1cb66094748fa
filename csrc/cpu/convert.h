// bfloat16 and float16 to float32 and back, in integer and float32 arithmetic that compilers vectorise
// at every instruction-set level. Only for the per-ISA files: everything here is local to the file
// (static, no std templates), so that the linker cannot hand AVX-512 code to the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_view.h"

namespace esd::cpu {
namespace {

// The element `index` places on.
inline char* at(const TensorView& tensor, std::int64_t index) {
  return reinterpret_cast<char*>(tensor.address) + index * (tensor.dtype == DType::float32 ? 4 : 2);
}

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(std::uint16_t half) { return as_float(std::uint32_t(half) << 16); }

// Round to nearest even; a NaN stays one.
inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = as_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return std::uint16_t(nan ? 0x7fc0u : rounded);
}

// Exponents are rebased by a multiplication, which also normalises subnormals.
inline float from_float16(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  const float finite = as_float(magnitude << 13) * as_float(0x77800000u);  // 2^112
  const std::uint32_t special = 0x7f800000u | (magnitude << 13);           // infinity and NaN
  return as_float(sign | (magnitude >= 0x7c00u ? special : as_bits(finite)));
}

// Round to nearest even: normal results by adding half a unit to the bits, subnormal ones by adding a
// float whose last bit has the weight of a float16 subnormal.
inline std::uint16_t to_float16(float value) {
  const std::uint32_t bits = as_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // beyond the largest float16
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return std::uint16_t(sign | half);
}

// A block of `count` elements as float32: where it already is, or converted into `buffer`.
inline const float* load_block(const char* data, DType dtype, std::int64_t count, float* buffer) {
  if (dtype == DType::float32) return reinterpret_cast<const float*>(data);
  const auto* half = reinterpret_cast<const std::uint16_t*>(data);
  if (dtype == DType::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(half[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = from_float16(half[i]);
  }
  return buffer;
}

inline void store_block(const float* values, char* data, DType dtype, std::int64_t count) {
  auto* half = reinterpret_cast<std::uint16_t*>(data);
  if (dtype == DType::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_bfloat16(values[i]);
  } else if (dtype == DType::float16) {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_float16(values[i]);
  }
}

}  // namespace
}  // namespace esd::cpu
