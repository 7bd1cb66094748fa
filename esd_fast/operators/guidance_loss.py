"""guidance_loss: the distance to ESD's target and its gradient for the student, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common

ARGUMENTS = ("student", "anchor", "concept", "null", "negative_guidance", "weight")


def refuse_gradients(*constants: Tensor | float) -> None:
    """Of what `ARGUMENTS` names after student."""
    for name, value in zip(ARGUMENTS[1:], constants, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: requires grad, but only student gets a gradient: pass {name}.detach()"
            )


def gradient_scale(student: Tensor) -> float:
    """About B M / 2 in float16, so that it holds the gradient before the loss scale reaches it (d loss is
    2 / (B M) of an error), and a power of two, so that taking it out again rounds nothing."""
    return 2.0 ** (student.numel().bit_length() - 2) if student.dtype == torch.float16 else 1.0


def check_student(student: Tensor) -> None:
    if student.dim() == 0 or student.numel() == 0:
        raise ValueError(
            f"student: shape {tuple(student.shape)}: give at least one sample, as (B, ...)"
        )


def check_predictions(student: Tensor, *teachers: Tensor) -> None:
    check_student(student)
    shape, device = student.shape, student.device
    for name, value in zip(ARGUMENTS, (student, *teachers), strict=False):
        if value.dtype not in common.DTYPE_CODES:
            raise ValueError(f"{name}: dtype {value.dtype}: use float32, bfloat16 or float16")
        if value.shape != shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}: use that of student, {tuple(student.shape)}"
            )
        if value.device != device:
            raise ValueError(
                f"{name}: on {value.device}: move it to student's device, {student.device}"
            )


def vector(name: str, value: Tensor | float, student: Tensor) -> Tensor:
    """A number for all samples, or one for each, as a (B,) float32 vector beside `student`."""
    batch = student.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((batch,), float(value), dtype=torch.float32, device=student.device)
    if value.dim() == 0:
        value = value.expand(batch)
    check_vector(name, value, student)
    return value


def check_vector(name: str, value: Tensor, student: Tensor) -> None:
    if value.dtype != torch.float32:
        raise ValueError(f"{name}: dtype {value.dtype}: use float32")
    if value.shape != student.shape[:1]:
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}: use ({student.shape[0]},), one for each sample, or a number"
        )
    if value.device != student.device:
        raise ValueError(
            f"{name}: on {value.device}: move it to student's device, {student.device}"
        )


def check(student: Tensor, *others: Tensor) -> None:
    """What the kernels take on trust, also when torch.ops is called directly."""
    *teachers, negative_guidance, weight = others
    check_predictions(student, *teachers)
    check_vector("negative_guidance", negative_guidance, student)
    check_vector("weight", weight, student)


def samples_dense(x: Tensor) -> bool:
    """Whether each sample is one block of memory without gaps, and they follow each other."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return x.shape[0] == 1 or x.stride(0) == expected


def like(student: Tensor, teacher: Tensor) -> Tensor:
    """`teacher` in the memory layout of `student`."""
    if teacher.is_contiguous() and student.is_contiguous():
        return teacher
    if teacher.stride() == student.stride():
        return teacher
    return torch.empty_like(student, dtype=teacher.dtype).copy_(teacher)


PLAIN = common.plain("guidance_loss")
TRITON = common.triton("guidance_loss", "guidance_loss")


def example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").guidance_loss_example(device))


# --- the native module -------------------------------------------------------------------------------


