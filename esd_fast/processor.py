"""What the CPU is fast in, asked of itself: many take bfloat16 and are slow in it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .packed_weights import Convolution, packed_for, product, why_not_dtype

BIG = 100_000_000  # weights; smaller UNets are fast enough in float32, and keep all its digits
WORTH = 1.3  # times faster; less does not pay for the lost digits
REPEATS = 3


@dataclass(frozen=True)
class Probe:
    """Seconds of one convolution and one product with `channels` channels."""

    channels: int
    float32: float
    bfloat16: float

    @property
    def gain(self) -> float:
        return self.float32 / self.bfloat16

    def __str__(self) -> str:
        return f"bfloat16 {self.gain:.1f} times as fast as float32 at {self.channels} channels"


def dtype_for(unet_config: Mapping[str, Any]) -> torch.dtype:
    """bfloat16 for a big UNet where the processor gains from it, tried on the shapes of its deepest
    level; else float32."""
    if weights_of(unet_config) < BIG:
        return torch.float32
    return faster_of(probe(*deepest(unet_config)))


def faster_of(found: Probe | str) -> torch.dtype:
    worth_it = isinstance(found, Probe) and found.gain >= WORTH
    return torch.bfloat16 if worth_it else torch.float32


def deepest(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels, and pixels a side at the model's own resolution."""
    channels = unet_config["block_out_channels"]
    return channels[-1], max(1, unet_config["sample_size"] // 2 ** (len(channels) - 1))


def weights_of(unet_config: Mapping[str, Any]) -> int:
    from diffusers import UNet2DConditionModel

    from .models.folder_check import loading

    with loading("the model"), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    return sum(p.numel() for p in unet.parameters())


@functools.cache
def probe(channels: int, side: int) -> Probe | str:
    """Both dtypes in turn, once in a process (a fifth of a second for SD 1.x); or why not."""
    for dtype in (torch.float32, torch.bfloat16):
        why = why_not_dtype(dtype)
        if why:
            return why
    runs = {dtype: step_in(dtype, channels, side) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in runs}
    for _ in range(1 + REPEATS):
        for dtype, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[dtype].append(time.perf_counter() - started)
    plain, low = (statistics.median(times[1:]) for times in seconds.values())
    return Probe(channels, plain, low)


def step_in(dtype: torch.dtype, channels: int, side: int) -> Callable[[], object]:
    """A guided pass in small: a frozen convolution and a matrix, for a batch of two."""
    pixels = torch.ones(2, channels, side, side, dtype=dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    convolution = Convolution((3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.full((channels, channels, 3, 3), 0.01, dtype=dtype)
    packed = packed_for(weight, convolution, pixels.shape)
    rows = torch.ones(2 * side * side, channels, dtype=dtype)
    matrix = torch.full((4 * channels, channels), 0.01, dtype=dtype)

    @torch.no_grad()
    def run() -> None:
        convolution(pixels, packed, None)
        product(rows, matrix, None)

    return run


def told() -> dict[str, str]:
    """For `esd-fast info`: what a big model would get here."""
    found = probe(1280, 8)  # of SD 1.x
    unpacked = why_not_dtype(torch.float32)
    return {
        "dtype of big models": f"{str(faster_of(found)).removeprefix('torch.')} ({found})",
        "packed weights": unpacked or "yes, for big models and runs of some length",
        "threads": str(torch.get_num_threads()),
    }
