// Compiled once for each instruction-set level, with ESD_ISA naming it. See convert.h for what may be
// included here.
#include "cpu/group_norm_silu_loops.h"

#include "cpu/vector_math.h"

namespace esd::cpu::ESD_ISA {
namespace {

constexpr std::int64_t block = 512;  // numbers at once: all float32 buffers of a loop stay in the L1 cache

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

void load_all(const TensorView& tensor, std::int64_t count, float* values) {
  const float* found = load_block(at(tensor, 0), tensor.dtype, count, values);
  if (found != values) std::memcpy(values, found, static_cast<std::size_t>(count) * 4);
}

void store_all(const float* values, const TensorView& tensor, std::int64_t count) {
  if (tensor.dtype == DType::float32)
    std::memcpy(at(tensor, 0), values, static_cast<std::size_t>(count) * 4);
  else
    store_block(values, at(tensor, 0), tensor.dtype, count);
}

// Where a block of results is made: in place, or in `buffer` until `finish`.
struct Output {
  float* values;
  char* data;
  DType dtype;

  Output(const TensorView& tensor, std::int64_t place, float* buffer) : data(at(tensor, place)), dtype(tensor.dtype) {
    values = dtype == DType::float32 ? reinterpret_cast<float*>(data) : buffer;
  }
  void finish(std::int64_t count) const {
    if (dtype != DType::float32) store_block(values, data, dtype, count);
  }
};

// --- one number -------------------------------------------------------------------------------------

template <bool silu>
inline float result(float z) {
  return silu ? z * sigmoid(z) : z;
}

// The gradient of z, from that of result(z).
template <bool silu>
inline float behind(float grad, float z) {
  if (!silu) return grad;
  const float s = sigmoid(z);
  return grad * (s * (1.0f + z * (1.0f - s)));
}

// --- (batch, channels, pixels): blocks of one channel, whose numbers are constants ---------------------

float sum_of(const float* x, std::int64_t count) {
  Lanes sums = {};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Lanes values;
    load(x + i, values);
    sums += values;
  }
  float sum = total_of(sums);
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// In one pass, by distances from `pivot`; sums side by side, since one would wait for its last addition.
Moments block_moments(const float* x, std::int64_t count, float pivot) {
  Lanes sums[4] = {}, squares[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (std::int64_t k = 0; k < 4; ++k) {
      Lanes apart;
      load(x + i + k * lanes, apart);
      apart -= pivot;
      sums[k] += apart;
      squares[k] += apart * apart;
    }
  }
  for (; i + lanes <= count; i += lanes) {
    Lanes apart;
    load(x + i, apart);
    apart -= pivot;
    sums[0] += apart;
    squares[0] += apart * apart;
  }
  double sum = total_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  double of_squares = total_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < count; ++i) {
    const double apart = double(x[i] - pivot);
    sum += apart;
    of_squares += apart * apart;
  }
  const double mean = sum / double(count), rest = of_squares - sum * mean;
  return {double(count), double(pivot) + mean, rest > 0 ? rest : 0};
}

// The pivot is the mean so far. What a block far from it loses to rounding is little beside what its distance
// adds to the squares.
Moments group_moments(const GroupNormArgs& args, std::int64_t sample, std::int64_t group) {
  float buffer[block];
  const std::int64_t size = group_size(args.norm), first = sample * sample_size(args.norm) + group * size;
  Moments all = {0, 0, 0};
  for (std::int64_t start = 0; start < size; start += block) {
    const std::int64_t count = least(block, size - start);
    const float* x = load_block(at(args.x, first + start), args.x.dtype, count, buffer);
    const float pivot = start == 0 ? sum_of(x, count) / float(count) : float(all.mean);
    all = together(all, block_moments(x, count, pivot));
  }
  return all;
}

template <bool silu>
void forward_group(const GroupNormArgs& args, const float* weight, const float* bias, std::int64_t sample,
                   std::int64_t group) {
  float buffers[2][block];
  const GroupNorm& norm = args.norm;
  const float mean = args.mean[sample * norm.groups + group], rstd = args.rstd[sample * norm.groups + group];
  for (std::int64_t c = group * group_width(norm); c < (group + 1) * group_width(norm); ++c) {
    const float scale = rstd * weight[c], offset = bias[c];
    for (std::int64_t start = 0; start < norm.pixels; start += block) {
      const std::int64_t count = least(block, norm.pixels - start);
      const std::int64_t place = (sample * norm.channels + c) * norm.pixels + start;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const Output y(args.y, place, buffers[1]);
      float* values = y.values;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) values[i] = result<silu>((x[i] - mean) * scale + offset);
      y.finish(count);
    }
  }
}

