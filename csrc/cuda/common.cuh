// What the kernels share: wide accesses, conversions, sums in a fixed order, and launches that report their
// errors. tests/native/cuda_on_cpu stands in for the three headers of CUDA and runs the kernels on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "tensor_view.h"

namespace esd::cuda {
namespace {

constexpr int threads = 256;     // of every block
constexpr int least_blocks = 2;  // at once on a multiprocessor: leaves a thread 128 registers, and so no spills
constexpr int warp = 32;
constexpr int warps = threads / warp;
constexpr int access = 16;  // bytes, the widest there is

// Read and written in accesses of 16 bytes, where it has as many.
template <typename T, int width>
struct alignas(std::min<std::size_t>(access, sizeof(T) * width)) Vector {
  T value[width];
};

// The vector whose first element is `first`.
template <int width, typename T>
__device__ inline Vector<T, width> load(const T* first) {
  return *reinterpret_cast<const Vector<T, width>*>(first);
}

template <int width, typename T>
__device__ inline void store(T* first, const Vector<T, width>& vector) {
  *reinterpret_cast<Vector<T, width>*>(first) = vector;
}

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

// The sum over the warp, in every lane. The order of additions is the same every time.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over the block, in thread 0, likewise. Once in a kernel: a second call could overtake the first.
__device__ inline float block_sum(float x) {
  __shared__ float of_warp[warps];
  x = warp_sum(x);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = x;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < warps; ++i) sum += of_warp[i];
  }
  return sum;
}

// --- on the host ---

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken note of: else the next one to ask, torch, reports it as its own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// This runtime is the module's own: it is told of the device that torch has made the current one.
inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), std::int64_t blocks, std::uintptr_t stream,
            Arguments&&... arguments) {
  if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(what) + ": too many elements for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

// Calls `run` with a null pointer to the type that `dtype` stands for.
template <typename Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32: return run(static_cast<float*>(nullptr));
    case DType::bfloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16: return run(static_cast<__half*>(nullptr));
  }
}

}  // namespace
}  // namespace esd::cuda
