// Stands in for CUDA's header, so that csrc/cuda/*.cu compile as plain C++ and run on the CPU, launchers included.
//
// Blocks run one after another, the threads of a block as fibers of one thread: each runs until it waits at a
// barrier or in a shuffle. Blocks and threads take their turns in an order drawn from `order`; what depends on it
// lacks a barrier, or reads what another block leaves behind. Waiting for threads that never come ends the process.
// Sanitizers see every access to memory, `__shared__` included.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

inline std::mt19937 order;
constexpr int lanes = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::_Exit(3);
}

struct Fiber {
  enum State { ready, at_barrier, at_shuffle, done };
  State state = ready;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  void* fake_stack = nullptr;
  int shuffles = 0;
};

// The fibers of a block, their stacks used again by the next.
class Block {
 public:
  void run(unsigned size, const std::function<void()>& kernel) {
    if (size % lanes) fail("blocks are whole warps here");
    fibers_.resize(size);
    kernel_ = &kernel;
    for (Fiber& fiber : fibers_) {
      fiber.state = Fiber::ready;
      fiber.shuffles = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    std::vector<unsigned> turns(size);
    std::iota(turns.begin(), turns.end(), 0u);
    while (!all(0, size, Fiber::done)) {
      std::shuffle(turns.begin(), turns.end(), order);
      bool moved = false;
      for (unsigned i : turns) {
        if (fibers_[i].state != Fiber::ready) continue;
        resume(i);
        moved = true;
      }
      if (!moved) fail("threads wait at a barrier or in a shuffle that others do not reach");
      release();
    }
  }

  void wait(Fiber::State where) {
    current_->state = where;
    leave();
  }

  // Each lane's number is kept for two shuffles, since a lane can be one ahead of the others and no more.
  float shuffle(float x, unsigned from) {
    const unsigned lane = threadIdx.x, first = lane / lanes * lanes;
    auto& numbers = exchanged_[current_->shuffles++ % 2];
    numbers.resize(fibers_.size());
    numbers[lane] = x;
    wait(Fiber::at_shuffle);
    return numbers[first + from % lanes];
  }

 private:
  bool all(unsigned begin, unsigned end, Fiber::State state) const {
    return std::all_of(fibers_.begin() + begin, fibers_.begin() + end, [&](auto& f) { return f.state == state; });
  }

  void release() {
    if (all(0, unsigned(fibers_.size()), Fiber::at_barrier))
      for (Fiber& fiber : fibers_) fiber.state = Fiber::ready;
    for (unsigned w = 0; w < fibers_.size(); w += lanes) {
      if (!all(w, w + lanes, Fiber::at_shuffle)) continue;
      for (unsigned i = w; i < w + lanes; ++i) fibers_[i].state = Fiber::ready;
    }
  }

  void resume(unsigned i) {
    current_ = &fibers_[i];
    threadIdx = dim3(i, 0, 0);
    start_switch(&fake_stack_, current_->stack.data(), current_->stack.size());
    swapcontext(&scheduler_, &current_->context);
    finish_switch(fake_stack_, nullptr, nullptr);
  }

  void leave() {
    Fiber* self = current_;
    const bool for_good = self->state == Fiber::done;
    start_switch(for_good ? nullptr : &self->fake_stack, stack_, stack_size_);
    swapcontext(&self->context, &scheduler_);
    finish_switch(self->fake_stack, &stack_, &stack_size_);
  }

  static void enter();

#if defined(__SANITIZE_ADDRESS__)
  static void start_switch(void** keep, const void* stack, std::size_t size) {
    __sanitizer_start_switch_fiber(keep, stack, size);
  }
  static void finish_switch(void* kept, const void** stack, std::size_t* size) {
    __sanitizer_finish_switch_fiber(kept, stack, size);
  }
#else
  static void start_switch(void**, const void*, std::size_t) {}
  static void finish_switch(void*, const void**, std::size_t*) {}
#endif

  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  void* fake_stack_ = nullptr;
  const void* stack_ = nullptr;  // the scheduler's own
  std::size_t stack_size_ = 0;
  std::array<std::vector<float>, 2> exchanged_;
};

inline Block block;

inline void Block::enter() {
  finish_switch(nullptr, &block.stack_, &block.stack_size_);
  (*block.kernel_)();
  block.current_->state = Fiber::done;
  block.leave();
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block.wait(cuda_on_cpu::Fiber::at_barrier); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return cuda_on_cpu::block.shuffle(x, threadIdx.x % cuda_on_cpu::lanes ^ unsigned(mask));
}

// --- the host's side ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* devices) { return *devices = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  std::vector<unsigned> turns(gridDim.x);
  std::iota(turns.begin(), turns.end(), 0u);
  std::shuffle(turns.begin(), turns.end(), cuda_on_cpu::order);
  const std::function<void()> run = [&] { kernel(arguments...); };
  for (unsigned i : turns) {
    blockIdx = dim3(i, 0, 0);
    cuda_on_cpu::block.run(blockDim.x, run);
  }
  return cudaSuccess;
}
