// The inner loops of group_norm_silu, compiled once for each instruction-set level. `weight` and `bias`
// are the tensors of those names as float32, (channels,).
#pragma once

#include "cpu/group_norm_silu.h"

namespace esd::cpu {

// Of `count` numbers: their mean, and the sum of the squares of their distances from it.
struct Moments {
  double count, mean, squares;
};

// For one sample, (channels,) each: sums over pixels of d, the gradient behind the SiLU, and of d times
// the normalised x.
struct Sums {
  float* of_d;
  float* of_product;
};

// For one group: what the gradient of x takes away, the means over the group of weight * d and of
// weight * d * normalised x.
struct Means {
  float level, slope;
};

struct GroupNormLoops {
  void (*load)(const TensorView&, std::int64_t count, float* values);
  void (*store)(const float* values, const TensorView&, std::int64_t count);

  // (batch, channels, pixels): one group of one sample.
  Moments (*group_moments)(const GroupNormArgs&, std::int64_t sample, std::int64_t group);
  void (*group_forward)(const GroupNormArgs&, const float* weight, const float* bias, std::int64_t sample,
                        std::int64_t group);
  // The first part of the gradient leaves d in `kept`, (group_size,), for the second: of_x itself where that is
  // float32.
  void (*group_sums)(const GroupNormBackwardArgs&, const float* weight, const float* bias, std::int64_t sample,
                     std::int64_t group, float* kept, Sums);
  void (*group_backward)(const GroupNormBackwardArgs&, const float* weight, std::int64_t sample, std::int64_t group,
                         const float* kept, Means);

  // (batch, pixels, channels): pixels [begin, end) of one sample, all groups.
  void (*rows_moments)(const GroupNormArgs&, std::int64_t sample, std::int64_t begin, std::int64_t end, Moments*);
  void (*rows_forward)(const GroupNormArgs&, const float* weight, const float* bias, std::int64_t sample,
                       std::int64_t begin, std::int64_t end);
  void (*rows_sums)(const GroupNormBackwardArgs&, const float* weight, const float* bias, std::int64_t sample,
                    std::int64_t begin, std::int64_t end, Sums);
  void (*rows_backward)(const GroupNormBackwardArgs&, const float* weight, const float* bias, std::int64_t sample,
                        std::int64_t begin, std::int64_t end, const Means*);
};

// The moments of two sets of numbers together (Chan). static: a copy for each file, see convert.h.
static inline Moments together(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

namespace baseline {
extern const GroupNormLoops group_norm_loops[2];  // without SiLU, with it
}
namespace avx2 {
extern const GroupNormLoops group_norm_loops[2];  // without SiLU, with it
}
namespace avx512 {
extern const GroupNormLoops group_norm_loops[2];  // without SiLU, with it
}

}  // namespace esd::cpu
