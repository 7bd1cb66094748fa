"""Formats of quantized weights, by name: what is known of them before anything is imported, and how a
weight is brought into one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .parameters import canonical_method
from .terminal import quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# bitsandbytes: what diffusers and peft quantize with, and an extra here already. torchao 0.18 has no
# 4 bits that a backward passes, and saves its int8 weights for it dequantized.
EXTRA = "bitsandbytes"
QUANTIZES_ON = ("cuda", "cpu")
QUANTIZERS = {
    "int8": "8 bits, a scale a row (LLM.int8()'s weights)",
    "nf4": "4 bits, a scale for 64 weights, which has 8 bits itself (QLoRA)",
}
NF4_BLOCK, SCALES_BLOCK = 64, 256  # weights to a scale; scales to a scale of theirs
NF4_TABLES = 4 * (16 + 1)  # the 16 values, and the scales' mean
TRAIN_ALL = ("esd-all", "ldm-full")


def check_quantize(how: object, method: str) -> None:
    """Raises ValueError where `how` is no format, or `method` trains all that could be quantized."""
    if not isinstance(how, str) or how not in QUANTIZERS:
        raise ValueError(
            f"quantize is {quoted(how)}; it must be {' or '.join(map(repr, QUANTIZERS))}, or left out"
        )
    if canonical_method(method) in TRAIN_ALL:
        raise ValueError(
            f"quantize is {how!r}, and train_method {method!r} trains every matrix and convolution: "
            "nothing is left to quantize; another train_method, or no quantize"
        )


def check_library(how: str) -> None:
    """Raises ValueError, with what to install, where the library of format `how` is not."""
    if importlib.util.find_spec(EXTRA) is None:
        raise ValueError(
            f"quantize is {how!r}, which needs {EXTRA} (the extra of that name): "
            f"pip install {EXTRA}"
        )


class Stored(Protocol):
    """A quantized matrix."""

    def dense(self) -> Tensor:
        """(rows, columns) in the dtype that it had."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Int8:
    numbers: Tensor  # (rows, columns) int8
    scales: Tensor  # (rows, 1) float32
    dtype: torch.dtype

    def dense(self) -> Tensor:
        # as bitsandbytes does it in its backwards: each number rounded once
        return self.numbers.to(self.dtype).mul_(self.scales)

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class NF4:
    packed: Tensor  # uint8, two weights each
    state: Any  # bitsandbytes' QuantState

    def dense(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state)

    @property
    def nbytes(self) -> int:
        outer = self.state.state2
        scales = (self.state.absmax, self.state.code, self.state.offset, outer.absmax)
        return self.packed.nbytes + sum(t.nbytes for t in scales)  # outer.code is all layers'


def stored(how: str, matrix: Tensor) -> Stored:
    """`matrix` (rows, columns), of float32, bfloat16 or float16, in format `how` of QUANTIZERS, where
    it lies."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if how == "int8":
        numbers, largest, _ = int8_vectorwise_quant(matrix.half())
        return Int8(numbers, largest.unsqueeze(1) / 127, matrix.dtype)
    packed, state = quantize_4bit(
        matrix, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return NF4(packed, state)


def in_range(how: str, weight: Tensor) -> bool:
    """Whether format `how` can hold all of `weight`: numbers, and for int8, which bitsandbytes
    makes of float16, none beyond that."""
    import torch

    limit = torch.finfo(torch.float16 if how == "int8" else weight.dtype).max
    return bool(torch.linalg.vector_norm(weight, math.inf) <= limit)


def stored_bytes(how: str, rows: int, columns: int) -> int:
    """What `stored` gives, in bytes."""
    if how == "int8":
        return rows * (columns + 4)
    scales = math.ceil(rows * columns / NF4_BLOCK)
    return (
        math.ceil(rows * columns / 2) + scales + 4 * math.ceil(scales / SCALES_BLOCK) + NF4_TABLES
    )


def version() -> str:
    return importlib.metadata.version(EXTRA)
