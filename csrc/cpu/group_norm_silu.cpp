// Cuts the pictures into pieces, spreads them over threads, and adds their sums up in a fixed order: the
// result does not depend on the number of threads. A piece is a group of a sample or, channels_last, a few
// pixels of one.
#include "cpu/group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/group_norm_silu_loops.h"
#include "cpu/isa.h"

namespace esd::cpu {
namespace {

constexpr std::int64_t chunk = 32768;          // elements of a piece, channels_last: whole pixels
constexpr std::int64_t parallel_from = 16384;  // below this many elements, waking a thread costs more

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A vector of channels as float32.
std::vector<float> values_of(const GroupNormLoops& loops, const TensorView& tensor, std::int64_t count) {
  std::vector<float> values(index(count));
  loops.load(tensor, count, values.data());
  return values;
}

// Calls run(piece, number of the thread) for each of `count`, on `threads` threads where that pays.
template <typename Run>
void spread(const GroupNorm& norm, std::int64_t count, int threads, const Run& run) {
#pragma omp parallel for schedule(static) num_threads(threads) if (norm.batch * sample_size(norm) >= parallel_from)
  for (std::int64_t piece = 0; piece < count; ++piece) {
#ifdef _OPENMP
    run(piece, omp_get_thread_num());
#else
    run(piece, 0);
#endif
  }
}

// The pieces of a channels_last picture.
struct Rows {
  std::int64_t pixels, step, pieces;  // of one sample

