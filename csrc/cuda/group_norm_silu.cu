// GroupNorm, with SiLU behind it or without, channels_last: forward and gradient.
//
// A sample is an (S, C) matrix in memory. A block takes a tile of it: some rows, and a run of channels that is
// about a cache line wide and holds whole groups (parts of them only where a group is very wide). A thread keeps
// to one 16-byte column of the tile and walks down its rows with its sums in registers; shared memory puts them
// together, a warp a group.
//
// Where one tile holds all rows, that one kernel also normalises it: its second look at the tile finds it in the
// cache. Otherwise the tiles' sums go to scratch memory, and a second kernel adds up those of its groups and goes
// over the tiles again. No atomics, and every sum has a fixed order: two runs agree in every bit.
//
// Variances are sums of squared distances from each thread's own running mean (Welford 1962), put together
// afterwards (Chan, Golub and LeVeque 1983): sums of plain squares lose everything where the mean is large.
#include <numeric>

#include "cuda/common.cuh"
#include "cuda/group_norm_silu.h"

namespace esd::cuda {
namespace {

constexpr int line = 128;           // bytes of a row that a tile has at least, where there are as many
constexpr int max_vectors = 64;     // threads side by side in a row of a tile
constexpr int max_groups = 72;      // that a tile touches: make_tiling checks
constexpr int least_depth = 8;      // rows that a thread takes
constexpr int max_row_tiles = 128;  // as long as memory goes: more only makes more sums to add up

// How an (N, S, C) tensor is cut up. Filled in by make_tiling.
struct Tiling {
  std::int64_t rows;      // S
  int channels;           // C
  int groups, members;    // G, C / G
  int vectors;            // 16-byte columns of a tile (columns of one element where alignment forbids those)
  int width;              // its channels
  int rows_at_once;       // rows of a tile that a block takes at a time
  std::int64_t height;    // rows of a tile
  int row_tiles;          // tiles a column of tiles
  int column_tiles;       // tiles a row of tiles
  int parts;              // column tiles that a group reaches into, at most
  std::int64_t blocks;    // tiles of all samples
  std::int64_t partials;  // sums that the tiles leave: (N, row_tiles, parts, G)

  bool whole() const { return row_tiles == 1 && parts == 1; }
};

// One dtype code for each of them, so that parameters need no kernels of their own: read once a thread.
struct Parameters {
  const void *weight, *bias;
  DType of_weight, of_bias;
};

template <typename T, int count>
__device__ inline void read_as(const void* values, int channel, float (&into)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) into[k] = to_float(static_cast<const T*>(values)[channel + k]);
}

// into: the parameter of `channel` and of those behind it.
template <int count>
__device__ inline void read_parameter(const void* values, DType dtype, int channel, float (&into)[count]) {
  switch (dtype) {
    case DType::float32: return read_as<float>(values, channel, into);
    case DType::bfloat16: return read_as<__nv_bfloat16>(values, channel, into);
    case DType::float16: return read_as<__half>(values, channel, into);
  }
}

// This block's tile, and this thread's place in it.
struct Tile {
  std::int64_t sample;    // n
  int row_tile;           // its number in the column
  int column_tile;        // its number in the row
  int begin, end;         // its channels
  std::int64_t height;    // its rows
  std::int64_t first;     // its first element of channel 0: (n S + first row) C
  int first_group, last;  // the groups it touches
  int row;                // of the thread: it takes this row and every rows_at_once-th after
  int channel;            // of the thread: its first
  bool active;            // whether the thread has any

  __device__ Tile(const Tiling& t, int vector_width) {
    const std::int64_t block = blockIdx.x;
    column_tile = int(block % t.column_tiles);
    row_tile = int(block / t.column_tiles % t.row_tiles);
    sample = block / t.column_tiles / t.row_tiles;
    begin = column_tile * t.width;
    end = min(begin + t.width, t.channels);
    const std::int64_t first_row = row_tile * t.height;
    height = min(t.rows - first_row, t.height);
    first = (sample * t.rows + first_row) * t.channels;
    first_group = begin / t.members;
    last = (end - 1) / t.members;
    row = int(threadIdx.x) / t.vectors;
    channel = begin + int(threadIdx.x) % t.vectors * vector_width;
    active = row < t.rows_at_once && channel < end;
  }

