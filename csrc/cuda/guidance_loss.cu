// One pass over the four predictions writes the gradient and one partial sum a block; a second, single
// block adds the partial sums up. Both in a fixed order, without atomics: two runs agree in every bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/guidance_loss.h"

namespace esd::cuda {
namespace {

constexpr int threads = 256;
constexpr int warp = 32;
constexpr int max_blocks_a_sample = 256;
constexpr int vector = 8;  // elements a thread takes at once: 16 bytes of the narrower types, twice that of float

template <typename T>
struct alignas(std::min<std::size_t>(16, sizeof(T) * vector)) Vector {
  T value[vector];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// The sum over the block, in thread 0. The order of additions is the same every time.
__device__ inline float block_sum(float x) {
  __shared__ float of_warp[threads / warp];
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = x;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < threads / warp; ++i) sum += of_warp[i];
  }
  return sum;
}

// S: dtype of student and gradient, T: dtype of the three teacher predictions, width: elements at once.
template <typename S, typename T, int width>
__global__ void __launch_bounds__(threads)
    guidance_loss_kernel(const S* __restrict__ student, const T* __restrict__ anchor, const T* __restrict__ concept_,
                         const T* __restrict__ null, const float* __restrict__ negative_guidance,
                         const float* __restrict__ weight, S* __restrict__ gradient, float* __restrict__ partial_sums,
                         long long elements, int blocks, float scale) {
  const long long b = blockIdx.x / blocks;  // `blocks` of them work on each sample
  const long long begin = b * elements, end = begin + elements;
  const float n = negative_guidance[b];
  const float gradient_factor = scale * weight[b];
  float sum = 0;

  auto one = [&](long long i) {
    const float error = to_float(student[i]) - (to_float(anchor[i]) - n * (to_float(concept_[i]) - to_float(null[i])));
    gradient[i] = from_float<S>(gradient_factor * error);
    sum += error * error;
  };

  const long long thread = (long long)(blockIdx.x % blocks) * threads + threadIdx.x;
  const long long stride = (long long)blocks * threads;
  if constexpr (width == 1) {
    for (long long i = begin + thread; i < end; i += stride) one(i);
  } else {
    // Vectors start at multiples of `width` counted from the tensor's start, where addresses are aligned;
    // a sample of odd size begins and ends between them, and those few elements go one by one.
    const long long first = (begin + width - 1) / width, last = end / width;
    const long long head = min(first * width, end), tail = max(last * width, head);
    for (long long i = begin + thread; i < head; i += stride) one(i);
    for (long long v = first + thread; v < last; v += stride) {
      const Vector<S> s = reinterpret_cast<const Vector<S>*>(student)[v];
      const Vector<T> a = reinterpret_cast<const Vector<T>*>(anchor)[v];
      const Vector<T> c = reinterpret_cast<const Vector<T>*>(concept_)[v];
      const Vector<T> z = reinterpret_cast<const Vector<T>*>(null)[v];
      Vector<S> g;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float error =
            to_float(s.value[k]) - (to_float(a.value[k]) - n * (to_float(c.value[k]) - to_float(z.value[k])));
        g.value[k] = from_float<S>(gradient_factor * error);
        sum += error * error;
      }
      reinterpret_cast<Vector<S>*>(gradient)[v] = g;
    }
    for (long long i = tail + thread; i < end; i += stride) one(i);
  }

  const float total = block_sum(sum);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(threads)
    guidance_loss_sums_kernel(const float* __restrict__ partial_sums, const float* __restrict__ weight,
                              float* __restrict__ per_sample, float* __restrict__ loss, long long batch, int blocks,
                              float elements) {
  float sum = 0;
  for (long long b = threadIdx.x; b < batch; b += threads) {  // a thread a sample
    float of_sample = 0;
    for (int i = 0; i < blocks; ++i) of_sample += partial_sums[b * blocks + i];
    of_sample *= weight[b] / elements;
    per_sample[b] = of_sample;
    sum += of_sample;
  }
  const float total = block_sum(sum);
  if (threadIdx.x == 0) *loss = total / batch;
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int blocks_a_sample(std::int64_t elements) {
  const std::int64_t blocks = (elements + threads * vector - 1) / (threads * vector);
  return static_cast<int>(std::min<std::int64_t>(blocks, max_blocks_a_sample));
}

template <typename S, typename T>
void launch(const GuidanceLossArgs& args, float* scratch, cudaStream_t stream) {
  const int blocks = blocks_a_sample(args.elements);
  const auto grid = static_cast<unsigned>(args.batch * blocks);
  const float scale = 2.0f * args.gradient_scale / (float(args.batch) * float(args.elements));
  const std::uintptr_t addresses =
      args.student.address | args.anchor.address | args.concept_.address | args.null.address | args.gradient.address;
  auto* kernel = addresses % 16 == 0 ? guidance_loss_kernel<S, T, vector> : guidance_loss_kernel<S, T, 1>;
  kernel<<<grid, threads, 0, stream>>>(
      reinterpret_cast<const S*>(args.student.address), reinterpret_cast<const T*>(args.anchor.address),
      reinterpret_cast<const T*>(args.concept_.address), reinterpret_cast<const T*>(args.null.address),
      args.negative_guidance, args.weight, reinterpret_cast<S*>(args.gradient.address), scratch, args.elements, blocks,
      scale);
  check(cudaGetLastError(), "guidance_loss: launch");
  guidance_loss_sums_kernel<<<1, threads, 0, stream>>>(scratch, args.weight, args.per_sample, args.loss, args.batch,
                                                       blocks, float(args.elements));
  check(cudaGetLastError(), "guidance_loss: launch of the sums");
}

template <typename S>
void launch_for_teacher(const GuidanceLossArgs& args, float* scratch, cudaStream_t stream) {
  switch (args.anchor.dtype) {
    case DType::float32: return launch<S, float>(args, scratch, stream);
    case DType::bfloat16: return launch<S, __nv_bfloat16>(args, scratch, stream);
    case DType::float16: return launch<S, __half>(args, scratch, stream);
  }
}

}  // namespace

std::string unavailable() {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no CUDA driver";
  auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver)
    return "built with CUDA " + version(runtime) + ", but the driver only knows " + version(driver);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return devices == 0 ? "no CUDA device" : "";
}

std::int64_t guidance_loss_scratch(std::int64_t batch, std::int64_t elements) {
  return batch * blocks_a_sample(elements);
}

void guidance_loss(const GuidanceLossArgs& args, float* scratch, int device, std::uintptr_t stream) {
  if (args.batch > (1 << 22)) throw std::invalid_argument("guidance_loss: more than 4194304 samples in a batch");
  if (args.anchor.dtype != args.concept_.dtype || args.anchor.dtype != args.null.dtype)
    throw std::invalid_argument("guidance_loss: the three teacher predictions must share one dtype");
  check(cudaSetDevice(device), "guidance_loss: cudaSetDevice");
  auto s = reinterpret_cast<cudaStream_t>(stream);
  switch (args.student.dtype) {
    case DType::float32: return launch_for_teacher<float>(args, scratch, s);
    case DType::bfloat16: return launch_for_teacher<__nv_bfloat16>(args, scratch, s);
    case DType::float16: return launch_for_teacher<__half>(args, scratch, s);
  }
}

}  // namespace esd::cuda
