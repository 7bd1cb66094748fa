"""Frozen weights in oneDNN's own layout: reordered once, not at every call.

On the CPU torch hands convolutions to oneDNN, which reorders each weight into blocks before it
computes; with a few latents in a batch that takes as long as the arithmetic, and the gradient of the
input asks for another order still. Within `packed_weights` every convolution that trains nothing
holds its weight in blocks, made at its first call, and a second set for the backward, made at the
first backward. The plain weight is let go meanwhile and comes back, bit for bit, at the end; one that
is mapped from a file stays where it is, and only its pages leave.

Matrices gain 2% from blocks and would need two sets of them, so they stay as they are; but in float32
torch gives them to the BLAS it was built with, which on some processors takes twice as long as oneDNN.
They are handed to oneDNN directly.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .frozen_conv import FrozenConv2d
from .pages import file_ranges, give_back_pages, page_out
from .quantized_layers import PLAIN

GAPS = 256 * 2**20
FEWEST_PASSES = 64  # making both sets and undoing them takes as long as some fifty UNet passes gain


@dataclass
class Packing:
    """What `packed_weights` found to do."""

    convolutions: int = 0
    matrices: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # why: how many layers
    reason: str = ""  # why nothing was done

    def __str__(self) -> str:
        if self.reason:
            return f"no: {self.reason}"
        told = f"{self.convolutions} convolutions packed, {self.matrices} matrices by oneDNN"
        left = "; ".join(f"{count} {why}" for why, count in self.skipped.items())
        return f"{told} (as they were: {left})" if left else told


# --- convolutions -------------------------------------------------------------------------------------


class Ledger:
    """Bytes that changed their order since free memory was last given back: blocks that come and
    go leave gaps behind, which else grow to half of the UNet."""

    def __init__(self) -> None:
        self.moved = 0

    def note(self, tensor: Tensor) -> None:
        self.moved += tensor.numel() * tensor.element_size()
        if self.moved >= GAPS:
            give_back_pages()
            self.moved = 0


@dataclass
class Packs:
    """The weight of one convolution, in blocks; `plain` is the parameter that it came from.

    Packed tensors can neither be copied nor saved, so they are no parameters.
    """

    plain: Tensor
    convolution: Convolution
    ledger: Ledger
    releasable: bool = True
    in_file: bool = False  # mapped: pages leave, and come back by themselves
    released: bool = False
    strides: tuple[int, ...] = ()
    packed: Tensor | None = None
    turned: Tensor | None = None  # for the gradient of the input
    seen: tuple[int, int] | None = None

    def ready(self, shape: torch.Size, frozen: bool) -> bool:
        """Whether `packed` is there and of today's weight. One that trains (and rests) is packed
        when it comes a second time unchanged, since a single call is not worth it."""
        if self.released:
            return True
        # both: `data` may be another tensor, or have been written to
        now = self.plain.data_ptr(), self.plain._version
        if now != self.seen:
            self.drop()
            self.seen = now
            if not frozen:
                return False
        if self.packed is None:
            self.packed = packed_for(self.plain.detach(), self.convolution, shape)
            if frozen and self.in_file:
                page_out(self.plain.data_ptr(), self.plain.nbytes)
        return True

    def drop(self) -> None:
        self.packed = self.turned = self.seen = None

    def release(self, module: nn.Module) -> None:
        """`plain` lets go of its memory, and the module shows a weight without numbers: whoever
        reads it meets an error, not zeros."""
        self.strides = self.plain.stride()
        self.released = True  # first: whatever interrupts the rest, `restore` puts it right
        placeholder = torch.empty_strided(
            self.plain.shape, self.strides, dtype=self.plain.dtype, device="meta"
        )
        module._parameters["weight"] = nn.Parameter(placeholder, requires_grad=False)
        self.ledger.note(self.plain)
        self.plain.data = self.plain.data.new_empty(0)

    def restore(self, module: nn.Module) -> None:
        if self.released:
            assert self.packed is not None
            dense = self.packed.to_dense()
            if dense.stride() != self.strides:
                strided = torch.empty_strided(dense.shape, self.strides, dtype=dense.dtype)
                dense = strided.copy_(dense)
            self.plain.data = dense
            module._parameters["weight"] = cast(nn.Parameter, self.plain)
            self.released = False
            self.drop()
            self.ledger.note(dense)
        self.drop()

    def forward(self, pixels: Tensor, bias: Tensor | None) -> Tensor:
        assert self.packed is not None
        return self.convolution(pixels, self.packed, bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of the input: at stride 1 a convolution with the weight turned around."""
        assert self.packed is not None
        opposite = self.convolution.opposite()
        if self.turned is None:
            plain = self.packed.to_dense().flip(2, 3).transpose(0, 1).contiguous()
            self.turned = packed_for(plain, opposite, gradient.shape)
            self.ledger.note(plain)
        return opposite(gradient, self.turned, None)


