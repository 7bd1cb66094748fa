"""Models in diffusers' layout: a folder, or a hub id through diffusers' own cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import Described, Family
from .families import family_of
from .folder_check import check_all_there, check_configs, check_folder, loading, parts_of

if TYPE_CHECKING:
    from esd_fast.config import Loading


@dataclass(frozen=True)
class Folder:
    """A folder or a hub id; of its files only configurations have been read."""

    source: str
    family: Family
    described: Described
    loading: Loading

    def load(self, dtype: torch.dtype) -> Any:
        """The family's pipeline, on the CPU. Safetensors where there are any; diffusers and
        transformers read .bin files as tensors alone (torch.load with weights_only)."""
        import diffusers

        with loading(self.source):
            pipeline = getattr(diffusers, self.family.pipeline_class).from_pretrained(
                self.source, dtype=dtype, variant=self.loading.variant, **self.family.load_options
            )
        check_all_there(pipeline, self.source)
        if self.loading.prediction_type != "auto":
            pipeline.scheduler = pipeline.scheduler.from_config(
                pipeline.scheduler.config, prediction_type=self.loading.prediction_type
            )
        return pipeline


def look_at_folder(source: str, how: Loading) -> Folder:
    """Raises FileNotFoundError or ValueError where it is no model of a known family."""
    for name, plain in (("ema", "auto"), ("model_config", None)):
        if getattr(how, name) != plain:
            raise ValueError(
                f"{name} is {getattr(how, name)!r}, which only a single file has a use for; "
                f"{source} is in diffusers' layout (EMA weights there are a variant)"
            )
    if Path(source).is_dir():
        check_folder(Path(source), how.variant)
    described = described_at(source)
    family = family_of(described)
    check_configs(
        {"unet": described.unet, "vae": described.vae, "scheduler": described.scheduler}, source
    )
    if how.prediction_type != "auto":
        described = described.changed("scheduler", prediction_type=how.prediction_type)
    return Folder(source, family, described, how)


def described_at(source: str) -> Described:
    """The configurations of a folder or a hub id."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    index = StableDiffusionPipeline.load_config(source)
    there = frozenset(parts_of(index, f"{source}'s model_index.json"))
    # any class of the kind reads any other's configuration
    kinds = {"unet": UNet2DConditionModel, "scheduler": DDIMScheduler, "vae": AutoencoderKL}
    with loading(source):
        configs = {
            name: dict(kind.load_config(source, subfolder=name)) if name in there else {}
            for name, kind in kinds.items()
        }
    return Described(str(index.get("_class_name", "")), there, **configs)
