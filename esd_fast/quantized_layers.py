"""Frozen layers whose weights are quantized while a run lasts.

Matrices and convolutions alike: the weight is dequantized at each use, for that use alone, so that
only what is trained, and what is kept for the backward, has the model's own size. bitsandbytes' own
layers are not used: they know no convolution, and its 8-bit one keeps its input for the backward.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .frozen_conv import wants_channels_last
from .interrupts import held_back
from .pages import page_out_files
from .parameters import plain_parameters
from .quantize import QUANTIZES_ON, Stored, in_range, stored, stored_bytes, version

# The first and the last layer, as quantizers leave them: all of a picture passes them, and they are small.
ENDS = ("conv_in", "conv_out")


# --- what computes ------------------------------------------------------------------------------------


@dataclass
class Quantized:
    """The weight of one layer; `plain` is the parameter that it came from, put away."""

    plain: Tensor
    placeholder: nn.Parameter  # without numbers; its strides say how the weight is to lie
    stored: Stored
    device: torch.device

    def dense(self) -> Tensor:
        weight = self.stored.dense().view(self.placeholder.shape)
        if weight.dim() == 4 and self.placeholder.is_contiguous(memory_format=torch.channels_last):
            return weight.contiguous(memory_format=torch.channels_last)
        return weight


class ProductWithQuantized(torch.autograd.Function):
    """rows @ weight.t() + bias, with a gradient for the rows alone. Keeps no tensor at all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(rows, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.dense(), None, None


class ConvolutionOfQuantized(torch.autograd.Function):
    """conv2d of `pixels` (B, C, h, w), with a gradient for them alone. Keeps no tensor at all."""

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, weight: Quantized, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        """`geometry`: stride, padding, dilation, groups."""
        ctx.weight, ctx.shape, ctx.geometry = weight, pixels.shape, geometry
        return F.conv2d(pixels, weight.dense(), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            conv2d_input(ctx.shape, ctx.weight.dense(), gradient, *ctx.geometry),
            None,
            None,
            None,
        )


class QuantizedLinear(nn.Linear):
    quantized: Quantized

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        if torch.is_grad_enabled() and input.requires_grad:
            return ProductWithQuantized.apply(input, self.quantized, self.bias)
        return F.linear(input, self.quantized.dense(), self.bias)


class QuantizedConv2d(nn.Conv2d):
    quantized: Quantized

    def forward(self, pixels: Tensor) -> Tensor:
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        if wants_channels_last(pixels.device.type, pixels.dtype):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() and pixels.requires_grad:
            return ConvolutionOfQuantized.apply(pixels, self.quantized, self.bias, geometry)
        return F.conv2d(pixels, self.quantized.dense(), self.bias, *geometry)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
}
PLAIN = {ours: plain for plain, ours in LAYERS.items()}


# --- in and out ---------------------------------------------------------------------------------------


@dataclass
class Quantizing:
    """What `quantized` did."""

    how: str | None = None
    layers: int = 0
    weights: int = 0
    nbytes: int = 0
    put_away: str = ""
    skipped: dict[str, int] = field(default_factory=dict)  # why: how many frozen layers

    def __str__(self) -> str:
        if self.how is None:
            return "no"
        told = (
            f"{self.how} by bitsandbytes {version()}: {self.layers} frozen layers of "
            f"{self.weights / 1e6:.1f} million weights in {self.nbytes / 2**20:,.0f} MiB, "
            f"dequantized at each use, so neither packed nor kept; {self.put_away}"
        )
        left = "; ".join(f"{count} {why}" for why, count in self.skipped.items())
        return f"{told} (as they were: {left})" if left else told


@contextmanager
def quantized(unet: nn.Module, names: Collection[str], how: str | None) -> Iterator[Quantizing]:
    """Within: every frozen matrix and convolution of `unet` computes with its weight in format
    `how` of quantize.QUANTIZERS (None: nothing changes); after: every module and weight as before, to
    the bit. `names`: the parameters that train.

    Within, the `weight` of such a layer has shape and dtype and no numbers. The originals wait on
    the CPU. Where they lie there already they stay, and no memory is saved; but pages of those that
    are mapped from a file leave. Raises ValueError where the device has no such kernels, or
    nothing is frozen.
    """
    done, known = Quantizing(how), sys.exception()
    if how is None:
        yield done
        return
    device = next(unet.parameters()).device
    if device.type not in QUANTIZES_ON:
        raise ValueError(
            f"quantize is {how!r}, the model is on {device.type}; it must be on "
            f"{' or '.join(QUANTIZES_ON)}"
        )
    on_cpu = device.type == "cpu"
    done.put_away = f"originals {'stay' if on_cpu else 'wait'} on the CPU"
    changed: list[tuple[nn.Module, Quantized]] = []
    try:
        change_all(unet, names, done, changed)
        if not changed:
            raise ValueError(
                f"quantize is {how!r}, and no frozen layer of this UNet can be: {done}"
            )
        yield done
    except BaseException as error:
        if not on_cpu:
            forget_frames(error, known)  # tensors of theirs would be in the way of what comes back
        raise
    finally:
        if not on_cpu:
            gc.collect()
        with held_back():
            while changed:  # each lets go of its quantized weight as its own comes back
                put_back(*changed.pop())