  // Where the thread's channels are in shared memory that holds (rows_at_once, width).
  __device__ int place(const Tiling& t) const { return row * t.width + channel - begin; }
  __device__ int rows_used(const Tiling& t) const { return int(min(std::int64_t(t.rows_at_once), height)); }
};

// Column tiles [from, to] that a group reaches into.
struct Reach {
  int from, to;
  __device__ Reach(const Tiling& t, int group)
      : from(group * t.members / t.width), to(((group + 1) * t.members - 1) / t.width) {}
};

// Channels of a group that lie within [begin, end).
__device__ inline int shared_channels(const Tiling& t, int group, int begin, int end) {
  return min(end, (group + 1) * t.members) - max(begin, group * t.members);
}

__device__ inline std::int64_t partial(const Tiling& t, std::int64_t sample, int row_tile, int part, int group) {
  return ((sample * t.row_tiles + row_tile) * t.parts + part) * t.groups + group;
}

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// --- forward -------------------------------------------------------------------------------------------

struct Moments {
  float count, mean, squares;  // squares: the sum of squared distances from the mean
};

// Those of `elements` numbers, of which each at(i), i < entries, describes some; by one warp, in every lane.
template <typename At>
__device__ inline Moments warp_moments(std::int64_t entries, float elements, const At& at) {
  const int lane = threadIdx.x % warp;
  const float level = at(0).mean;  // taken off first: sums of the means would lose digits
  float sum = 0;
  for (std::int64_t i = lane; i < entries; i += warp) {
    const Moments m = at(i);
    sum += m.count * (m.mean - level);
  }
  const float mean = level + warp_sum(sum) / elements;
  float squares = 0;
  for (std::int64_t i = lane; i < entries; i += warp) {
    const Moments m = at(i);
    squares += m.squares + m.count * (m.mean - mean) * (m.mean - mean);
  }
  return {elements, mean, warp_sum(squares)};
}

// found(group, moments) for each group of the tile, by a warp: the moments of what the tile has of it.
template <typename T, int width, typename Found>
__device__ inline void tile_moments(const T* __restrict__ x, const Tiling& t, const Tile& tile, const Found& found) {
  __shared__ float means[threads * width], squares[threads * width];  // (rows_at_once, t.width)
  if (tile.active) {
    float mean[width] = {}, square[width] = {};
    float count = 0;
#pragma unroll 2  // two loads on their way
    for (std::int64_t row = tile.row; row < tile.height; row += t.rows_at_once) {
      const auto values = load<width>(x + tile.first + row * t.channels + tile.channel);
      count += 1;
      const float share = 1.0f / count;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float value = to_float(values.value[k]);
        const float distance = value - mean[k];
        mean[k] += distance * share;
        square[k] += distance * (value - mean[k]);
      }
    }
    const int place = tile.place(t);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      means[place + k] = mean[k];
      squares[place + k] = square[k];
    }
  }
  __syncthreads();
  for (int group = tile.first_group + int(threadIdx.x) / warp; group <= tile.last; group += warps) {
    const int channels = shared_channels(t, group, tile.begin, tile.end);
    const int from = max(tile.begin, group * t.members) - tile.begin;
    auto at = [&](std::int64_t i) -> Moments {
      const int row = int(i) / channels, place = row * t.width + from + int(i) % channels;
      const auto count = (tile.height - row + t.rows_at_once - 1) / t.rows_at_once;
      return {float(count), means[place], squares[place]};
    };
    found(group, warp_moments(std::int64_t(tile.rows_used(t)) * channels, float(tile.height) * channels, at));
  }
}

