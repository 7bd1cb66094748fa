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
    sample: int = 0
    """Which of the noises that `seed` draws one after the other: what the public generation
    scripts, which seed once for the samples of a prompt, start the picture `sample` from."""


def start_noise(
    pipeline: Any, shots: Sequence[Shot], resolution: int | None
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """(B, C, h, w) standard normal, each row from its shot's own generator on the CPU; and the
    generators, which schedulers that draw noise at every step go on with."""
    unet = pipeline.unet
    side = resolution // pipeline.vae_scale_factor if resolution else unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    # device and dtype are said: a caller may have set others as torch's defaults
    generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
    rows = [
        torch.randn(shot.sample + 1, *shape, generator=g, dtype=torch.float32, device="cpu")[-1]
        for shot, g in zip(shots, generators, strict=True)
    ]
    return torch.stack(rows), generators


def pictures(
    pipeline: Any,
    shots: Sequence[Shot],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    resolution: int | None = None,
    batch_size: int = 64,
    negative_prompt: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 for every shot, in order; `on_progress(done, total)` after a batch.

    Raises RuntimeError where the model's answer is not finite.
    """
    for first in range(0, len(shots), batch_size):
        batch = shots[first : first + batch_size]
        noise, generators = start_noise(pipeline, batch, resolution)
        result = pipeline(
            prompt=[s.prompt for s in batch],
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
            latents=noise.to(pipeline.unet.device, pipeline.unet.dtype),
            generator=generators,
            height=noise.shape[-2] * pipeline.vae_scale_factor,
            width=noise.shape[-1] * pipeline.vae_scale_factor,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        ).images  # (B, H, W, 3) in 0..1
        check_finite(result, batch, pipeline.unet.dtype)
        yield from (result * 255).round().astype(np.uint8)
        if on_progress:
            on_progress(first + len(batch), len(shots))


def check_finite(drawn: np.ndarray, shots: Sequence[Shot], dtype: torch.dtype) -> None:
    """A black picture that nobody can explain is what these become otherwise."""
    for picture, shot in zip(drawn, shots, strict=True):
        if not np.isfinite(picture).all():
            raise RuntimeError(
                f"the picture of {shot.prompt!r} (seed {shot.seed}) is not finite in "
                f"{str(dtype).removeprefix('torch.')}; try --dtype float32, and esd-fast verify "
                "on the erasure"
            )


def to_pil(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture)