// Adds the sums of d and of d * (x - mean).
void add_sums(const float* d, const float* x, float mean, std::int64_t count, double& of_d, double& of_product) {
  Lanes sums[2] = {}, products[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    for (std::int64_t k = 0; k < 2; ++k) {
      Lanes values, apart;
      load(d + i + k * lanes, values);
      load(x + i + k * lanes, apart);
      sums[k] += values;
      products[k] += values * (apart - mean);
    }
  }
  of_d += double(total_of(sums[0] + sums[1]));
  of_product += double(total_of(products[0] + products[1]));
  for (; i < count; ++i) {
    of_d += double(d[i]);
    of_product += double(d[i] * (x[i] - mean));
  }
}

template <bool silu>
void sums_group(const GroupNormBackwardArgs& args, const float* weight, const float* bias, std::int64_t sample,
                std::int64_t group, float* kept, Sums sums) {
  float buffers[2][block];
  const GroupNorm& norm = args.norm;
  const float mean = args.mean[sample * norm.groups + group], rstd = args.rstd[sample * norm.groups + group];
  for (std::int64_t c = group * group_width(norm); c < (group + 1) * group_width(norm); ++c) {
    double of_d = 0, of_product = 0;
    const float scale = weight[c], offset = bias[c];
    for (std::int64_t start = 0; start < norm.pixels; start += block) {
      const std::int64_t count = least(block, norm.pixels - start);
      const std::int64_t place = (sample * norm.channels + c) * norm.pixels + start;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const float* grad = load_block(at(args.grad, place), args.grad.dtype, count, buffers[1]);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const float normalised = (x[i] - mean) * rstd;
        kept[i] = behind<silu>(grad[i], normalised * scale + offset);
      }
      add_sums(kept, x, mean, count, of_d, of_product);
      kept += count;
    }
    sums.of_d[c] = float(of_d);
    sums.of_product[c] = float(of_product) * rstd;
  }
}

void backward_group(const GroupNormBackwardArgs& args, const float* weight, std::int64_t sample, std::int64_t group,
                    const float* kept, Means means) {
  float buffers[2][block];
  const GroupNorm& norm = args.norm;
  const float mean = args.mean[sample * norm.groups + group], rstd = args.rstd[sample * norm.groups + group];
  const float level = means.level * rstd, slope = means.slope * rstd * rstd;
  for (std::int64_t c = group * group_width(norm); c < (group + 1) * group_width(norm); ++c) {
    const float scale = rstd * weight[c];
    for (std::int64_t start = 0; start < norm.pixels; start += block) {
      const std::int64_t count = least(block, norm.pixels - start);
      const std::int64_t place = (sample * norm.channels + c) * norm.pixels + start;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const Output of_x(args.of_x, place, buffers[1]);
      float* values = of_x.values;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) values[i] = kept[i] * scale - level - (x[i] - mean) * slope;
      kept += count;
      of_x.finish(count);
    }
  }
}

// --- (batch, pixels, channels): rows of up to `block` channels, whose numbers are vectors --------------

// For channels [first, first + count): what each one's group has.
void spread(const float* of_groups, std::int64_t width, std::int64_t first, std::int64_t count, float* values) {
  std::int64_t group = first / width, end = (group + 1) * width - first;
  for (std::int64_t i = 0; i < count; ++group, end += width) {
    for (const float value = of_groups[group]; i < least(end, count); ++i) values[i] = value;
  }
}

void rows_moments(const GroupNormArgs& args, std::int64_t sample, std::int64_t begin, std::int64_t end,
                  Moments* moments) {
  float buffer[block], sums[block], means[block], squares[block];
  const GroupNorm& norm = args.norm;
  const float rows = float(end - begin);
  for (std::int64_t g = 0; g < norm.groups; ++g) moments[g] = {0, 0, 0};
  for (std::int64_t first = 0; first < norm.channels; first += block) {
    const std::int64_t count = least(block, norm.channels - first);
    for (std::int64_t i = 0; i < count; ++i) sums[i] = squares[i] = 0;
    const auto row = [&](std::int64_t pixel) {
      const std::int64_t place = (sample * norm.pixels + pixel) * norm.channels + first;
      return load_block(at(args.x, place), args.x.dtype, count, buffer);
    };
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const float* x = row(pixel);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) sums[i] += x[i];
    }
    for (std::int64_t i = 0; i < count; ++i) means[i] = sums[i] / rows;
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const float* x = row(pixel);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) squares[i] += (x[i] - means[i]) * (x[i] - means[i]);
    }
    std::int64_t i = 0;
    for (std::int64_t g = first / group_width(norm); i < count; ++g) {
      const std::int64_t last = least(count, (g + 1) * group_width(norm) - first), channels = last - i;
      const float mean = sum_of(means + i, channels) / float(channels);
      float within = 0, apart = 0;
      for (; i < last; ++i) {
        within += squares[i];
        apart += (means[i] - mean) * (means[i] - mean);
      }
      const Moments part = {double(rows) * double(channels), mean, double(within) + double(rows) * double(apart)};
      moments[g] = moments[g].count == 0 ? part : together(moments[g], part);
    }
  }
}