  explicit Rows(const GroupNorm& norm) : pixels(norm.pixels) {
    step = std::max<std::int64_t>(4, chunk / norm.channels);
    pieces = (pixels + step - 1) / step;
  }
  std::int64_t sample(std::int64_t piece) const { return piece / pieces; }
  std::int64_t begin(std::int64_t piece) const { return piece % pieces * step; }
  std::int64_t end(std::int64_t piece) const { return std::min(begin(piece) + step, pixels); }
};

void finish(const GroupNormArgs& args, std::int64_t place, const Moments& moments) {
  args.mean[place] = float(moments.mean);
  args.rstd[place] = float(1 / std::sqrt(moments.squares / moments.count + args.eps));
}

Means means_of(const GroupNorm& norm, const float* weight, std::int64_t group, Sums sums) {
  double level = 0, slope = 0;
  for (std::int64_t c = group * group_width(norm); c < (group + 1) * group_width(norm); ++c) {
    level += double(weight[c]) * double(sums.of_d[c]);
    slope += double(weight[c]) * double(sums.of_product[c]);
  }
  return {float(level / double(group_size(norm))), float(slope / double(group_size(norm)))};
}

// Adds up `count` vectors of `channels` numbers that lie `stride` apart.
void add_up(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t channels, float* sums) {
  std::vector<double> totals(index(channels));
  for (std::int64_t part = 0; part < count; ++part) {
    for (std::int64_t c = 0; c < channels; ++c) totals[index(c)] += double(parts[part * stride + c]);
  }
  for (std::int64_t c = 0; c < channels; ++c) sums[c] = float(totals[index(c)]);
}

}  // namespace

void group_norm_silu(const GroupNormArgs& args, int threads) {
  const GroupNorm& norm = args.norm;
  const GroupNormLoops& loops = ESD_CHOSEN_LOOPS(group_norm_loops)[norm.silu];
  const std::vector<float> weight = values_of(loops, args.weight, norm.channels);
  const std::vector<float> bias = values_of(loops, args.bias, norm.channels);

  if (!norm.channels_last) {
    spread(norm, norm.batch * norm.groups, threads, [&](std::int64_t piece, int) {
      const std::int64_t sample = piece / norm.groups, group = piece % norm.groups;
      finish(args, piece, loops.group_moments(args, sample, group));
      loops.group_forward(args, weight.data(), bias.data(), sample, group);
    });
    return;
  }
  const Rows rows(norm);
  const std::int64_t pieces = norm.batch * rows.pieces;
  std::vector<Moments> moments(index(pieces * norm.groups));
  spread(norm, pieces, threads, [&](std::int64_t piece, int) {
    loops.rows_moments(args, rows.sample(piece), rows.begin(piece), rows.end(piece),
                       &moments[index(piece * norm.groups)]);
  });
  for (std::int64_t place = 0; place < norm.batch * norm.groups; ++place) {
    Moments all = {0, 0, 0};
    const std::int64_t first = place / norm.groups * rows.pieces;
    for (std::int64_t piece = first; piece < first + rows.pieces; ++piece)
      all = together(all, moments[index(piece * norm.groups + place % norm.groups)]);
    finish(args, place, all);
  }
  spread(norm, pieces, threads, [&](std::int64_t piece, int) {
    loops.rows_forward(args, weight.data(), bias.data(), rows.sample(piece), rows.begin(piece), rows.end(piece));
  });
}

void group_norm_silu_backward(const GroupNormBackwardArgs& args, int threads) {
  const GroupNorm& norm = args.norm;
  const GroupNormLoops& loops = ESD_CHOSEN_LOOPS(group_norm_loops)[norm.silu];
  const std::vector<float> weight = values_of(loops, args.weight, norm.channels);
  const std::vector<float> bias = values_of(loops, args.bias, norm.channels);
  std::vector<float> of_samples(index(2 * norm.batch * norm.channels));  // (batch, 2, channels)
  const auto sums_of = [&](std::int64_t sample) {
    float* first = &of_samples[index(2 * sample * norm.channels)];
    return Sums{first, first + norm.channels};
  };

  if (!norm.channels_last) {
    const std::int64_t size = group_size(norm);
    const bool in_place = args.of_x.dtype == DType::float32;
    const std::unique_ptr<float[]> scratch(in_place ? nullptr : new float[index(threads * size)]);
    spread(norm, norm.batch * norm.groups, threads, [&](std::int64_t piece, int thread) {
      const std::int64_t sample = piece / norm.groups, group = piece % norm.groups;
      float* kept =
          in_place ? reinterpret_cast<float*>(args.of_x.address) + piece * size : &scratch[index(thread * size)];
      const Sums sums = sums_of(sample);
      loops.group_sums(args, weight.data(), bias.data(), sample, group, kept, sums);
      loops.group_backward(args, weight.data(), sample, group, kept, means_of(norm, weight.data(), group, sums));
    });
  } else {
    const Rows rows(norm);
    const std::int64_t pieces = norm.batch * rows.pieces, stride = 2 * norm.channels;
    std::vector<float> parts(index(pieces * stride));
    spread(norm, pieces, threads, [&](std::int64_t piece, int) {
      float* first = &parts[index(piece * stride)];
      loops.rows_sums(args, weight.data(), bias.data(), rows.sample(piece), rows.begin(piece), rows.end(piece),
                      {first, first + norm.channels});
    });
    std::vector<Means> means(index(norm.batch * norm.groups));
    for (std::int64_t sample = 0; sample < norm.batch; ++sample) {
      const Sums sums = sums_of(sample);
      add_up(&parts[index(sample * rows.pieces * stride)], rows.pieces, stride, stride, sums.of_d);
      for (std::int64_t group = 0; group < norm.groups; ++group)
        means[index(sample * norm.groups + group)] = means_of(norm, weight.data(), group, sums);
    }
    spread(norm, pieces, threads, [&](std::int64_t piece, int) {
      loops.rows_backward(args, weight.data(), bias.data(), rows.sample(piece), rows.begin(piece), rows.end(piece),
                          &means[index(rows.sample(piece) * norm.groups)]);
    });
  }

  if (args.of_weight.address == 0) return;
  std::vector<float> total(index(norm.channels));
  const float* of_d = of_samples.data();
  const std::pair<const TensorView&, const float*> wanted[] = {{args.of_weight, of_d + norm.channels},
                                                               {args.of_bias, of_d}};
  for (const auto& [tensor, parts] : wanted) {
    add_up(parts, norm.batch, 2 * norm.channels, norm.channels, total.data());
    loops.store(total.data(), tensor, norm.channels);
  }
}

}  // namespace esd::cpu
