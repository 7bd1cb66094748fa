"""Stable Diffusion 1.x: CLIP ViT-L/14 reads the text; projections are 1x1 convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from .sd import StableDiffusion


class StableDiffusion1(StableDiffusion):
    name = "sd1"
    title = "Stable Diffusion 1.x"
    sample_sizes: ClassVar[Mapping[str, int]] = {"epsilon": 64}
    linear_projection = False

    def claims_file(self, shapes: Mapping[str, torch.Size]) -> bool:
        return any(name.startswith("cond_stage_model.transformer.") for name in shapes)