// tile_means, tile_squares: (N, row_tiles, parts, G), written.
template <typename T, int width>
__global__ void __launch_bounds__(threads, least_blocks)
    group_norm_moments_kernel(const T* __restrict__ x, float* __restrict__ tile_means, float* __restrict__ tile_squares,
                              Tiling t) {
  const Tile tile(t, width);
  tile_moments<T, width>(x, t, tile, [&](int group, const Moments& moments) {
    if (threadIdx.x % warp) return;
    const auto place = partial(t, tile.sample, tile.row_tile, tile.column_tile - Reach(t, group).from, group);
    tile_means[place] = moments.mean;
    tile_squares[place] = moments.squares;
  });
}

// The moments of a group from those of the tiles, by one warp.
__device__ inline Moments moments_of_tiles(const float* __restrict__ tile_means, const float* __restrict__ tile_squares,
                                           const Tiling& t, std::int64_t sample, int group) {
  const Reach reach(t, group);
  const int parts = reach.to - reach.from + 1;
  auto at = [&](std::int64_t i) -> Moments {
    const int row_tile = int(i) / parts, part = int(i) % parts;
    const int begin = (reach.from + part) * t.width;
    const auto rows = min(t.rows - row_tile * t.height, t.height);
    const auto place = partial(t, sample, row_tile, part, group);
    return {float(rows) * shared_channels(t, group, begin, begin + t.width), tile_means[place], tile_squares[place]};
  };
  return warp_moments(std::int64_t(t.row_tiles) * parts, float(t.rows) * t.members, at);
}

// whole: the moments are the tile's own; otherwise they are put together from tile_means and tile_squares.
// y, mean and rstd are written.
template <typename T, int width, bool whole>
__global__ void __launch_bounds__(threads, least_blocks)
    group_norm_silu_kernel(const T* __restrict__ x, Parameters parameters, const float* __restrict__ tile_means,
                           const float* __restrict__ tile_squares, T* __restrict__ y, float* __restrict__ mean,
                           float* __restrict__ rstd, Tiling t, float eps, bool silu) {
  __shared__ float means[max_groups], rstds[max_groups];
  const Tile tile(t, width);

  auto found = [&](int group, const Moments& moments) {
    if (threadIdx.x % warp) return;
    const float inverse = 1.0f / sqrtf(moments.squares / moments.count + eps);
    means[group - tile.first_group] = moments.mean;
    rstds[group - tile.first_group] = inverse;
    if (tile.row_tile == 0 && tile.column_tile == Reach(t, group).from) {  // others find the same
      mean[tile.sample * t.groups + group] = moments.mean;
      rstd[tile.sample * t.groups + group] = inverse;
    }
  };
  if constexpr (whole) {
    tile_moments<T, width>(x, t, tile, found);
  } else {
    for (int group = tile.first_group + int(threadIdx.x) / warp; group <= tile.last; group += warps)
      found(group, moments_of_tiles(tile_means, tile_squares, t, tile.sample, group));
  }
  __syncthreads();
  if (!tile.active) return;

  float level[width], factor[width], bias[width];
  read_parameter(parameters.weight, parameters.of_weight, tile.channel, factor);
  read_parameter(parameters.bias, parameters.of_bias, tile.channel, bias);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const int group = (tile.channel + k) / t.members - tile.first_group;
    level[k] = means[group];
    factor[k] *= rstds[group];
  }
#pragma unroll 2
  for (std::int64_t row = tile.row; row < tile.height; row += t.rows_at_once) {
    const std::int64_t place = tile.first + row * t.channels + tile.channel;
    const auto values = load<width>(x + place);
    Vector<T, width> out;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float z = (to_float(values.value[k]) - level[k]) * factor[k] + bias[k];
      out.value[k] = from_float<T>(silu ? z / (1.0f + expf(-z)) : z);
    }
    store(y + place, out);
  }
}

// --- gradient ------------------------------------------------------------------------------------------

