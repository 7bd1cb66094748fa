"""Telling base models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .tensor_files import bytes_of

if TYPE_CHECKING:
    from .models import Model

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDENED = 2**20  # numbers at a time: to 8 bytes each, before they are summed


def scheduler_told(model: Model) -> tuple[str, dict[str, Any]]:
    """Its class and its configuration."""
    scheduler = model.pipeline.scheduler
    told = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return type(scheduler).__name__, told


def model_digest(model: Model) -> str:
    """Of the weights of the UNet and the text encoders."""
    encoders = [getattr(model.pipeline, n, None) for n in ("text_encoder", "text_encoder_2")]
    return weights_digest(m for m in (model.unet, *encoders) if m is not None)


def base_digest(model: Model) -> str:
    """Of the weights of the UNet and the text encoders, their dtype included, and of what the
    scheduler is. Before any weight moves or is put away."""
    return digest_of([model_digest(model), *scheduler_told(model)])


def weights_digest(modules: Iterable[torch.nn.Module]) -> str:
    """Of all weights: names, shapes, dtypes, and a sum over each one's bits that is exact
    whatever the device and the order. It tells models apart, in one pass over the memory; who
    wants to deceive it can."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.named_parameters():
            total: int | str = "elsewhere"  # a text encoder that is offloaded
            if type(weight) is not torch.nn.Parameter:  # quantized: its numbers are the library's
                total = type(weight).__name__
            elif not weight.is_meta:
                total = sum_of_bits(weight.detach())
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]


def sum_of_bits(tensor: torch.Tensor) -> int:
    """Of its numbers' bits, read as integers, in 64 bits whatever overflows."""
    bits = tensor.view(INTEGERS[tensor.element_size()])
    if bits.device.type == "cpu":  # NumPy's sum widens nothing beforehand
        return int(bits.numpy().sum(dtype="int64"))
    return torchs_sum(bits)


def torchs_sum(bits: torch.Tensor) -> int:
    """The same on any device; part by part, since each is widened first."""
    rows = torch.atleast_1d(bits)
    few = max(1, WIDENED * len(rows) // max(1, rows.numel()))
    return int(sum(part.sum(dtype=torch.int64) for part in rows.split(few)))


def digest_of(value: Any) -> str:
    """Of nested plain values and tensors."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(bytes_of(part))
        elif isinstance(part, Mapping):
            for key in sorted(part):
                digest.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            digest.update(f"{len(part)} of".encode())
            for inner in part:
                add(inner)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()[:16]