// For channels [first, first + count) of a sample: mean, and weight * rstd.
template <typename Args>
void channel_vectors(const Args& args, const float* weight, std::int64_t sample, std::int64_t first, std::int64_t count,
                     float* mean, float* scale) {
  const std::int64_t width = group_width(args.norm);
  spread(args.mean + sample * args.norm.groups, width, first, count, mean);
  spread(args.rstd + sample * args.norm.groups, width, first, count, scale);
  for (std::int64_t i = 0; i < count; ++i) scale[i] *= weight[first + i];
}

template <bool silu>
void forward_rows(const GroupNormArgs& args, const float* weight, const float* bias, std::int64_t sample,
                  std::int64_t begin, std::int64_t end) {
  float buffers[2][block], mean[block], scale[block];
  const GroupNorm& norm = args.norm;
  for (std::int64_t first = 0; first < norm.channels; first += block) {
    const std::int64_t count = least(block, norm.channels - first);
    channel_vectors(args, weight, sample, first, count, mean, scale);
    const float* offset = bias + first;
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const std::int64_t place = (sample * norm.pixels + pixel) * norm.channels + first;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const Output y(args.y, place, buffers[1]);
      float* values = y.values;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) values[i] = result<silu>((x[i] - mean[i]) * scale[i] + offset[i]);
      y.finish(count);
    }
  }
}

template <bool silu>
void sums_rows(const GroupNormBackwardArgs& args, const float* weight, const float* bias, std::int64_t sample,
               std::int64_t begin, std::int64_t end, Sums sums) {
  float buffers[2][block], mean[block], scale[block];
  const GroupNorm& norm = args.norm;
  for (std::int64_t first = 0; first < norm.channels; first += block) {
    const std::int64_t count = least(block, norm.channels - first);
    channel_vectors(args, weight, sample, first, count, mean, scale);
    const float* offset = bias + first;
    float *of_d = sums.of_d + first, *of_product = sums.of_product + first;
    for (std::int64_t i = 0; i < count; ++i) of_d[i] = of_product[i] = 0;
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const std::int64_t place = (sample * norm.pixels + pixel) * norm.channels + first;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const float* grad = load_block(at(args.grad, place), args.grad.dtype, count, buffers[1]);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const float apart = x[i] - mean[i];
        const float d = behind<silu>(grad[i], apart * scale[i] + offset[i]);
        of_d[i] += d;
        of_product[i] += d * apart;
      }
    }
    float* rstd = mean;
    spread(args.rstd + sample * norm.groups, group_width(norm), first, count, rstd);
    for (std::int64_t i = 0; i < count; ++i) of_product[i] *= rstd[i];
  }
}

template <bool silu>
void backward_rows(const GroupNormBackwardArgs& args, const float* weight, const float* bias, std::int64_t sample,
                   std::int64_t begin, std::int64_t end, const Means* means) {
  float buffers[3][block], mean[block], scale[block], level[block], slope[block];
  const GroupNorm& norm = args.norm;
  const float* rstd = args.rstd + sample * norm.groups;
  for (std::int64_t first = 0; first < norm.channels; first += block) {
    const std::int64_t count = least(block, norm.channels - first);
    channel_vectors(args, weight, sample, first, count, mean, scale);
    const float* offset = bias + first;
    std::int64_t i = 0;
    for (std::int64_t g = first / group_width(norm); i < count; ++g) {
      for (const std::int64_t last = least(count, (g + 1) * group_width(norm) - first); i < last; ++i) {
        level[i] = means[g].level * rstd[g];
        slope[i] = means[g].slope * rstd[g] * rstd[g];
      }
    }
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const std::int64_t place = (sample * norm.pixels + pixel) * norm.channels + first;
      const float* x = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const float* grad = load_block(at(args.grad, place), args.grad.dtype, count, buffers[1]);
      const Output of_x(args.of_x, place, buffers[2]);
      float* values = of_x.values;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const float apart = x[i] - mean[i];
        const float d = behind<silu>(grad[i], apart * scale[i] + offset[i]);
        values[i] = d * scale[i] - level[i] - apart * slope[i];
      }
      of_x.finish(count);
    }
  }
}

}  // namespace

const GroupNormLoops group_norm_loops[2] = {
    {load_all, store_all, group_moments, forward_group<false>, sums_group<false>, backward_group, rows_moments,
     forward_rows<false>, sums_rows<false>, backward_rows<false>},
    {load_all, store_all, group_moments, forward_group<true>, sums_group<true>, backward_group, rows_moments,
     forward_rows<true>, sums_rows<true>, backward_rows<true>},
};

}  // namespace esd::cpu::ESD_ISA