// What a thread needs of its channels to take gradients back through the SiLU.
template <int width>
struct Channels {
  float mean[width], rstd[width], weight[width], bias[width];

  __device__ Channels(const Tiling& t, const Tile& tile, const Parameters& parameters, const float* __restrict__ means,
                      const float* __restrict__ rstds) {
    read_parameter(parameters.weight, parameters.of_weight, tile.channel, weight);
    read_parameter(parameters.bias, parameters.of_bias, tile.channel, bias);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const auto group = tile.sample * t.groups + (tile.channel + k) / t.members;
      mean[k] = means[group];
      rstd[k] = rstds[group];
    }
  }

  // The normalised x, and the gradient before the SiLU.
  __device__ void back(int k, float x, float grad, bool silu, float& normalised, float& before) const {
    normalised = (x - mean[k]) * rstd[k];
    before = grad;
    if (silu) {
      const float z = normalised * weight[k] + bias[k], s = sigmoid(z);
      before *= s * (1.0f + z * (1.0f - s));
    }
  }
};

// Sums over some of a tile's elements of the gradient before the SiLU, and of that times the normalised x.
struct Sums {
  float plain, product;
};

template <typename At>
__device__ inline Sums warp_sums(std::int64_t entries, const At& at) {
  Sums sums = {0, 0};
  for (std::int64_t i = threadIdx.x % warp; i < entries; i += warp) {
    const Sums s = at(i);
    sums.plain += s.plain;
    sums.product += s.product;
  }
  return {warp_sum(sums.plain), warp_sum(sums.product)};
}

// Of a tile: found(group, sums) for each group, by a warp, each channel times its weight; and the sums of each
// channel to for_bias and for_weight, (N, row_tiles, C), unless those are null.
template <typename T, int width, typename Found>
__device__ inline void tile_sums(const T* __restrict__ grad, const T* __restrict__ x, const Parameters& parameters,
                                 const float* __restrict__ means, const float* __restrict__ rstds,
                                 float* __restrict__ for_bias, float* __restrict__ for_weight, const Tiling& t,
                                 const Tile& tile, bool silu, const Found& found) {
  __shared__ float plains[threads * width], products[threads * width];  // (rows_at_once, t.width)
  if (tile.active) {
    const Channels<width> of(t, tile, parameters, means, rstds);
    float plain[width] = {}, product[width] = {};
#pragma unroll 2  // two loads on their way
    for (std::int64_t row = tile.row; row < tile.height; row += t.rows_at_once) {
      const std::int64_t place = tile.first + row * t.channels + tile.channel;
      const auto values = load<width>(x + place), grads = load<width>(grad + place);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        float normalised, before;
        of.back(k, to_float(values.value[k]), to_float(grads.value[k]), silu, normalised, before);
        plain[k] += before;
        product[k] += before * normalised;
      }
    }
    const int place = tile.place(t);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      plains[place + k] = plain[k];
      products[place + k] = product[k];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tile.end - tile.begin; c += threads) {  // a thread a channel, all rows into the first
    Sums sums = {plains[c], products[c]};
    for (int row = 1; row < tile.rows_used(t); ++row) {
      sums.plain += plains[row * t.width + c];
      sums.product += products[row * t.width + c];
    }
    const int channel = tile.begin + c;
    if (for_bias) {
      const std::int64_t place = (tile.sample * t.row_tiles + tile.row_tile) * t.channels + channel;
      for_bias[place] = sums.plain;
      for_weight[place] = sums.product;
    }
    float weight[1];
    read_parameter(parameters.weight, parameters.of_weight, channel, weight);
    plains[c] = weight[0] * sums.plain;
    products[c] = weight[0] * sums.product;
  }
  __syncthreads();
  for (int group = tile.first_group + int(threadIdx.x) / warp; group <= tile.last; group += warps) {
    const int from = max(tile.begin, group * t.members) - tile.begin;
    auto at = [&](std::int64_t i) -> Sums { return {plains[from + i], products[from + i]}; };
    found(group, warp_sums(shared_channels(t, group, tile.begin, tile.end), at));
  }
}