@dataclass(frozen=True)
class Convolution:
    """Geometry of a plain Conv2d."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __call__(self, pixels: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, h, w) in any layout to (B, O, h', w'), channels_last."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            pixels, packed, bias, self.padding, self.stride, self.dilation, 1, "none", [], ""
        )

    def opposite(self) -> Convolution:
        sizes = zip(self.kernel, self.padding, self.dilation, strict=True)
        first, second = (d * (k - 1) - p for k, p, d in sizes)
        return Convolution(self.kernel, self.stride, (first, second), self.dilation)

    @property
    def has_opposite(self) -> bool:
        return self.stride == (1, 1) and min(self.opposite().padding) >= 0


def packed_for(weight: Tensor, convolution: Convolution, shape: torch.Size) -> Tensor:
    """`weight` (O, C, k, k) in blocks for inputs of `shape`; other inputs are computed rightly, and
    about as fast. Without a shape 1x1 kernels would be very slow."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    stride, padding, dilation = convolution.stride, convolution.padding, convolution.dilation
    with torch.no_grad():
        return reorder(weight.to_mkldnn(), padding, stride, dilation, 1, list(shape))


class PackedConvolution(torch.autograd.Function):
    """Convolution of `pixels` with a gradient for them alone. Keeps no tensor at all."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, packs: Packs, bias: Tensor | None) -> Tensor:
        ctx.packs = packs
        return packs.forward(pixels, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packs.backward(gradient), None, None


class PackedConv2d(FrozenConv2d):
    """A Conv2d with `packs` beside its weight. Where gradients are asked of the weight it is
    torch's own."""

    packs: Packs

    def forward(self, pixels: Tensor) -> Tensor:
        packs, gradients, frozen = self.packs, torch.is_grad_enabled(), not trains(self)
        if gradients and not frozen:
            packs.drop()
            return super().forward(pixels)
        wanted = gradients and pixels.requires_grad
        if wanted and not packs.convolution.has_opposite:
            return super().forward(pixels)
        if not packs.ready(pixels.shape, frozen):
            return super().forward(pixels)
        if frozen and packs.releasable and not packs.released:
            packs.release(self)
        if wanted:
            return PackedConvolution.apply(pixels, packs, self.bias)
        return packs.forward(pixels, self.bias)


# --- matrices -----------------------------------------------------------------------------------------


class ProductWithFrozen(torch.autograd.Function):
    """rows @ weight.t() + bias by oneDNN, with a gradient for the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t(), None), None, None


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C) and (O, C), in any layout, to (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class DirectLinear(nn.Linear):
    """A Linear that goes straight to oneDNN. Where it trains it is torch's own."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        gradients = torch.is_grad_enabled()
        if gradients and trains(self):
            return super().forward(input)
        if gradients and input.requires_grad:
            return ProductWithFrozen.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


# --- in and out ---------------------------------------------------------------------------------------


@contextmanager
def packed_weights(unet: nn.Module, *, passes: int | None = None) -> Iterator[Packing]:
    """Within: frozen convolutions of `unet` (on the CPU) compute with weights packed once, frozen
    matrices by oneDNN; after: every module as before, and every weight to the bit.

    `passes`: UNet passes to come; few do not pay for it, and then nothing is done. Names stay the
    same. So do results, to the bit, wherever torch asks oneDNN too; it does not for float32
    matrices nor, on one thread, for float32 kernels of 1x1, whose sums are taken in another order
    there. What comes out is channels_last.

    Enter it when `requires_grad` is set: what trains stays torch's own wherever gradients are on.
    Within, the `weight` of a packed convolution has shape and dtype and no numbers (reading them
    raises); trained weights and the UNet's first parameter are always there. More memory is held
    only for convolutions that a backward passes: their size once more.
    """
    done = Packing(reason=why_not(unet, passes))
    before = [] if done.reason else swap_all(unet, done)
    try:
        yield done
    finally:
        for module, kind in before:
            if isinstance(module, PackedConv2d):
                module.packs.restore(module)
                del module.packs
            module.__class__ = kind


