"""GroupNorm with SiLU or without: the operator and its gradient's. Results are channels_last; on the CPU, whose
convolutions do not ask for it, only where x is, and contiguous else.

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


FEWEST = 2**18  # numbers; with fewer the way to the CPU's kernels takes longer than they save


def torch_is_faster(x: Tensor) -> bool:
    """Than the CPU's kernels, by benchmarks/results/kernels.json; in channels_last not in low precision."""
    small = x.is_cpu and x.numel() < FEWEST
    return small and (x.dtype == torch.float32 or x.is_contiguous())


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    """In which the kernels get pictures, and results go out."""
    if x.device.type != "cpu":
        return torch.channels_last
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def gradient_arguments(
    grad: Tensor, arguments: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    x, weight, bias, groups, _, silu = arguments
    _, mean, rstd = results
    return grad, x, mean, rstd, weight, bias, groups, silu, True


def pair(forward: common.Implementation, backward: common.Implementation) -> common.Pair:
    return common.Pair(forward, backward, gradient_arguments)


PLAIN = pair(common.plain("group_norm_silu"), common.plain("group_norm_silu_backward"))


def triton(name: str) -> common.Implementation:
    """The launcher, whose pictures (x; grad and x) are channels_last on the CPU too, in the interpreter."""
    launch, pictures = common.triton("group_norm_silu", name), 2 if "backward" in name else 1

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return launch(*map(channels_last, arguments[:pictures]), *arguments[pictures:])

    return run


TRITON = pair(triton("group_norm_silu"), triton("group_norm_silu_backward"))


# --- the native module -------------------------------------------------------------------------------


def sizes(x: Tensor, groups: int) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width, groups


def native(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    layout = memory_format(x)
    y = torch.empty_like(x, memory_format=layout)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    common.native().group_norm_silu_cpu(
        common.address("x", x, layout),
        common.address("weight", weight),
        common.address("bias", bias),
        common.address("y", y, layout),
        mean.data_ptr(),
        rstd.data_ptr(),
        sizes(x, groups),
        eps,
        silu,
        layout == torch.channels_last,
        torch.get_num_threads(),
    )
    return y, mean, rstd


def native_backward(
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
    layout = memory_format(x)
    grad_x = torch.empty_like(x, memory_format=layout)
    size = x.shape[1] if parameters else 0
    grad_weight, grad_bias = weight.new_empty(size), bias.new_empty(size)
    common.native().group_norm_silu_backward_cpu(
        common.address("grad", grad, layout),
        common.address("x", x, layout),
        common.address("mean", mean)[0],
        common.address("rstd", rstd)[0],
        common.address("weight", weight),
        common.address("bias", bias),
        common.address("grad_x", grad_x, layout),
        common.address("grad_weight", grad_weight),  # 0 where it is empty
        common.address("grad_bias", grad_bias),
        sizes(x, groups),
        silu,
        layout == torch.channels_last,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias


NATIVE_CPU = pair(native, native_backward)


def example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").group_norm_silu_example(device))


def even_example(device: torch.device) -> tuple[Any, ...]:
    """Contiguous on the CPU, whose kernels take that as well."""
    arguments, grad = common.kernels("reference").group_norm_silu_even_example(device)
    if device.type == "cpu":
        arguments, grad = (arguments[0].contiguous(), *arguments[1:]), grad.contiguous()
    return arguments, grad


# --- the native module: CUDA -------------------------------------------------------------------------


def cuda_sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """x is (batch, rows, channels) in memory."""
    batch, channels, height, width = x.shape
    return batch, height * width, channels, groups


def cuda_scratch(x: Tensor, groups: int, parameters: bool) -> Tensor:
    floats = common.native().group_norm_silu_scratch(
        common.cuda_address("x", x, torch.channels_last), *cuda_sizes(x, groups), parameters
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
            common.cuda_address("x", x, torch.channels_last),
            common.cuda_address("weight", weight),
            common.cuda_address("bias", bias),
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
            common.cuda_address("x", x, torch.channels_last),
            common.cuda_address("weight", weight),
            common.cuda_address("bias", bias),
            *cuda_sizes(x, groups),
            silu,
            common.cuda_address("grad", grad, torch.channels_last)[0],
            common.cuda_address("mean", mean)[0],
            common.cuda_address("rstd", rstd)[0],
            *(t.data_ptr() for t in (*results, scratch)),
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
    y = torch.empty_like(x, memory_format=memory_format(x))
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
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
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
    return gradients(ctx, grad, torch.ops.esd_fast.group_norm_silu_backward)


def gradients(ctx: Any, grad: Tensor, run: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivative("group_norm_silu")
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    found = run(grad, *ctx.saved_tensors, ctx.groups, ctx.silu, of_weight or of_bias)
    wanted = (of_x, of_weight, of_bias)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None


def register(
    library: torch.library.Library, chosen: Callable[[torch.device], Any]
) -> Callable[..., Tensor]:
    """With torch; `chosen(device)` gives the Pair that runs there. Returns the operator, y alone, past the
    dispatcher."""

    def real(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, ...]:
        check(x, weight, bias, groups)
        run, layout = chosen(x.device).forward, memory_format(x)
        y, mean, rstd = run(
            x.contiguous(memory_format=layout),
            weight.contiguous(),
            bias.contiguous(),
            groups,
            eps,
            silu,
        )
        return y.contiguous(memory_format=layout), mean, rstd

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
        tensors, layout = (mean, rstd, weight, bias), memory_format(x)
        grad_x, *others = chosen(x.device).backward(
            grad.contiguous(memory_format=layout),
            x.contiguous(memory_format=layout),
            *(t.contiguous() for t in tensors),
            groups,
            silu,
            parameters,
        )
        return grad_x.contiguous(memory_format=layout), *others

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

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
        ) -> Tensor:
            y, mean, rstd = real(x, weight, bias, groups, eps, silu)
            ctx.groups, ctx.silu = groups, silu
            ctx.save_for_backward(x, mean, rstd, weight, bias)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return gradients(ctx, grad, real_backward)

    return Direct.apply
