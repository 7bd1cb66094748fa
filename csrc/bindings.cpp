// The only file that sees Python. Tensors come as (address, dtype code) pairs from esd_fast/operators, the only
// caller, which has checked devices, dtypes, shapes and memory layouts. Checked again here, before an address
// is used: that there is memory behind it, that sizes make sense, and that what is written overlaps nothing
// else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/geglu.h"
#include "cpu/group_norm_silu.h"
#include "cpu/guidance_loss.h"
#include "cpu/guided_step.h"
#include "cpu/isa.h"
#include "tensor_view.h"
#ifdef ESD_WITH_CUDA
#include "cuda/guidance_loss.h"
#endif

namespace py = pybind11;

namespace {

using Tensor = std::pair<std::uintptr_t, int>;

esd::TensorView view(const Tensor& tensor) {
  if (tensor.second < 0 || tensor.second > 2) throw std::invalid_argument("unknown dtype code");
  return {tensor.first, static_cast<esd::DType>(tensor.second)};
}

std::int64_t size_of(esd::DType dtype) { return dtype == esd::DType::float32 ? 4 : 2; }

// The bytes that a kernel reads or writes behind an address.
struct Bytes {
  std::uintptr_t begin;
  std::int64_t count;
  bool wanted = true;

  Bytes(std::uintptr_t address, std::int64_t elements, std::int64_t size = 4)
      : begin(address), count(elements * size) {}
  Bytes(const Tensor& tensor, std::int64_t elements) : Bytes(tensor.first, elements, size_of(view(tensor).dtype)) {}
  // A result that address 0 says is not wanted.
  static Bytes optional(const Tensor& tensor, std::int64_t elements) {
    Bytes bytes(tensor, elements);
    bytes.wanted = tensor.first != 0;
    return bytes;
  }
  bool overlaps(const Bytes& other) const {
    return wanted && other.wanted && begin < other.begin + std::uintptr_t(other.count) &&
           other.begin < begin + std::uintptr_t(count);
  }
};

// Every tensor has memory (a meta or fake one has address 0) and room for something, and what is written
// shares none of it.
void check_memory(const char* op, std::initializer_list<Bytes> read, std::initializer_list<Bytes> written) {
  const auto refuse = [op](const char* why) { throw std::invalid_argument(std::string(op) + ": " + why); };
  for (const auto& group : {read, written}) {
    for (const Bytes& tensor : group) {
      if (!tensor.wanted) continue;
      if (tensor.begin == 0) refuse("a tensor without memory");
      if (tensor.count < 1) refuse("an empty tensor");
    }
  }
  for (const Bytes& target : written) {
    for (const Bytes& source : read) {
      if (target.overlaps(source)) refuse("a result that overlaps an argument");
    }
    for (const Bytes& other : written) {
      if (&other != &target && target.overlaps(other)) refuse("results that overlap");
    }
  }
}

esd::GuidanceLossArgs guidance_loss_args(const Tensor& student, const Tensor& anchor, const Tensor& concept_,
                                         const Tensor& null, std::uintptr_t negative_guidance, std::uintptr_t weight,
                                         std::uintptr_t loss, std::uintptr_t per_sample, std::uintptr_t gradient,
                                         std::int64_t batch, std::int64_t elements, float gradient_scale) {
  if (batch < 1 || elements < 1) throw std::invalid_argument("guidance_loss: an empty batch");
  const std::int64_t all = batch * elements;
  check_memory(
      "guidance_loss",
      {{student, all}, {anchor, all}, {concept_, all}, {null, all}, {negative_guidance, batch}, {weight, batch}},
      {{loss, 1}, {per_sample, batch}, {{gradient, student.second}, all}});
  return {view(student),
          view(anchor),
          view(concept_),
          view(null),
          reinterpret_cast<const float*>(negative_guidance),
          reinterpret_cast<const float*>(weight),
          reinterpret_cast<float*>(loss),
          reinterpret_cast<float*>(per_sample),
          view({gradient, student.second}),
          batch,
          elements,
          gradient_scale};
}

void guidance_loss_cpu(const Tensor& student, const Tensor& anchor, const Tensor& concept_, const Tensor& null,
                       std::uintptr_t negative_guidance, std::uintptr_t weight, std::uintptr_t loss,
                       std::uintptr_t per_sample, std::uintptr_t gradient, std::int64_t batch, std::int64_t elements,
                       float gradient_scale, int threads) {
  esd::cpu::guidance_loss(guidance_loss_args(student, anchor, concept_, null, negative_guidance, weight, loss,
                                             per_sample, gradient, batch, elements, gradient_scale),
                          threads);
}

void geglu_cpu(const Tensor& x, const Tensor& y, std::int64_t rows, std::int64_t width, int threads) {
  if (rows < 1 || width < 1) throw std::invalid_argument("geglu: an empty tensor");
  if (x.second != y.second) throw std::invalid_argument("geglu: a result of another dtype");
  check_memory("geglu", {{x, 2 * rows * width}}, {{y, rows * width}});
  esd::cpu::geglu({view(x), {}, view(y), rows, width}, threads);
}

void geglu_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& of_x, std::int64_t rows, std::int64_t width,
                        int threads) {
  if (rows < 1 || width < 1) throw std::invalid_argument("geglu_backward: an empty tensor");
  if (x.second != of_x.second) throw std::invalid_argument("geglu_backward: a result of another dtype");
  check_memory("geglu_backward", {{grad, rows * width}, {x, 2 * rows * width}}, {{of_x, 2 * rows * width}});
  esd::cpu::geglu_backward({view(x), view(grad), view(of_x), rows, width}, threads);
}

