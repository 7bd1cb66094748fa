"""What Stable Diffusion 1.x and 2.x share: one text encoder, nothing but the text to ask with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from .base import Conditioning, Described
from .text import say_what_is_lost, visiting


class StableDiffusion:
    """Whether a model is of 1.x or 2.x, sd1.py and sd2.py say."""

    pipeline_class = "StableDiffusionPipeline"
    # pictures in training are nobody's to see, and the checker costs a gigabyte
    load_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    linear_projection: bool

    def claims(self, described: Described) -> bool:
        return (
            described.pipeline_class
            in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
            and not described.unet.get("addition_embed_type")
            and bool(described.unet.get("use_linear_projection")) == self.linear_projection
        )

    def recipe(self, preset: str, train_method: str) -> Mapping[str, Any]:  # noqa: ARG002
        return {}  # the presets are this family's

    @torch.no_grad()
    def encode(self, pipeline: Any, prompt: str | list[str], resolution: int) -> Conditioning:
        return self.encode_with_gradient(pipeline, prompt, resolution)

    def encode_with_gradient(
        self,
        pipeline: Any,
        prompt: str | list[str],
        resolution: int,  # noqa: ARG002
    ) -> Conditioning:
        say_what_is_lost([pipeline.tokenizer], prompt)
        weight = next(pipeline.unet.parameters())  # unet.device and dtype look at every module
        with visiting(weight.device, pipeline.text_encoder):
            embeddings, _ = pipeline.encode_prompt(
                prompt, weight.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return Conditioning(embeddings.to(weight.dtype))