def swap_all(unet: nn.Module, done: Packing) -> list[tuple[nn.Module, type]]:
    """Changes the classes, counts in `done`; the modules changed and what they were."""
    first = next(unet.parameters())  # device and dtype of a UNet are read off it
    holders = Counter(id(p) for m in unet.modules() for p in m._parameters.values())
    ledger, files = Ledger(), file_ranges()
    before: list[tuple[nn.Module, type]] = []
    for module in unet.modules():
        kind = type(module)
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        why = why_not_module(module, holders[id(module.weight)] > 1)
        if why:
            done.skipped[why] = done.skipped.get(why, 0) + 1
        elif isinstance(module, nn.Conv2d):
            packs = Packs(module.weight, geometry(module), ledger)
            packs.in_file = any(a <= module.weight.data_ptr() < b for a, b in files)
            packs.releasable = (
                packs.convolution.has_opposite and module.weight is not first and not packs.in_file
            )
            module.__class__, module.packs = PackedConv2d, packs  # type: ignore[assignment]
            done.convolutions += 1
        else:
            module.__class__ = DirectLinear
            done.matrices += 1
        if not why:
            before.append((module, kind))
    return before


def geometry(module: nn.Conv2d) -> Convolution:
    def pair(sizes: Any) -> tuple[int, int]:
        height, width = sizes
        return height, width

    return Convolution(
        *map(pair, (module.kernel_size, module.stride, module.padding, module.dilation))
    )


def trains(module: nn.Module) -> bool:
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def why_not_module(module: nn.Conv2d | nn.Linear, shared: bool) -> str:
    """Exact types, since a subclass may do something else."""
    if type(module) not in (nn.Conv2d, FrozenConv2d, nn.Linear):
        return f"are {type(module).__name__}"
    if "forward" in vars(module):
        return "have a forward of their own"
    if isinstance(module, nn.Conv2d) and shared:
        return "share their weight"
    if isinstance(module, nn.Conv2d) and not (
        module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        return "have groups or padding of another kind"
    return ""


def why_not(unet: nn.Module, passes: int | None) -> str:
    """Why nothing of `unet` is packed, or nothing."""
    if any(type(module) in PLAIN for module in unet.modules()):
        return "the frozen weights are quantized, and dequantized at each use"
    kinds = {(p.device.type, p.dtype) for p in unet.parameters()}
    if passes is not None and passes < FEWEST_PASSES:
        return f"{passes} UNet passes do not pay for it ({FEWEST_PASSES} would)"
    if {device for device, _ in kinds} != {"cpu"}:
        return f"the UNet is on {', '.join(sorted({device for device, _ in kinds}))}"
    if any(p.is_inference() for p in unet.parameters()):
        return "the weights were made in inference mode"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is off"
    reasons = (why_not_dtype(dtype) for _, dtype in sorted(kinds, key=str))
    return next(filter(None, reasons), "")


@functools.cache
def why_not_dtype(dtype: torch.dtype) -> str:
    """Tried once on a few numbers: these entry points of torch are private, and may change."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    name = str(dtype).removeprefix("torch.")
    try:
        generator = torch.Generator("cpu").manual_seed(0)
        pixels, weight = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((2, 16, 5, 5), (24, 16, 3, 3))
        )
        ours, exact = tried(pixels.to(dtype), weight.to(dtype)), tried_plainly(pixels, weight)
        unit = 16 * torch.finfo(dtype).eps
        right = all(
            (x.float() - y).norm() <= unit * y.norm() for x, y in zip(ours, exact, strict=True)
        )
    except Exception as error:  # noqa: BLE001 -- whatever it is, torch's own layers do the work
        return (
            f"{name} packing failed when tried: {type(error).__name__}: {str(error).strip()[:200]}"
        )
    return "" if right else f"{name} packing gave wrong results when tried"


@torch.no_grad()
def tried(pixels: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """A convolution, its input's gradient, a product, and the weight out of its blocks."""
    convolution = Convolution((3, 3), (1, 1), (1, 1), (1, 1))
    packs = Packs(weight, convolution, Ledger())
    packs.packed = packed_for(weight, convolution, pixels.shape)
    output = packs.forward(pixels, None)
    rows = pixels.flatten(0, 2)
    return (
        output,
        packs.backward(output),
        product(rows, rows[:7], None),
        packs.packed.to_dense(),
    )


@torch.no_grad()
def tried_plainly(pixels: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The same by torch's own functions."""
    output = F.conv2d(pixels, weight, padding=1)
    rows = pixels.flatten(0, 2)
    gradient = F.conv_transpose2d(output, weight, padding=1)
    return output, gradient, rows @ rows[:7].t(), weight
