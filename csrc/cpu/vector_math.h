// exp, the logistic function and the normal distribution in float32, and sums. The functions are a few multiplications
// and one division, no table and no branch, so that loops over them vectorise at every level. Only for the per-ISA
// files, as convert.h.
#pragma once

#include "cpu/convert.h"

namespace esd::cpu {
namespace {

// |x|, or `limit` where that is less or x is not a number. By integers, as the next: compilers make branches of
// a comparison of floats, since it has to know what is not a number.
inline float magnitude_within(float x, float limit) {
  const std::uint32_t bits = as_bits(x) & 0x7fffffffu, most = as_bits(limit);
  return as_float(bits < most ? bits : most);
}

// a where x is below 0, b elsewhere.
inline float by_sign(float x, float a, float b) {
  const std::uint32_t negative = 0u - (as_bits(x) >> 31);
  return as_float((as_bits(a) & negative) | (as_bits(b) & ~negative));
}

// For -88 <= x <= 0, to about one unit in the last place; 0 below -87.7, where a float32 ceases to be a normal
// number.
inline float exponential(float x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
  const float shifted = x * 1.44269504f + shift;
  const float whole = shifted - shift;
  float rest = x - whole * 0.693145752f;  // log 2 in two parts, the first with zeros at its end
  rest = rest - whole * 1.42860677e-6f;
  float p = 1.37805939e-3f;
  p = p * rest + 8.37312452e-3f;
  p = p * rest + 4.16695364e-2f;
  p = p * rest + 1.66664720e-1f;
  p = p * rest + 4.99999851e-1f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);  // * 2^whole
}

// A number even where x is none: who uses it multiplies with x as well.
inline float sigmoid(float x) {
  const float small = exponential(-magnitude_within(x, 88.0f));
  return by_sign(x, small, 1.0f) / (1.0f + small);
}

// Sixteen sums side by side, at every level (compilers split what is too wide). Loops that sum up into one
// number end, at every block, in sixteen additions that wait for each other.
typedef float Lanes __attribute__((vector_size(64)));
constexpr std::int64_t lanes = 16;

inline void load(const float* values, Lanes& into) { std::memcpy(&into, values, sizeof into); }

// By halves, each in a vector of its own: a loop over an array would go through memory.
inline float total_of(const Lanes& sums) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eights[2];
  std::memcpy(eights, &sums, sizeof sums);
  const Eight eight = eights[0] + eights[1];
  Four fours[2];
  std::memcpy(fours, &eight, sizeof eight);
  const Four four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

struct Normal {
  float below;    // the share of a standard normal distribution below x
  float density;  // its density at x
};

// Share beyond |x| = exp(-x^2 / 2) t P(t), t = 1 / (1 + |x| / 2). P has the least error at its degree, weighed
// so that it is 1e-8 where the share is large and 3e-6 of it where it is small; in float32 `below` is right to
// 1.2e-7. As sigmoid, numbers for whatever x is.
inline Normal normal(float x) {
  const float magnitude = magnitude_within(x, 13.2664f);
  const float bell = exponential(-0.5f * magnitude * magnitude);
  const float t = 1.0f / (1.0f + 0.5f * magnitude);
  float p = 0.0291339875f;
  p = p * t - 0.137499321f;
  p = p * t + 0.214800053f;
  p = p * t - 0.0210293898f;
  p = p * t - 0.282295193f;
  p = p * t + 0.183119526f;
  p = p * t + 0.108751782f;
  p = p * t + 0.205975320f;
  p = p * t + 0.199043246f;
  const float beyond = bell * (t * p);
  return {by_sign(x, beyond, 1.0f - beyond), 0.398942280f * bell};
}

}  // namespace
}  // namespace esd::cpu
