// Compiled once for each instruction-set level, with ESD_ISA naming it. See convert.h for what may be
// included here.
#include "cpu/guidance_loss_loops.h"

#include "cpu/convert.h"

namespace esd::cpu::ESD_ISA {

double guidance_loss(const GuidanceLossArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t block = 512;  // five float32 buffers of this size stay in the L1 cache
  float buffers[5][block];
  const float n = args.negative_guidance[b];
  const float scale = 2.0f * args.weight[b] * args.gradient_scale / (float(args.batch) * float(args.elements));
  const bool direct = args.gradient.dtype == DType::float32;
  double total = 0;

  for (std::int64_t start = begin; start < end; start += block) {
    const std::int64_t count = end - start < block ? end - start : block;
    const std::int64_t offset = b * args.elements + start;
    const float* student = load_block(at(args.student, offset), args.student.dtype, count, buffers[0]);
    const float* anchor = load_block(at(args.anchor, offset), args.anchor.dtype, count, buffers[1]);
    const float* concept_ = load_block(at(args.concept_, offset), args.concept_.dtype, count, buffers[2]);
    const float* null = load_block(at(args.null, offset), args.null.dtype, count, buffers[3]);
    float* gradient = direct ? reinterpret_cast<float*>(at(args.gradient, offset)) : buffers[4];

    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < count; ++i) {
      const float error = student[i] - (anchor[i] - n * (concept_[i] - null[i]));
      sum += error * error;
      gradient[i] = scale * error;
    }
    total += sum;
    if (!direct) store_block(gradient, at(args.gradient, offset), args.gradient.dtype, count);
  }
  return total;
}

}  // namespace esd::cpu::ESD_ISA
