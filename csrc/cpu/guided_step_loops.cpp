// Compiled once for each instruction-set level, with ESD_ISA naming it. See convert.h for what may be
// included here.
#include "cpu/guided_step_loops.h"

#include "cpu/convert.h"

namespace esd::cpu::ESD_ISA {
namespace {

constexpr std::int64_t block = 1024;  // two float32 buffers of this size stay in the L1 cache

void copy(const TensorView& from, std::int64_t source, const TensorView& to, std::int64_t target, std::int64_t count) {
  std::memcpy(at(to, target), at(from, source), std::size_t(count) * (from.dtype == DType::float32 ? 4 : 2));
}

// state += coefficient of each of the four rows * row
void add_four(const float* coefficients, const float* rows, std::int64_t stride, float* state, std::int64_t count) {
  const float a = coefficients[0], b = coefficients[1], c = coefficients[2], d = coefficients[3];
  const float *x = rows, *y = rows + stride, *z = y + stride, *w = z + stride;
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) state[i] = state[i] + a * x[i] + b * y[i] + c * z[i] + d * w[i];
}

}  // namespace

void guided_step(const GuidedStepArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  float buffers[2][block], state[block];
  const std::int64_t stride = args.batch * args.elements;  // of the history's rows, and from prompt to prompt
  const bool direct = args.inputs.dtype == DType::float32;
  for (std::int64_t start = begin; start < end; start += block) {
    const std::int64_t count = end - start < block ? end - start : block;
    const std::int64_t offset = b * args.elements + start;

    const float* null = load_block(at(args.predictions, offset), args.predictions.dtype, count, buffers[0]);
    const float* followed =
        load_block(at(args.predictions, args.rolled * stride + offset), args.predictions.dtype, count, buffers[1]);
    const float scale = args.guidance_scale;
    float* guided = args.history + (args.call + 1) * stride + offset;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) guided[i] = null[i] + scale * (followed[i] - null[i]);

    const float* past = args.history + offset;
    for (std::int64_t i = 0; i < count; ++i) state[i] = 0;
    std::int64_t row = 0;
    for (; row + 4 <= args.call + 2; row += 4)
      add_four(args.coefficients + row, past + row * stride, stride, state, count);
    for (; row < args.call + 2; ++row) {
      const float coefficient = args.coefficients[row];
      const float* x = past + row * stride;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) state[i] += coefficient * x[i];
    }

    for (std::int64_t i = 0; i < count; ++i) state[i] *= args.input_scale;
    if (direct)
      std::memcpy(at(args.inputs, offset), state, std::size_t(count) * 4);
    else
      store_block(state, at(args.inputs, offset), args.inputs.dtype, count);
    for (std::int64_t prompt = 1; prompt < args.prompts; ++prompt)
      copy(args.inputs, offset, args.inputs, prompt * stride + offset, count);
    if (args.seen.address != 0 && args.call + 1 < args.calls)
      copy(args.inputs, offset, args.seen, (b * args.calls + args.call + 1) * args.elements + start, count);
    if (args.said.address == 0) continue;
    for (std::int64_t prompt = 0; prompt < args.prompts; ++prompt) {
      const std::int64_t place = ((prompt * args.batch + b) * args.calls + args.call) * args.elements + start;
      copy(args.predictions, prompt * stride + offset, args.said, place, count);
    }
  }
}

}  // namespace esd::cpu::ESD_ISA
