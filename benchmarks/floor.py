"""The bare cost of a step: its convolutions, matrix products and attention, each timed alone.

`record` runs the step once and writes down every such call, forward and backward, with shapes, strides and
dtypes; `Replay` runs each distinct one by itself on random numbers and adds up time times count. What a
step takes beyond that is the rest: norms, activations, copies, launches, Python.

It is a mark to measure against, not a law: a call that is repeated finds its operands in the cache, and another
memory layout or weights packed beforehand may beat the very call that was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import inner_calls, seconds_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

# What counts is what torch has a FLOP formula for, and attention on the CPU, which it leaves out.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    # what packed_weights.py calls
    mkldnn._convolution_pointwise: lambda *operands, out_val: (
        2 * out_val.numel() * operands[1].numel() // operands[1].shape[0]
    ),
    mkldnn._linear_pointwise: lambda *operands, out_val: (
        2 * out_val.numel() * operands[0].shape[-1]
    ),
}

LEAST = 2e-3  # seconds that one measurement of a call takes at least, where calls are shorter


@dataclass(frozen=True)
class Operand:
    """A tensor argument without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self) -> torch.Tensor:
        """Such a tensor in memory of its own: normal numbers; zeros for integers (seeds, offsets)."""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        storage = torch.empty(max(1, extent), dtype=self.dtype, device=self.device)
        if self.dtype.is_floating_point:
            fill_normal(storage)
        else:
            storage.zero_()
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Packed:
    """The packed weight of a convolution without its numbers; it knows no strides."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def random(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        """Packed as for the call of _convolution_pointwise that has these arguments."""
        pixels, _, _, padding, stride, dilation, groups, *_ = arguments
        weight = torch.empty(self.shape, dtype=self.dtype)
        fill_normal(weight)
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        size = list(pixels.shape)
        return reorder(weight.to_mkldnn(), padding, stride, dilation, groups, size)


@dataclass(frozen=True)
class Call:
    """One call of an operator, its tensors as Operands. Equal calls cost the same."""

    operator: Any
    arguments: tuple[Hashable, ...]
    keywords: tuple[tuple[str, Hashable], ...]
    flops: int

    def prepared(self) -> Callable[[], object]:
        """The call on fresh random tensors, ready to run."""
        arguments = thawed(self.arguments)
        arguments = tuple(a.random(arguments) if isinstance(a, Packed) else a for a in arguments)
        keywords = {name: thawed(value) for name, value in self.keywords}
        return lambda: self.operator(*arguments, **keywords)


@dataclass(frozen=True)
class Floor:
    seconds: float
    flops: int
    calls: int
    distinct: int
    repeats: int


class Recorder(TorchDispatchMode):
    """Counts the calls that FORMULAS knows while it is entered, below autograd: backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    @property
    def flops(self) -> int:
        return sum(call.flops * count for call, count in self.calls.items())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is None:
            # In inference mode linear and the like arrive whole: look inside, as FlopCounterMode does.
            if func is not torch.ops.prim.device.default:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        flops = formula(*args, **kwargs, out_val=result)
        keywords = tuple((name, frozen(kwargs[name])) for name in sorted(kwargs))
        self.calls[Call(func, frozen(args), keywords, flops)] += 1
        return result


def record(step: Callable[[], object]) -> Recorder:
    """One run of `step`, written down."""
    with Recorder() as recorder:
        step()
    return recorder


class Replay:
    """Times each distinct call alone, once a round, so that rounds can take turns with the steps that are
    measured against them: `interleaved({..., "floor": replay.round}, ...)`."""

    def __init__(self, recorder: Recorder, device: str | torch.device) -> None:
        self.calls, self.flops, self.device = recorder.calls, recorder.flops, device
        self.inner: dict[Call, int] = {}
        self.seconds: dict[Call, list[float]] = {call: [] for call in self.calls}

    @torch.no_grad()
    def round(self) -> None:
        for call in self.calls:
            run = call.prepared()
            if call in self.inner:
                run()  # warms up, as inner_calls does the first time
            else:
                self.inner[call] = inner_calls(run, self.device, LEAST)
            self.seconds[call].append(seconds_of(run, self.device, self.inner[call]))

    def floor(self) -> Floor:
        """The median of each call over the rounds, times how often it came."""
        return Floor(
            seconds=sum(n * float(np.median(self.seconds[c])) for c, n in self.calls.items()),
            flops=self.flops,
            calls=self.calls.total(),
            distinct=len(self.calls),
            repeats=min(map(len, self.seconds.values())),
        )


def frozen(value: Any) -> Any:
    """Hashable: tensors as Operands, lists as tuples (which operators take as well)."""
    if isinstance(value, torch.Tensor) and value.is_mkldnn:
        return Packed(tuple(value.shape), value.dtype)
    if isinstance(value, torch.Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return value


def thawed(value: Any) -> Any:
    if isinstance(value, Operand):
        return value.random()
    return tuple(thawed(v) for v in value) if isinstance(value, tuple) else value


# an odd length, so that rows of a matrix are not repetitions of each other
BLOCK = 2**18 + 1


@torch.no_grad()
def fill_normal(tensor: torch.Tensor, std: float = 1.0) -> None:
    """Normal numbers, a block of them over and over: drawing each of a few billion takes minutes."""
    flat = tensor.view(-1)
    block = torch.randn(min(BLOCK, flat.numel()), device=tensor.device).mul_(std).to(tensor.dtype)
    for part in flat.split(BLOCK):
        part.copy_(block[: part.numel()])
