"""Pictures from prompts and seeds, in batches, the same whatever the batch or the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    prompt: str
    seed: int


def start_noise(pipeline: Any, seeds: Sequence[int], resolution: int | None) -> torch.Tensor:
    """(B, C, h, w) standard normal, each from its own seed on the CPU."""
    unet = pipeline.unet
    side = resolution // pipeline.vae_scale_factor if resolution else unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def pictures(
    pipeline: Any,
    shots: Sequence[Shot],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    resolution: int | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 for every shot, in order; `on_progress(done, total)` after a batch."""
    for first in range(0, len(shots), batch_size):
        batch = shots[first : first + batch_size]
        noise = start_noise(pipeline, [s.seed for s in batch], resolution)
        result = pipeline(
            prompt=[s.prompt for s in batch],
            latents=noise.to(pipeline.unet.device, pipeline.unet.dtype),
            height=noise.shape[-2] * pipeline.vae_scale_factor,
            width=noise.shape[-1] * pipeline.vae_scale_factor,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        ).images  # (B, H, W, 3) in 0..1
        yield from (result * 255).round().astype(np.uint8)
        if on_progress:
            on_progress(first + len(batch), len(shots))


def to_pil(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture)