esd::cpu::GroupNorm group_norm(const std::array<std::int64_t, 4>& sizes, bool silu, bool channels_last) {
  const auto [batch, channels, pixels, groups] = sizes;
  if (batch < 1 || channels < 1 || pixels < 1) throw std::invalid_argument("group_norm_silu: an empty tensor");
  if (groups < 1 || channels % groups != 0)
    throw std::invalid_argument("group_norm_silu: groups do not divide channels");
  return {batch, channels, pixels, groups, silu, channels_last};
}

void group_norm_silu_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
                         std::uintptr_t mean, std::uintptr_t rstd, const std::array<std::int64_t, 4>& sizes, double eps,
                         bool silu, bool channels_last, int threads) {
  const esd::cpu::GroupNorm norm = group_norm(sizes, silu, channels_last);
  if (x.second != y.second) throw std::invalid_argument("group_norm_silu: a result of another dtype");
  const std::int64_t all = norm.batch * esd::cpu::sample_size(norm), groups = norm.batch * norm.groups;
  check_memory("group_norm_silu", {{x, all}, {weight, norm.channels}, {bias, norm.channels}},
               {{y, all}, {mean, groups}, {rstd, groups}});
  esd::cpu::group_norm_silu({norm, view(x), view(weight), view(bias), view(y), reinterpret_cast<float*>(mean),
                             reinterpret_cast<float*>(rstd), eps},
                            threads);
}

// of_weight and of_bias: (0, code) each where they are not wanted.
void group_norm_silu_backward_cpu(const Tensor& grad, const Tensor& x, std::uintptr_t mean, std::uintptr_t rstd,
                                  const Tensor& weight, const Tensor& bias, const Tensor& of_x, const Tensor& of_weight,
                                  const Tensor& of_bias, const std::array<std::int64_t, 4>& sizes, bool silu,
                                  bool channels_last, int threads) {
  const esd::cpu::GroupNorm norm = group_norm(sizes, silu, channels_last);
  if (x.second != of_x.second || weight.second != of_weight.second || bias.second != of_bias.second)
    throw std::invalid_argument("group_norm_silu_backward: a result of another dtype");
  const std::int64_t all = norm.batch * esd::cpu::sample_size(norm), groups = norm.batch * norm.groups;
  check_memory("group_norm_silu_backward",
               {{grad, all}, {x, all}, {mean, groups}, {rstd, groups}, {weight, norm.channels}, {bias, norm.channels}},
               {{of_x, all}, Bytes::optional(of_weight, norm.channels), Bytes::optional(of_bias, norm.channels)});
  esd::cpu::group_norm_silu_backward(
      {norm, view(grad), view(x), view(weight), view(bias), reinterpret_cast<const float*>(mean),
       reinterpret_cast<const float*>(rstd), view(of_x), view(of_weight), view(of_bias)},
      threads);
}

