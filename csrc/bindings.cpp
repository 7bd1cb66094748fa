// The only file that sees Python. Tensors come as (address, dtype code) pairs, and every size, layout and
// device has been checked by esd_fast/ops.py, which is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "cpu/guidance_loss.h"
#include "cpu/isa.h"
#include "tensor_view.h"
#ifdef ESD_WITH_CUDA
#include "cuda/device.h"
#include "cuda/group_norm_silu.h"
#include "cuda/guidance_loss.h"
#endif

namespace py = pybind11;

namespace {

using Tensor = std::pair<std::uintptr_t, int>;

esd::TensorView view(const Tensor& tensor) {
  if (tensor.second < 0 || tensor.second > 2) throw std::invalid_argument("unknown dtype code");
  return {tensor.first, static_cast<esd::DType>(tensor.second)};
}

esd::GuidanceLossArgs guidance_loss_args(const Tensor& student, const Tensor& anchor, const Tensor& concept_,
                                         const Tensor& null, std::uintptr_t negative_guidance, std::uintptr_t weight,
                                         std::uintptr_t loss, std::uintptr_t per_sample, std::uintptr_t gradient,
                                         std::int64_t batch, std::int64_t elements, float gradient_scale) {
  // Address 0 is what a meta or fake tensor has.
  for (std::uintptr_t address : {student.first, anchor.first, concept_.first, null.first, negative_guidance, weight,
                                 loss, per_sample, gradient}) {
    if (address == 0) throw std::invalid_argument("guidance_loss: a tensor without memory");
  }
  if (batch < 1 || elements < 1) throw std::invalid_argument("guidance_loss: an empty batch");
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

#ifdef ESD_WITH_CUDA
void guidance_loss_cuda(const Tensor& student, const Tensor& anchor, const Tensor& concept_, const Tensor& null,
                        std::uintptr_t negative_guidance, std::uintptr_t weight, std::uintptr_t loss,
                        std::uintptr_t per_sample, std::uintptr_t gradient, std::int64_t batch, std::int64_t elements,
                        float gradient_scale, std::uintptr_t scratch, int device, std::uintptr_t stream) {
  esd::cuda::guidance_loss(guidance_loss_args(student, anchor, concept_, null, negative_guidance, weight, loss,
                                              per_sample, gradient, batch, elements, gradient_scale),
                           reinterpret_cast<float*>(scratch), device, stream);
}

esd::cuda::GroupNormSiluArgs group_norm_silu_args(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  std::int64_t batch, std::int64_t rows, std::int64_t channels,
                                                  int groups, bool silu, std::initializer_list<std::uintptr_t> others) {
  for (std::uintptr_t address : {x.first, weight.first, bias.first})
    if (address == 0) throw std::invalid_argument("group_norm_silu: a tensor without memory");
  for (std::uintptr_t address : others)
    if (address == 0) throw std::invalid_argument("group_norm_silu: a tensor without memory");
  if (batch < 1 || rows < 1 || channels < 1) throw std::invalid_argument("group_norm_silu: an empty batch");
  if (groups < 1 || channels % groups) throw std::invalid_argument("group_norm_silu: groups do not divide channels");
  return {view(x), view(weight), view(bias), batch, rows, channels, groups, silu};
}

std::int64_t group_norm_silu_scratch(const Tensor& x, std::int64_t batch, std::int64_t rows, std::int64_t channels,
                                     int groups, bool parameters) {
  return esd::cuda::group_norm_silu_scratch(batch, rows, channels, groups, view(x).dtype, parameters);
}

void group_norm_silu_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, std::int64_t batch,
                          std::int64_t rows, std::int64_t channels, int groups, bool silu, float eps, std::uintptr_t y,
                          std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t scratch, int device,
                          std::uintptr_t stream) {
  const auto args =
      group_norm_silu_args(x, weight, bias, batch, rows, channels, groups, silu, {y, mean, rstd, scratch});
  esd::cuda::group_norm_silu(args, {y, reinterpret_cast<float*>(mean), reinterpret_cast<float*>(rstd)}, eps,
                             reinterpret_cast<float*>(scratch), device, stream);
}

// grad_weight and grad_bias are both 0 where they are not wanted.
void group_norm_silu_backward_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, std::int64_t batch,
                                   std::int64_t rows, std::int64_t channels, int groups, bool silu, std::uintptr_t grad,
                                   std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t grad_x,
                                   std::uintptr_t grad_weight, std::uintptr_t grad_bias, std::uintptr_t scratch,
                                   int device, std::uintptr_t stream) {
  const auto args =
      group_norm_silu_args(x, weight, bias, batch, rows, channels, groups, silu, {grad, mean, rstd, grad_x, scratch});
  if ((grad_weight == 0) != (grad_bias == 0)) throw std::invalid_argument("group_norm_silu: one parameter's gradient");
  esd::cuda::group_norm_silu_backward(args,
                                      {grad, reinterpret_cast<const float*>(mean), reinterpret_cast<const float*>(rstd),
                                       grad_x, grad_weight, grad_bias},
                                      reinterpret_cast<float*>(scratch), device, stream);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ and CUDA kernels of esd_fast; called through esd_fast.ops only.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_isa", &esd::cpu::isa_name);
  m.def("guidance_loss_cpu", &guidance_loss_cpu, unlocked);
#ifdef ESD_WITH_CUDA
  m.def("cuda_unavailable", &esd::cuda::unavailable);
  m.def("guidance_loss_scratch", &esd::cuda::guidance_loss_scratch);
  m.def("guidance_loss_cuda", &guidance_loss_cuda, unlocked);
  m.def("group_norm_silu_scratch", &group_norm_silu_scratch);
  m.def("group_norm_silu_cuda", &group_norm_silu_cuda, unlocked);
  m.def("group_norm_silu_backward_cuda", &group_norm_silu_backward_cuda, unlocked);
#endif
}
