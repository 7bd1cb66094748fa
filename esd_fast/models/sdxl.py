"""Stable Diffusion XL base: two text encoders side by side, a pooled embedding, and the picture's
size as six numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from esd_fast.parameters import canonical_method

from .base import Conditioning, Described
from .text import say_what_is_lost, visiting


class StableDiffusionXL:
    name = "sdxl"
    title = "Stable Diffusion XL base"
    pipeline_class = "StableDiffusionXLPipeline"
    load_options: ClassVar[Mapping[str, Any]] = {}
    sample_sizes: ClassVar[Mapping[str, int]] = {"epsilon": 128}

    def claims(self, described: Described) -> bool:
        return (
            described.pipeline_class
            in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
            and described.unet.get("addition_embed_type") == "text_time"
            and {"text_encoder", "text_encoder_2"} <= described.components
        )

    def claims_file(self, shapes: Mapping[str, torch.Size]) -> bool:
        firsts = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        return all(any(name.startswith(first) for name in shapes) for first in firsts)

    def recipe(self, preset: str, train_method: str) -> Mapping[str, Any]:
        """The numbers of the public SDXL script, which has one recipe, for frozen rollouts."""
        if preset not in ("fast", "reference"):
            return {}
        cross_attention = "esd-x" in canonical_method(train_method)
        return {
            "learning_rate": 2e-4 if cross_attention else 1e-5,
            "negative_guidance": 1.0,
            "guidance_scale": 2.0,
        }

    @torch.no_grad()
    def encode(self, pipeline: Any, prompt: str | list[str], resolution: int) -> Conditioning:
        return self.encode_with_gradient(pipeline, prompt, resolution)

    def encode_with_gradient(
        self, pipeline: Any, prompt: str | list[str], resolution: int
    ) -> Conditioning:
        """The empty prompt is encoded like any other: what the pipeline does with
        `negative_prompt=""`, and the public script's 2026 form everywhere. (Without a negative
        prompt the pipeline takes zeros where `force_zeros_for_empty_prompt` is set.)"""
        say_what_is_lost([pipeline.tokenizer, pipeline.tokenizer_2], prompt)
        weight = next(pipeline.unet.parameters())  # unet.device and dtype look at every module
        device, dtype = weight.device, weight.dtype
        with visiting(device, pipeline.text_encoder, pipeline.text_encoder_2):
            states, _, pooled, _ = pipeline.encode_prompt(
                prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        # original size, crop, target size: a whole picture of this resolution
        times = [resolution, resolution, 0, 0, resolution, resolution]
        time_ids = torch.tensor([times], dtype=states.dtype, device=device)  # (1, 6)
        return Conditioning(
            states.to(dtype),  # (B, 77, D1 + D2)
            {
                "text_embeds": pooled.to(device, dtype),  # (B, P)
                "time_ids": time_ids.expand(len(states), -1),
            },
        )