// sizes: prompts, batch, elements, calls. table: (rows, ...), its rows `stride` numbers apart. seen and said:
// (0, code) where they are not wanted.
void guided_step_cpu(const Tensor& predictions, std::uintptr_t index, std::uintptr_t table, std::int64_t stride,
                     std::uintptr_t input_scales, std::int64_t rolled, float guidance_scale, std::uintptr_t history,
                     const Tensor& inputs, const Tensor& seen, const Tensor& said,
                     const std::array<std::int64_t, 4>& sizes, int threads) {
  const auto [prompts, batch, elements, calls] = sizes;
  if (prompts < 1 || batch < 1 || elements < 1 || calls < 1)
    throw std::invalid_argument("guided_step: an empty tensor");
  if (rolled < 0 || rolled >= prompts) throw std::invalid_argument("guided_step: no such prompt");
  if (seen.second != inputs.second || said.second != predictions.second)
    throw std::invalid_argument("guided_step: a result of another dtype");
  if (index == 0) throw std::invalid_argument("guided_step: a tensor without memory");
  const std::int64_t call = *reinterpret_cast<const std::int64_t*>(index);
  if (call < 0 || call >= calls)
    throw std::out_of_range("index: " + std::to_string(call) + ": use the number of a call, 0 to " +
                            std::to_string(calls - 1));
  const std::int64_t all = batch * elements;
  check_memory("guided_step",
               {{predictions, prompts * all}, {table, (call + 1) * stride + call + 2}, {input_scales, calls + 1}},
               {{history, (calls + 1) * all},
                {inputs, prompts * all},
                Bytes::optional(seen, calls * all),
                Bytes::optional(said, prompts * calls * all)});
  esd::cpu::guided_step(
      {view(predictions), reinterpret_cast<const float*>(table) + (call + 1) * stride,
       reinterpret_cast<const float*>(input_scales)[call + 1], guidance_scale, reinterpret_cast<float*>(history),
       view(inputs), view(seen), view(said), prompts, batch, elements, calls, call, rolled},
      threads);
}

#ifdef ESD_WITH_CUDA
void guidance_loss_cuda(const Tensor& student, const Tensor& anchor, const Tensor& concept_, const Tensor& null,
                        std::uintptr_t negative_guidance, std::uintptr_t weight, std::uintptr_t loss,
                        std::uintptr_t per_sample, std::uintptr_t gradient, std::int64_t batch, std::int64_t elements,
                        float gradient_scale, std::uintptr_t scratch, int device, std::uintptr_t stream) {
  esd::cuda::guidance_loss(guidance_loss_args(student, anchor, concept_, null, negative_guidance, weight, loss,
                                              per_sample, gradient, batch, elements, gradient_scale),
                           reinterpret_cast<float*>(scratch), device, stream);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ and CUDA kernels of esd_fast; called through esd_fast.ops only.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_isa", &esd::cpu::isa_name);
  m.def("guidance_loss_cpu", &guidance_loss_cpu, unlocked);
  m.def("geglu_cpu", &geglu_cpu, unlocked);
  m.def("geglu_backward_cpu", &geglu_backward_cpu, unlocked);
  m.def("group_norm_silu_cpu", &group_norm_silu_cpu, unlocked);
  m.def("group_norm_silu_backward_cpu", &group_norm_silu_backward_cpu, unlocked);
  m.def("guided_step_cpu", &guided_step_cpu, unlocked);
#ifdef ESD_WITH_CUDA
  m.def("cuda_unavailable", &esd::cuda::unavailable);
  m.def("guidance_loss_scratch", &esd::cuda::guidance_loss_scratch);
  m.def("guidance_loss_cuda", &guidance_loss_cuda, unlocked);
#endif
}
