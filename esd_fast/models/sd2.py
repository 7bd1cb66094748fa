"""Stable Diffusion 2.x: OpenCLIP ViT-H/14 reads the text; projections are matrices; the 768-pixel
models predict velocity, the 512-pixel ones (`-base`) noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from .sd import StableDiffusion


class StableDiffusion2(StableDiffusion):
    name = "sd2"
    title = "Stable Diffusion 2.x"
    sample_sizes: ClassVar[Mapping[str, int]] = {"epsilon": 64, "v_prediction": 96}
    linear_projection = True

    def claims_file(self, shapes: Mapping[str, torch.Size]) -> bool:
        return any(name.startswith("cond_stage_model.model.transformer.") for name in shapes)
