"""GroupNorm with SiLU or without, channels_last: the operator and its gradient's.

For its gradient it keeps x (the caller's own tensor, no copy), and mean and rstd, two numbers a group; the
SiLU is computed again. That is what plain torch keeps for the norm alone, without what it keeps for the SiLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import common


def as_torch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """By torch's own functions and their gradients."""
    if weight.dtype == bias.dtype == x.dtype:
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if silu else y
    y = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(
            f"x: shape {tuple(x.shape)}: give (N, C, H, W) with at least one number in it"
        )
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups}: use a divisor of x's {x.shape[1]} channels")
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        common.check_dtype(name, value)
        if name != "x" and value.shape != x.shape[1:2]:
            raise ValueError(f"{name}: shape {tuple(value.shape)}: use ({x.shape[1]},)")
        if value.device != x.device:
            raise ValueError(f"{name}: on {value.device}: move it to x's device, {x.device}")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def gradient_arguments(
    grad: Tensor, arguments: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    x, weight, bias, groups, _, silu = arguments
    _, mean, rstd = results
    return grad, x, mean, rstd, weight, bias, groups, silu, True


def pair(forward: common.Implementation, backward: common.Implementation) -> common.Pair:
    return common.Pair(forward, backward, gradient_arguments)


PLAIN = pair(common.plain("group_norm_silu"), common.plain("group_norm_silu_backward"))
TRITON = pair(
    common.triton("group_norm_silu", "group_norm_silu"),
    common.triton("group_norm_silu", "group_norm_silu_backward"),
)


def example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").group_norm_silu_example(device))


def even_example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").group_norm_silu_even_example(device))


# --- the native module: CUDA -------------------------------------------------------------------------


def cuda_sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """x is (batch, rows, channels) in memory."""
    batch, channels, height, width = x.shape
    return batch, height * width, channels, groups


def cuda_scratch(x: Tensor, groups: int, parameters: bool) -> Tensor:
    floats = common.native().group_norm_silu_scratch(
        common.typed_pointer(x), *cuda_sizes(x, groups), parameters
    )
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def cuda_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    scratch = cuda_scratch(x, groups, False)
    with common.on_device_of(x) as device_and_stream:
        common.native().group_norm_silu_cuda(
            *(common.typed_pointer(t) for t in (x, weight, bias)),
            *cuda_sizes(x, groups),
            silu,
            eps,
            *(t.data_ptr() for t in (y, mean, rstd, scratch)),
            *device_and_stream,
        )
    return y, mean, rstd


def cuda_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, ...]:
    dtype = x.dtype
    if grad.dtype != dtype:  # compiled for one dtype of the two; autograd's are the same
        grad, x = grad.float(), x.float()
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    size = x.shape[1] if parameters else 0
    grad_weight, grad_bias = weight.new_empty(size), bias.new_empty(size)
    scratch = cuda_scratch(x, groups, parameters)
    results = (grad_x, grad_weight, grad_bias)
    with common.on_device_of(x) as device_and_stream:
        common.native().group_norm_silu_backward_cuda(
            *(common.typed_pointer(t) for t in (x, weight, bias)),
            *cuda_sizes(x, groups),
            silu,
            *(t.data_ptr() for t in (grad, mean, rstd, *results, scratch)),
            *device_and_stream,
        )
    return grad_x.to(dtype), grad_weight, grad_bias


NATIVE_CUDA = pair(cuda_forward, cuda_backward)


# --- for torch ---------------------------------------------------------------------------------------


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,  # noqa: ARG001
    silu: bool,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    check(x, weight, bias, groups)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


def fake_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,  # noqa: ARG001
    parameters: bool,
) -> tuple[Tensor, ...]:
    check_backward(grad, x, mean, rstd, weight, bias, groups)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    size = x.shape[1] if parameters else 0
    return grad_x, weight.new_empty(size), bias.new_empty(size)


def check_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
) -> None:
    """What the kernels take on trust, also when torch.ops is called directly."""
    check(x, weight, bias, groups)
    common.check_dtype("grad", grad)
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"grad: shape {tuple(grad.shape)} on {grad.device}: use x's, {tuple(x.shape)} on {x.device}"
        )
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value.shape != (x.shape[0], groups) or value.dtype != torch.float32:
            raise ValueError(f"{name}: use what group_norm_silu returned")
        if value.device != x.device:
            raise ValueError(f"{name}: on {value.device}: move it to x's device, {x.device}")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivative("group_norm_silu")
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    gradients = torch.ops.esd_fast.group_norm_silu_backward(
        grad, *ctx.saved_tensors, ctx.groups, ctx.silu, of_weight or of_bias
    )
    wanted = (of_x, of_weight, of_bias)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None


def register(library: torch.library.Library, chosen: Callable[[torch.device], Any]) -> None:
    """With torch; `chosen(device)` gives the Pair that runs there."""

    def real(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, ...]:
        check(x, weight, bias, groups)
        run = chosen(x.device).forward
        y, mean, rstd = run(
            channels_last(x), weight.contiguous(), bias.contiguous(), groups, eps, silu
        )
        return channels_last(y), mean, rstd

    def real_backward(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        silu: bool,
        parameters: bool,
    ) -> tuple[Tensor, ...]:
        check_backward(grad, x, mean, rstd, weight, bias, groups)
        tensors = (mean, rstd, weight, bias)
        grad_x, *others = chosen(x.device).backward(
            channels_last(grad),
            channels_last(x),
            *(t.contiguous() for t in tensors),
            groups,
            silu,
            parameters,
        )
        return channels_last(grad_x), *others

    library.define(
        "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) "
        "-> (Tensor y, Tensor mean, Tensor rstd)"
    )
    library.define(
        "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, "
        "Tensor bias, int groups, bool silu, bool parameters) -> (Tensor, Tensor, Tensor)"
    )
    library.impl("group_norm_silu", real, "CompositeExplicitAutograd")
    library.impl("group_norm_silu_backward", real_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("esd_fast::group_norm_silu", fake, lib=library)
    torch.library.register_fake("esd_fast::group_norm_silu_backward", fake_backward, lib=library)
    torch.library.register_autograd(
        "esd_fast::group_norm_silu", backward, setup_context=setup_context, lib=library
    )
