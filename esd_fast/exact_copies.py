"""Copies of tensors that take half the room where nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ExactCopies(Mapping[str, "torch.Tensor"]):
    """Copies of `tensors` by name, on their devices; each comes back bit for bit in its own dtype.

    A float32 tensor that float16 or bfloat16 holds exactly is kept in that, as are all of a model
    that was stored in half precision and computes in float32. It is widened at every access, into
    a tensor of its own; the others are given as they are kept.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.kept = {name: kept(tensor) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.kept[name].to(self.dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, in 16 bits where those say the same."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            # the first row tells of nearly all that do not fit
            if holds(dtype, tensor[:1] if tensor.dim() else tensor) and holds(dtype, tensor):
                return tensor.to(dtype)
    return tensor.clone()


def holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether float32 `tensor` is the same in `dtype`, in its bits: numbers may be too small for
    a comparison, or none at all."""
    import torch

    back = tensor.to(dtype).float()
    return torch.equal(back.view(torch.int32), tensor.view(torch.int32))
