"""Pictures from sprites: turned, scaled, shifted, flipped, drawn in the hand's technique."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .world import BACKGROUNDS, OBJECT_NAMES, STYLE_NAMES, Scene

PIXELS = 64
MOSAIC = 16  # cells a side of the pixel style
SEPIA_DARK, SEPIA_LIGHT = (70, 38, 14), (244, 220, 176)


class Painter:
    """Draws scenes as (B, 3, PIXELS, PIXELS) in -1..1; the same generator draws the same."""

    def __init__(self, sprites: np.ndarray) -> None:
        straight = torch.from_numpy(sprites).float().permute(0, 1, 4, 2, 3) / 255
        # premultiplied alpha, so that resampling does not bleed the colour of empty pixels
        self.sprites = torch.cat([straight[:, :, :3] * straight[:, :, 3:], straight[:, :, 3:]], 2)

    def paint(
        self,
        objects: Sequence[int],
        styles: Sequence[int],
        backgrounds: Sequence[str],
        generator: torch.Generator,
        hands: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`hands`: whose drawings the styles' techniques are used on, if not the styles' own."""
        drawings = styles if hands is None else hands
        sprites = self.sprites[list(objects), list(drawings)]  # (B, 4, P, P)
        theta = random_affine(len(sprites), generator)
        grid = F.affine_grid(theta, [len(sprites), 4, PIXELS, PIXELS], align_corners=False)
        drawn = F.grid_sample(sprites, grid, align_corners=False)
        style = torch.as_tensor(styles)
        pixel = style == STYLE_NAMES.index("pixel")
        drawn[pixel] = mosaic(drawn[pixel])
        sepia = style == STYLE_NAMES.index("sepia")
        drawn[sepia] = toned(drawn[sepia])
        ground = torch.tensor([BACKGROUNDS[b] for b in backgrounds]).float() / 255
        picture = drawn[:, :3] + ground[:, :, None, None] * (1 - drawn[:, 3:])
        return (picture * 2 - 1).clamp_(-1, 1)

    def paint_scenes(self, scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
        objects = [OBJECT_NAMES.index(s.object) for s in scenes]
        styles = [STYLE_NAMES.index(s.style) for s in scenes]
        return self.paint(objects, styles, [s.background for s in scenes], generator)


def random_affine(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 2, 3): turns to 8 degrees, sizes 0.8 to 1, shifts to 3 pixels, half flipped."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, size = uniform(-8, 8) * math.pi / 180, uniform(0.8, 1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = 3 * 2 / PIXELS
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = torch.stack([cos * flip, -sin, uniform(-shift, shift)], -1)
    columns = torch.stack([sin * flip, cos, uniform(-shift, shift)], -1)
    return torch.stack([rows, columns], 1)


def mosaic(drawn: torch.Tensor) -> torch.Tensor:
    """The pixel hand: MOSAIC x MOSAIC hard cells."""
    cells = F.avg_pool2d(drawn, PIXELS // MOSAIC)
    alpha = cells[:, 3:].clamp_min(1e-6)
    hard = (alpha > 0.4).float()
    return (
        torch.cat([cells[:, :3] / alpha * hard, hard], 1)
        .repeat_interleave(PIXELS // MOSAIC, 2)
        .repeat_interleave(PIXELS // MOSAIC, 3)
    )


def toned(drawn: torch.Tensor) -> torch.Tensor:
    """The sepia hand: brown tones by luminance."""
    alpha = drawn[:, 3:]
    grey = (drawn[:, :3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, True)
    dark, light = (torch.tensor(c).float()[:, None, None] / 255 for c in (SEPIA_DARK, SEPIA_LIGHT))
    return torch.cat([dark * (alpha - grey) + light * grey, alpha], 1)


def to_images(pictures: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1 to (B, H, W, 3) uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
