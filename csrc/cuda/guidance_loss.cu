// One pass over the four predictions writes the gradient and one partial sum a block; a second, single
// block adds the partial sums up. Both in a fixed order, without atomics: two runs agree in every bit.
#include "cuda/common.cuh"
#include "cuda/guidance_loss.h"

namespace esd::cuda {
namespace {

constexpr int max_blocks_a_sample = 256;
constexpr int widest = 8;  // elements a thread takes at once: 16 bytes of the narrower types, twice that of float

// S: dtype of student and gradient, T: dtype of the three teacher predictions, width: elements at once.
template <typename S, typename T, int width>
__global__ void __launch_bounds__(threads, least_blocks)
    guidance_loss_kernel(const S* __restrict__ student, const T* __restrict__ anchor, const T* __restrict__ concept_,
                         const T* __restrict__ null, const float* __restrict__ negative_guidance,
                         const float* __restrict__ weight, S* __restrict__ gradient, float* __restrict__ partial_sums,
                         std::int64_t elements, int blocks, float scale) {
  const std::int64_t b = blockIdx.x / blocks;  // `blocks` of them work on each sample
  const std::int64_t begin = b * elements, end = begin + elements;
  const float n = negative_guidance[b];
  const float gradient_factor = scale * weight[b];
  float sum = 0;

  auto one = [&](S s, T a, T c, T z) {
    const float error = to_float(s) - (to_float(a) - n * (to_float(c) - to_float(z)));
    sum += error * error;
    return from_float<S>(gradient_factor * error);
  };
  auto one_at = [&](std::int64_t i) { gradient[i] = one(student[i], anchor[i], concept_[i], null[i]); };

  const std::int64_t thread = std::int64_t(blockIdx.x % blocks) * threads + threadIdx.x;
  const std::int64_t stride = std::int64_t(blocks) * threads;
  // Vectors start at multiples of `width` counted from the tensor's start, where addresses are aligned;
  // a sample of odd size begins and ends between them, and those few elements go one by one.
  const std::int64_t first = (begin + width - 1) / width, last = end / width;
  const std::int64_t head = min(first * width, end), tail = max(last * width, head);
  for (std::int64_t i = begin + thread; i < head; i += stride) one_at(i);
  for (std::int64_t v = first + thread; v < last; v += stride) {
    const auto s = load<width>(student + v * width);
    const auto a = load<width>(anchor + v * width);
    const auto c = load<width>(concept_ + v * width);
    const auto z = load<width>(null + v * width);
    Vector<S, width> g;
#pragma unroll
    for (int k = 0; k < width; ++k) g.value[k] = one(s.value[k], a.value[k], c.value[k], z.value[k]);
    store(gradient + v * width, g);
  }
  for (std::int64_t i = tail + thread; i < end; i += stride) one_at(i);

  const float total = block_sum(sum);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(threads, least_blocks)
    guidance_loss_sums_kernel(const float* __restrict__ partial_sums, const float* __restrict__ weight,
                              float* __restrict__ per_sample, float* __restrict__ loss, std::int64_t batch, int blocks,
                              float elements) {
  const int lane = threadIdx.x % warp;
  float sum = 0;
  for (std::int64_t b = threadIdx.x / warp; b < batch; b += warps) {  // a warp a sample
    float of_sample = 0;
    for (int i = lane; i < blocks; i += warp) of_sample += partial_sums[b * blocks + i];
    of_sample = warp_sum(of_sample) * (weight[b] / elements);
    if (lane == 0) {
      per_sample[b] = of_sample;
      sum += of_sample;
    }
  }
  const float total = block_sum(sum);
  if (threadIdx.x == 0) *loss = total / batch;
}

int blocks_a_sample(std::int64_t elements) {
  const std::int64_t blocks = (elements + threads * widest - 1) / (threads * widest);
  return static_cast<int>(std::min<std::int64_t>(blocks, max_blocks_a_sample));
}

template <typename S, typename T>
void run(const GuidanceLossArgs& args, float* scratch, std::uintptr_t stream) {
  const int blocks = blocks_a_sample(args.elements);
  const float scale = 2.0f * args.gradient_scale / (float(args.batch) * float(args.elements));
  const std::uintptr_t addresses =
      args.student.address | args.anchor.address | args.concept_.address | args.null.address | args.gradient.address;
  auto* kernel = addresses % access == 0 ? guidance_loss_kernel<S, T, widest> : guidance_loss_kernel<S, T, 1>;
  launch("guidance_loss", kernel, args.batch * blocks, stream, reinterpret_cast<const S*>(args.student.address),
         reinterpret_cast<const T*>(args.anchor.address), reinterpret_cast<const T*>(args.concept_.address),
         reinterpret_cast<const T*>(args.null.address), args.negative_guidance, args.weight,
         reinterpret_cast<S*>(args.gradient.address), scratch, args.elements, blocks, scale);
  launch("guidance_loss: sums", guidance_loss_sums_kernel, 1, stream, scratch, args.weight, args.per_sample, args.loss,
         args.batch, blocks, float(args.elements));
}

}  // namespace

std::int64_t guidance_loss_scratch(std::int64_t batch, std::int64_t elements) {
  return batch * blocks_a_sample(elements);
}

void guidance_loss(const GuidanceLossArgs& args, float* scratch, int device, std::uintptr_t stream) {
  if (args.anchor.dtype != args.concept_.dtype || args.anchor.dtype != args.null.dtype)
    throw std::invalid_argument("guidance_loss: the three teacher predictions must share one dtype");
  use_device(device);
  with_type(args.student.dtype, [&](auto* s) {
    with_type(args.anchor.dtype, [&](auto* t) {
      run<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>>(args, scratch, stream);
    });
  });
}

}  // namespace esd::cuda