def change_all(
    unet: nn.Module,
    names: Collection[str],
    done: Quantizing,
    changed: list[tuple[nn.Module, Quantized]],
) -> None:
    """Quantizes layer by layer: never more than one is there twice. Notes each in `changed`."""
    assert done.how is not None
    for module, why in frozen_layers(unet, names):
        if not why and not in_range(done.how, module.weight.detach()):
            why = "hold numbers out of range"  # none that are no numbers may look as if they were
        if why:
            done.skipped[why] = done.skipped.get(why, 0) + 1
            continue
        plain = module.weight
        with torch.no_grad():
            matrix = plain.detach().contiguous().flatten(1)
            placeholder = torch.empty_strided(
                plain.shape, plain.stride(), dtype=plain.dtype, device="meta"
            )
            weight = Quantized(
                plain,
                nn.Parameter(placeholder, requires_grad=False),
                stored(done.how, matrix),
                plain.device,
            )
        changed.append((module, weight))
        module._parameters["weight"] = weight.placeholder
        module.quantized = weight  # type: ignore[assignment]
        module.__class__ = LAYERS[type(module)]  # type: ignore[assignment]
        if plain.device.type != "cpu":
            plain.data = plain.data.cpu()
        done.layers += 1
        done.weights += plain.numel()
        done.nbytes += weight.stored.nbytes
    page_out_files(weight.plain for _, weight in changed if weight.plain.device.type == "cpu")


def put_back(module: nn.Module, weight: Quantized) -> None:
    """However far `change_all` came with it."""
    module.__class__ = PLAIN.get(type(module), type(module))
    vars(module).pop("quantized", None)
    module._parameters["weight"] = cast(nn.Parameter, weight.plain)
    if weight.plain.device != weight.device:
        weight.plain.data = weight.plain.data.to(weight.device)


def frozen_layers(
    unet: nn.Module, names: Collection[str]
) -> Iterator[tuple[nn.Linear | nn.Conv2d, str]]:
    """Matrices and convolutions of `unet` that train nothing of `names`, each with the reason why it
    cannot be quantized, empty where it can."""
    every = plain_parameters(unet)
    own = {id(p) for p in every.values()}
    trained = {id(every[n]) for n in names}
    holders = Counter(id(p) for m in unet.modules() for p in m._parameters.values())
    wrapped = {id(m.base_layer) for m in unet.modules() if hasattr(m, "base_layer")}
    first = next(unet.parameters())  # device and dtype of a UNet are read off it
    for name, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or id(module.weight) not in own:
            continue
        if any(id(p) in trained for p in module._parameters.values()):
            continue
        if name in ENDS or module.weight is first:
            why = "are the first and the last"
        elif id(module) in wrapped:
            why = "are under an adapter"  # which may read the weight
        else:
            why = why_not(module, holders[id(module.weight)] > 1)
        yield module, why


def why_not(module: nn.Linear | nn.Conv2d, shared: bool) -> str:
    """Exact types, since a subclass may do something else."""
    if type(module) not in LAYERS:
        return f"are {type(module).__name__}"
    if "forward" in vars(module):
        return "have a forward of their own"
    if shared:
        return "share their weight"
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return "have padding of another kind"
    if (
        module.weight[0].numel() % 2
    ):  # two numbers a byte; on the CPU odd rows would be compiled for
        return "have rows of odd length"
    return ""


def forget_frames(error: BaseException | None, known: BaseException | None = None) -> None:
    """Local variables of all frames that `error`, and what it came of, have passed; not those of
    `known`, which the caller was handling before."""
    while error is not None and error is not known:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


# --- what it takes ------------------------------------------------------------------------------------


def held_bytes(unet: nn.Module) -> int:
    """Of the weights as they lie now, quantized or not."""
    plain = sum(p.nbytes for p in unet.parameters() if not p.is_meta)
    ours = (m.quantized for m in unet.modules() if type(m) in PLAIN)
    return plain + sum(cast(Quantized, weight).stored.nbytes for weight in ours)


@dataclass(frozen=True)
class Spared:
    """What quantizing would do to a UNet's memory; bytes."""

    held: int
    """That weights take less."""
    largest: int
    """Of the weights that are dequantized, one at a time."""
    first: int
    """What the first weight takes at most beyond the weights as they were: itself in float16, and
    quantized."""


def spared_by(how: str, unet: nn.Module, names: Collection[str]) -> Spared | None:
    """On any device, the meta device included; None where nothing can be quantized."""
    weights = [module.weight for module, why in frozen_layers(unet, names) if not why]
    if not weights:
        return None
    sizes = [stored_bytes(how, len(w), w[0].numel()) for w in weights]
    return Spared(
        held=sum(w.nbytes for w in weights) - sum(sizes),
        largest=max(w.nbytes for w in weights),
        first=max(2 * w.numel() + size for w, size in zip(weights, sizes, strict=True)),
    )