// tile_plains, tile_products: (N, row_tiles, parts, G), written.
template <typename T, int width>
__global__ void __launch_bounds__(threads, least_blocks)
    group_norm_silu_sums_kernel(const T* __restrict__ grad, const T* __restrict__ x, Parameters parameters,
                                const float* __restrict__ mean, const float* __restrict__ rstd,
                                float* __restrict__ tile_plains, float* __restrict__ tile_products,
                                float* __restrict__ for_bias, float* __restrict__ for_weight, Tiling t, bool silu) {
  const Tile tile(t, width);
  tile_sums<T, width>(grad, x, parameters, mean, rstd, for_bias, for_weight, t, tile, silu,
                      [&](int group, const Sums& sums) {
                        if (threadIdx.x % warp) return;
                        const int part = tile.column_tile - Reach(t, group).from;
                        const auto place = partial(t, tile.sample, tile.row_tile, part, group);
                        tile_plains[place] = sums.plain;
                        tile_products[place] = sums.product;
                      });
}

// The sums of a group from those of the tiles, by one warp.
__device__ inline Sums sums_of_tiles(const float* __restrict__ tile_plains, const float* __restrict__ tile_products,
                                     const Tiling& t, std::int64_t sample, int group) {
  const Reach reach(t, group);
  const int parts = reach.to - reach.from + 1;
  auto at = [&](std::int64_t i) -> Sums {
    const auto place = partial(t, sample, int(i) / parts, int(i) % parts, group);
    return {tile_plains[place], tile_products[place]};
  };
  return warp_sums(std::int64_t(t.row_tiles) * parts, at);
}

// whole: the sums are the tile's own, and for_bias and for_weight are written; otherwise they are put together
// from tile_plains and tile_products. grad_x is written.
template <typename T, int width, bool whole>
__global__ void __launch_bounds__(threads, least_blocks)
    group_norm_silu_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ x, Parameters parameters,
                                    const float* __restrict__ mean, const float* __restrict__ rstd,
                                    const float* __restrict__ tile_plains, const float* __restrict__ tile_products,
                                    float* __restrict__ for_bias, float* __restrict__ for_weight,
                                    T* __restrict__ grad_x, Tiling t, bool silu) {
  __shared__ float levels[max_groups], slopes[max_groups];  // what the mean and the variance take
  const Tile tile(t, width);

  auto found = [&](int group, const Sums& sums) {
    if (threadIdx.x % warp) return;
    const float elements = float(t.rows) * t.members;
    levels[group - tile.first_group] = sums.plain / elements;
    slopes[group - tile.first_group] = sums.product / elements;
  };
  if constexpr (whole) {
    tile_sums<T, width>(grad, x, parameters, mean, rstd, for_bias, for_weight, t, tile, silu, found);
  } else {
    for (int group = tile.first_group + int(threadIdx.x) / warp; group <= tile.last; group += warps)
      found(group, sums_of_tiles(tile_plains, tile_products, t, tile.sample, group));
  }
  __syncthreads();
  if (!tile.active) return;

  const Channels<width> of(t, tile, parameters, mean, rstd);
  float level[width], slope[width];
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const int group = (tile.channel + k) / t.members - tile.first_group;
    level[k] = levels[group];
    slope[k] = slopes[group];
  }
#pragma unroll 2
  for (std::int64_t row = tile.row; row < tile.height; row += t.rows_at_once) {
    const std::int64_t place = tile.first + row * t.channels + tile.channel;
    const auto values = load<width>(x + place), grads = load<width>(grad + place);
    Vector<T, width> out;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      float normalised, before;
      of.back(k, to_float(values.value[k]), to_float(grads.value[k]), silu, normalised, before);
      out.value[k] = from_float<T>(of.rstd[k] * (before * of.weight[k] - level[k] - normalised * slope[k]));
    }
    store(grad_x + place, out);
  }
}

