// Compiled once for each instruction-set level, with ESD_ISA naming it. See convert.h for what may be
// included here.
#include "cpu/geglu_loops.h"

#include "cpu/vector_math.h"

namespace esd::cpu::ESD_ISA {
namespace {

constexpr std::int64_t block = 512;  // five float32 buffers of this size stay in the L1 cache

void forward(const GegluArgs& args, std::int64_t begin, std::int64_t end) {
  float buffers[3][block];
  const bool direct = args.out.dtype == DType::float32;
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t start = 0; start < args.width; start += block) {
      const std::int64_t count = args.width - start < block ? args.width - start : block;
      const std::int64_t place = 2 * row * args.width + start;
      const float* hidden = load_block(at(args.x, place), args.x.dtype, count, buffers[0]);
      const float* gate = load_block(at(args.x, place + args.width), args.x.dtype, count, buffers[1]);
      char* out = at(args.out, row * args.width + start);
      float* y = direct ? reinterpret_cast<float*>(out) : buffers[2];
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) y[i] = hidden[i] * (gate[i] * normal(gate[i]).below);
      if (!direct) store_block(y, out, args.out.dtype, count);
    }
  }
}

void backward(const GegluArgs& args, std::int64_t begin, std::int64_t end) {
  float buffers[5][block];
  const bool direct = args.out.dtype == DType::float32;
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t start = 0; start < args.width; start += block) {
      const std::int64_t count = args.width - start < block ? args.width - start : block;
      const std::int64_t place = 2 * row * args.width + start;
      const float* grad = load_block(at(args.grad, row * args.width + start), args.grad.dtype, count, buffers[0]);
      const float* hidden = load_block(at(args.x, place), args.x.dtype, count, buffers[1]);
      const float* gate = load_block(at(args.x, place + args.width), args.x.dtype, count, buffers[2]);
      char* out[] = {at(args.out, place), at(args.out, place + args.width)};
      float* of_hidden = direct ? reinterpret_cast<float*>(out[0]) : buffers[3];
      float* of_gate = direct ? reinterpret_cast<float*>(out[1]) : buffers[4];
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const Normal of = normal(gate[i]);
        of_hidden[i] = grad[i] * (gate[i] * of.below);
        of_gate[i] = grad[i] * hidden[i] * (of.below + gate[i] * of.density);
      }
      if (direct) continue;
      store_block(of_hidden, out[0], args.out.dtype, count);
      store_block(of_gate, out[1], args.out.dtype, count);
    }
  }
}

}  // namespace

const GegluLoops geglu_loops = {forward, backward};

}  // namespace esd::cpu::ESD_ISA
