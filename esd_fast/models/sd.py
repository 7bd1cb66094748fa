"""Stable Diffusion 1.x and 2.x: one text encoder, epsilon or v-prediction."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from esd_fast.prompts import lost_by_truncation

from .base import Conditioning


class StableDiffusion:
    name = "sd"

    def claims(self, pipeline_class: str, unet_config: dict[str, Any]) -> bool:
        return pipeline_class == "StableDiffusionPipeline" and not unet_config.get(
            "addition_embed_type"
        )

    def load(self, source: str, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            # pictures in training are nobody's to see, and the checker costs a gigabyte
            safety_checker=None,
            requires_safety_checker=False,
            # safetensors only: a pickle would run code
            use_safetensors=True,
        )

    @torch.no_grad()
    def encode(self, pipeline: Any, prompt: str | list[str], resolution: int) -> Conditioning:  # noqa: ARG002
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for lost in filter(None, (lost_by_truncation(pipeline.tokenizer, p) for p in prompts)):
            warnings.warn(f"the prompt is too long for the model; lost: {lost!r}", stacklevel=2)
        encoder = pipeline.text_encoder
        home, device = encoder.device, pipeline.unet.device
        try:
            encoder.to(device)
            embeddings, _ = pipeline.encode_prompt(
                prompt, device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        finally:
            encoder.to(home)
        return Conditioning(embeddings.to(pipeline.unet.dtype))