__device__ inline void store_parameter(void* values, DType dtype, int channel, float value) {
  switch (dtype) {
    case DType::bfloat16: static_cast<__nv_bfloat16*>(values)[channel] = from_float<__nv_bfloat16>(value); break;
    case DType::float16: static_cast<__half*>(values)[channel] = from_float<__half>(value); break;
    default: static_cast<float*>(values)[channel] = value;
  }
}

// for_bias, for_weight: (tiles, C); grad_weight, grad_bias: (C,), written. A lane a channel, a warp some tiles.
__global__ void __launch_bounds__(threads, least_blocks)
    group_norm_silu_parameters_kernel(const float* __restrict__ for_bias, const float* __restrict__ for_weight,
                                      void* __restrict__ grad_weight, void* __restrict__ grad_bias, DType of_weight,
                                      DType of_bias, std::int64_t tiles, int channels) {
  __shared__ float plains[threads], products[threads];
  const int lane = threadIdx.x % warp, channel = int(blockIdx.x) * warp + lane;
  Sums sums = {0, 0};
  if (channel < channels) {
    for (std::int64_t i = threadIdx.x / warp; i < tiles; i += warps) {
      sums.plain += for_bias[i * channels + channel];
      sums.product += for_weight[i * channels + channel];
    }
  }
  plains[threadIdx.x] = sums.plain;
  products[threadIdx.x] = sums.product;
  __syncthreads();
  if (threadIdx.x >= warp || channel >= channels) return;
  for (int i = 1; i < warps; ++i) {
    sums.plain += plains[i * warp + lane];
    sums.product += products[i * warp + lane];
  }
  store_parameter(grad_bias, of_bias, channel, sums.plain);
  store_parameter(grad_weight, of_weight, channel, sums.product);
}

// --- on the host ---------------------------------------------------------------------------------------

std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// vector_width: elements in an access, of `size` bytes each.
Tiling make_tiling(std::int64_t batch, std::int64_t rows, std::int64_t channels, int groups, int vector_width,
                   int size) {
  if (channels > (1 << 24)) throw std::invalid_argument("group_norm_silu: more than 16777216 channels");
  Tiling t = {};
  t.rows = rows;
  t.channels = int(channels);
  t.groups = groups;
  t.members = t.channels / groups;
  // The fewest channels that are whole groups and whole vectors; of those as many as a cache line wants.
  const int unit = std::lcm(t.members, vector_width), most = max_vectors * vector_width;
  const int wanted = int(ceil_divide(line / size, unit)) * unit;
  t.width = unit > most ? most : std::min(wanted, most / unit * unit);
  t.width = std::min(t.width, t.channels);
  t.vectors = t.width / vector_width;
  t.rows_at_once = threads / t.vectors;
  const std::int64_t depth = std::max<std::int64_t>(least_depth, ceil_divide(rows, max_row_tiles * t.rows_at_once));
  t.height = depth * t.rows_at_once;
  t.row_tiles = int(ceil_divide(rows, t.height));
  t.column_tiles = int(ceil_divide(channels, t.width));
  t.parts = t.width % t.members == 0 ? 1 : int(ceil_divide(t.members - 1, t.width)) + 1;
  t.blocks = batch * t.row_tiles * t.column_tiles;
  t.partials = batch * t.row_tiles * t.parts * groups;
  if (t.width > t.members * (max_groups - 2)) throw std::logic_error("group_norm_silu: too many groups in a tile");
  return t;
}

Parameters parameters_of(const GroupNormSiluArgs& args) {
  return {reinterpret_cast<const void*>(args.weight.address), reinterpret_cast<const void*>(args.bias.address),
          args.weight.dtype, args.bias.dtype};
}