def pointers(
    address: Callable[..., tuple[int, int]],
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor,
    weight: Tensor,
    gradient_scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """Fresh results, and the arguments both native kernels share. The four predictions lie alike (`real`)."""
    batch = student.shape[0]
    teachers = {"anchor": anchor, "concept": concept, "null": null}
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    per_sample = torch.empty(batch, dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student)
    arguments = (
        address("student", student, None),
        *(address(name, x, None) for name, x in teachers.items()),
        address("negative_guidance", negative_guidance)[0],
        address("weight", weight)[0],
        *(x.data_ptr() for x in (loss, per_sample, gradient)),
        batch,
        student.numel() // batch,
        gradient_scale,
    )
    return (loss, per_sample, gradient), arguments


def native_cpu(*args: Any) -> tuple[Tensor, ...]:
    results, arguments = pointers(common.address, *args)
    common.native().guidance_loss_cpu(*arguments, torch.get_num_threads())
    return results


def native_cuda(
    student: Tensor, anchor: Tensor, concept: Tensor, null: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    if not anchor.dtype == concept.dtype == null.dtype:  # compiled for one dtype of the three
        anchor, concept, null = anchor.float(), concept.float(), null.float()
    results, arguments = pointers(common.cuda_address, student, anchor, concept, null, *others)
    batch = student.shape[0]
    scratch = torch.empty(
        common.native().guidance_loss_scratch(batch, student.numel() // batch),
        dtype=torch.float32,
        device=student.device,
    )
    with common.on_device_of(student) as device_and_stream:
        common.native().guidance_loss_cuda(*arguments, scratch.data_ptr(), *device_and_stream)
    return results


# --- for torch ---------------------------------------------------------------------------------------


def fake(
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor,
    weight: Tensor,
    gradient_scale: float,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    check(student, anchor, concept, null, negative_guidance, weight)
    per_sample = torch.empty_like(weight, memory_format=torch.contiguous_format)
    gradient = torch.empty_like(student if samples_dense(student) else student.contiguous())
    return per_sample.new_empty(()), per_sample, gradient


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, per_sample, gradient = output
    ctx.mark_non_differentiable(per_sample, gradient)
    ctx.save_for_backward(gradient)
    ctx.gradient_scale = inputs[-1]


def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, grad_loss, ctx.gradient_scale), *(None,) * 6


def scaled(gradient: Tensor, grad_loss: Tensor, gradient_scale: float) -> Tensor:
    """The chain rule, and `gradient_scale` taken out again."""
    common.refuse_second_derivative("guidance_loss")  # the gradient is a constant to autograd
    factor = grad_loss if gradient_scale == 1 else grad_loss / gradient_scale
    if gradient.dtype == torch.float32 or gradient.device.type == "cpu":
        return gradient * factor
    # On a GPU the product would round the factor to the gradient's dtype first.
    return (gradient.float() * factor).to(gradient.dtype)


def register(
    library: torch.library.Library, chosen: Callable[[torch.device], Any]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """With torch; `chosen(device)` gives what runs there. Returns the operator past the dispatcher: loss
    and per_sample of (student, all the others)."""

    def real(
        student: Tensor,
        anchor: Tensor,
        concept: Tensor,
        null: Tensor,
        negative_guidance: Tensor,
        weight: Tensor,
        gradient_scale: float,
    ) -> tuple[Tensor, ...]:
        check(student, anchor, concept, null, negative_guidance, weight)
        if not samples_dense(student):
            student = student.contiguous()
        return chosen(student.device)(
            student,
            like(student, anchor),
            like(student, concept),
            like(student, null),
            negative_guidance.contiguous(),
            weight.contiguous(),
            gradient_scale,
        )

    library.define(
        "guidance_loss(Tensor student, Tensor anchor, Tensor concept, Tensor null, "
        "Tensor negative_guidance, Tensor weight, float gradient_scale) "
        "-> (Tensor loss, Tensor per_sample, Tensor gradient)"
    )
    library.impl("guidance_loss", real, "CompositeExplicitAutograd")
    torch.library.register_fake("esd_fast::guidance_loss", fake, lib=library)
    torch.library.register_autograd(
        "esd_fast::guidance_loss", backward, setup_context=setup_context, lib=library
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor, others: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            loss, per_sample, gradient = real(student, *others)
            ctx.mark_non_differentiable(per_sample)
            ctx.set_materialize_grads(False)  # per_sample's
            ctx.save_for_backward(gradient)
            ctx.gradient_scale = others[-1]
            return loss, per_sample

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            (gradient,) = ctx.saved_tensors
            return scaled(gradient, grad_loss, ctx.gradient_scale), None

    return Direct.apply
