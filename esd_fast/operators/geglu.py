"""GEGLU's activation, hidden * gelu(gate): the operator and its gradient's.

For its gradient it keeps its argument alone, where plain torch keeps the GELU's result as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import common


def as_torch(x: Tensor) -> Tensor:
    """By torch's own functions and their gradients, as diffusers writes it."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def check(x: Tensor) -> None:
    if x.dim() == 0 or x.numel() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"x: shape {tuple(x.shape)}: give (..., 2 D), hidden and gate, with at least one number"
        )
    common.check_dtype("x", x)


def check_backward(grad: Tensor, x: Tensor) -> None:
    check(x)
    common.check_dtype("grad", grad)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if grad.shape != shape or grad.device != x.device:
        raise ValueError(
            f"grad: shape {tuple(grad.shape)} on {grad.device}: use {shape} on {x.device}"
        )


def gradient_arguments(
    grad: Tensor,
    arguments: tuple[Any, ...],
    results: tuple[Tensor, ...],  # noqa: ARG001
) -> tuple[Any, ...]:
    return grad, *arguments


PLAIN = common.Pair(common.plain("geglu"), common.plain("geglu_backward"), gradient_arguments)
TRITON = common.Pair(
    common.triton("geglu", "geglu"), common.triton("geglu", "geglu_backward"), gradient_arguments
)


def native(x: Tensor) -> tuple[Tensor, ...]:
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    common.native().geglu_cpu(
        common.address("x", x),
        common.address("y", y),
        y.numel() // width,
        width,
        torch.get_num_threads(),
    )
    return (y,)


def native_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    width = x.shape[-1] // 2
    grad_x = torch.empty_like(x)
    common.native().geglu_backward_cpu(
        common.address("grad", grad),
        common.address("x", x),
        common.address("grad_x", grad_x),
        grad.numel() // width,
        width,
        torch.get_num_threads(),
    )
    return (grad_x,)


NATIVE_CPU = common.Pair(native, native_backward, gradient_arguments)


def example(device: torch.device) -> tuple[Any, ...]:
    return tuple(common.kernels("reference").geglu_example(device))


# --- for torch ---------------------------------------------------------------------------------------


def fake(x: Tensor) -> Tensor:
    check(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    check_backward(grad, x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: Tensor) -> Tensor:
    common.refuse_second_derivative("geglu")
    return torch.ops.esd_fast.geglu_backward(grad, *ctx.saved_tensors)


def register(
    library: torch.library.Library, chosen: Callable[[torch.device], Any]
) -> Callable[[Tensor], Tensor]:
    """With torch; `chosen(device)` gives the Pair that runs there. Returns the operator past the dispatcher."""

    def real(x: Tensor) -> Tensor:
        check(x)
        (y,) = chosen(x.device).forward(x.contiguous())
        return y

    def real_backward(grad: Tensor, x: Tensor) -> Tensor:
        check_backward(grad, x)
        (grad_x,) = chosen(x.device).backward(grad.contiguous(), x.contiguous())
        return grad_x

    library.define("geglu(Tensor x) -> Tensor")
    library.define("geglu_backward(Tensor grad, Tensor x) -> Tensor")
    library.impl("geglu", real, "CompositeExplicitAutograd")
    library.impl("geglu_backward", real_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("esd_fast::geglu", fake, lib=library)
    torch.library.register_fake("esd_fast::geglu_backward", fake_backward, lib=library)
    torch.library.register_autograd(
        "esd_fast::geglu", backward, setup_context=setup_context, lib=library
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return real(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            common.refuse_second_derivative("geglu")
            return real_backward(grad, *ctx.saved_tensors)

    return Direct.apply