// Calls run(null pointer to the dtype of x, elements in an access as a constant): as many as 16 bytes hold, or one
// where rows or addresses do not begin at multiples of that.
template <typename Run>
void with_width(const GroupNormSiluArgs& args, std::uintptr_t addresses, const Run& run) {
  with_type(args.x.dtype, [&](auto* type) {
    constexpr int widest = access / sizeof(*type);
    if (args.channels % widest == 0 && (addresses | args.x.address) % access == 0)
      run(type, std::integral_constant<int, widest>());
    else
      run(type, std::integral_constant<int, 1>());
  });
}

}  // namespace

std::int64_t group_norm_silu_scratch(std::int64_t batch, std::int64_t rows, std::int64_t channels, int groups,
                                     DType of_x, bool parameters) {
  const int size = of_x == DType::float32 ? 4 : 2;
  std::int64_t most = 0;
  for (const int vector_width : {1, access / size}) {  // addresses decide between the two later
    if (channels % vector_width) continue;
    const Tiling t = make_tiling(batch, rows, channels, groups, vector_width, size);
    const std::int64_t of_channels = parameters ? batch * t.row_tiles * channels : 0;
    most = std::max(most, 2 * (t.partials + of_channels));
  }
  return most;
}

void group_norm_silu(const GroupNormSiluArgs& args, const GroupNormSiluResults& results, float eps, float* scratch,
                     int device, std::uintptr_t stream) {
  use_device(device);
  with_width(args, results.y, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tiling t = make_tiling(args.batch, args.rows, args.channels, args.groups, width, sizeof(T));
    const T* x = reinterpret_cast<const T*>(args.x.address);
    float *tile_means = scratch, *tile_squares = scratch + t.partials;
    if (!t.whole())
      launch("group_norm_silu: moments", group_norm_moments_kernel<T, width>, t.blocks, stream, x, tile_means,
             tile_squares, t);
    auto* kernel = t.whole() ? group_norm_silu_kernel<T, width, true> : group_norm_silu_kernel<T, width, false>;
    launch("group_norm_silu", kernel, t.blocks, stream, x, parameters_of(args), tile_means, tile_squares,
           reinterpret_cast<T*>(results.y), results.mean, results.rstd, t, eps, args.silu);
  });
}

void group_norm_silu_backward(const GroupNormSiluArgs& args, const GroupNormSiluGradients& gradients, float* scratch,
                              int device, std::uintptr_t stream) {
  use_device(device);
  with_width(args, gradients.grad | gradients.x, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tiling t = make_tiling(args.batch, args.rows, args.channels, args.groups, width, sizeof(T));
    const T* x = reinterpret_cast<const T*>(args.x.address);
    const T* grad = reinterpret_cast<const T*>(gradients.grad);
    const bool wanted = gradients.weight != 0;
    const std::int64_t tiles = args.batch * t.row_tiles;
    float *tile_plains = scratch, *tile_products = scratch + t.partials;
    float* for_bias = wanted ? tile_products + t.partials : nullptr;
    float* for_weight = wanted ? for_bias + tiles * t.channels : nullptr;
    if (!t.whole())
      launch("group_norm_silu_backward: sums", group_norm_silu_sums_kernel<T, width>, t.blocks, stream, grad, x,
             parameters_of(args), gradients.mean, gradients.rstd, tile_plains, tile_products, for_bias, for_weight, t,
             args.silu);
    auto* kernel =
        t.whole() ? group_norm_silu_gradient_kernel<T, width, true> : group_norm_silu_gradient_kernel<T, width, false>;
    launch("group_norm_silu_backward", kernel, t.blocks, stream, grad, x, parameters_of(args), gradients.mean,
           gradients.rstd, tile_plains, tile_products, for_bias, for_weight, reinterpret_cast<T*>(gradients.x), t,
           args.silu);
    if (wanted)
      launch("group_norm_silu_backward: parameters", group_norm_silu_parameters_kernel, ceil_divide(t.channels, warp),
             stream, for_bias, for_weight, reinterpret_cast<void*>(gradients.weight),
             reinterpret_cast<void*>(gradients.bias), args.weight.dtype, args.bias.dtype, tiles, t.channels);
  });
}

}  // namespace esd::cuda
