"""Keys and values of a prompt, computed once.

A prompt's states stay the same for a whole trajectory, and so do the keys and values that every
cross-attention makes of them, as long as the two matrices do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Kept:
    """What came out last, and of what."""

    states: weakref.ref[Tensor]
    of: tuple[Any, ...]
    result: Tensor


class KeptProjection(nn.Linear):
    """A Linear that remembers its last result for as long as input and weights are the same, told
    by the tensors themselves and their version counters. Nothing is kept where a gradient is asked.
    """

    kept: Kept | None

    def forward(self, input: Tensor) -> Tensor:  # torch's name for it
        tensors = [input, *(p for p in self._parameters.values() if p is not None)]
        if any(t.is_inference() for t in tensors):  # they have no version
            return super().forward(input)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self.kept = None
            return super().forward(input)
        # both: `data` may be another tensor, or have been written to
        of = tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)
        kept = self.kept
        if kept is None or kept.states() is not input or kept.of != of:
            self.kept = kept = Kept(weakref.ref(input), of, super().forward(input))
        return kept.result


@contextmanager
def kept_projections(unet: Any) -> Iterator[int]:
    """Within: `to_k` and `to_v` of every cross-attention of `unet` keep what they made of the last
    prompt (the very tensor that the UNet is asked with, unchanged); after: as before. Gives their
    number; none but on the CPU: a CUDA graph would go on with what was kept when it was captured."""
    on_cpu = next(unet.parameters()).device.type == "cpu"
    matrices = [
        matrix
        for attention in unet.modules()
        if on_cpu and getattr(attention, "is_cross_attention", False)
        for matrix in (attention.to_k, attention.to_v)
        if type(matrix) is nn.Linear  # what others derive from it is theirs
        and "forward" not in vars(matrix)
    ]
    try:
        for matrix in matrices:
            matrix.__class__ = KeptProjection
            vars(matrix)["kept"] = None
        yield len(matrices)
    finally:
        for matrix in matrices:
            matrix.__class__ = nn.Linear
            del vars(matrix)["kept"]
