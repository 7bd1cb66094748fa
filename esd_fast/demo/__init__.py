"""The embedded model: a small Stable Diffusion of emoji, trained by this project from nothing."""

from __future__ import annotations

from pathlib import Path


def model_path() -> Path:
    """The folder that StableDiffusionPipeline.from_pretrained loads; it holds the judges too."""
    return Path(__file__).parent / "model"
