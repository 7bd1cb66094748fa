"""Frozen convolutions that keep nothing but their weight for the backward.

The gradient of a convolution's input needs the weight and the output's gradient. torch saves the
input all the same, for a weight gradient that nobody asks for: a seventh of all that a fit step of
esd-x keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input


class ConvolutionOfFrozen(torch.autograd.Function):
    """conv2d of `pixels` (B, C, h, w), with a gradient for them alone."""

    @staticmethod
    def forward(
        ctx: Any, pixels: torch.Tensor, weight: torch.Tensor, bias: Any, geometry: tuple[Any, ...]
    ) -> torch.Tensor:
        """`geometry`: stride, padding, dilation, groups."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = pixels.shape, geometry
        return F.conv2d(pixels, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), None, None, None


def wants_channels_last(device: str, dtype: torch.dtype) -> bool:
    """Where the CPU has no AVX-512, oneDNN has 16-bit convolutions for this layout alone; in the
    other its plain loops take 8 to 15 times as long (AMD Zen 3, SD 1.x's shapes)."""
    low = dtype in (torch.bfloat16, torch.float16)
    return device == "cpu" and low and torch.backends.cpu.get_cpu_capability() == "AVX2"


class FrozenConv2d(nn.Conv2d):
    """A Conv2d under another class; where its weight trains after all it is torch's own."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not trains and wants_channels_last(pixels.device.type, pixels.dtype):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if trains or not (torch.is_grad_enabled() and pixels.requires_grad):
            return super().forward(pixels)
        geometry = self.stride, self.padding, self.dilation, self.groups
        return ConvolutionOfFrozen.apply(pixels, self.weight, self.bias, geometry)


@contextmanager
def frozen_convolutions(unet: nn.Module) -> Iterator[int]:
    """Within: every plain Conv2d of `unet` that trains nothing saves only its weight; after: as
    before. Gives their number.

    Names, parameters and results stay the same. Enter it when `requires_grad` is set.
    """
    convolutions = [
        m
        for m in unet.modules()
        if type(m) is nn.Conv2d  # what others derive from it is theirs
        and m.padding_mode == "zeros"
        and not isinstance(m.padding, str)
        and not any(p.requires_grad for p in m.parameters())
    ]
    try:
        for module in convolutions:
            module.__class__ = FrozenConv2d
        yield len(convolutions)
    finally:
        for module in convolutions:
            module.__class__ = nn.Conv2d
