"""Models in diffusers' layout: a folder, or a hub id through diffusers' own cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base import Described, Family
from .checkpoint import unpickled
from .families import family_of

if TYPE_CHECKING:
    from esd_fast.config import Loading

UNET_FILE = "diffusion_pytorch_model"


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

        pipeline = getattr(diffusers, self.family.pipeline_class).from_pretrained(
            self.source, dtype=dtype, variant=self.loading.variant, **self.family.load_options
        )
        if self.loading.prediction_type != "auto":
            pipeline.scheduler = pipeline.scheduler.from_config(
                pipeline.scheduler.config, prediction_type=self.loading.prediction_type
            )
        return pipeline


def look_at_folder(source: str, loading: Loading) -> Folder:
    """Raises FileNotFoundError or ValueError where it is no model of a known family."""
    for name, plain in (("ema", "auto"), ("model_config", None)):
        if getattr(loading, name) != plain:
            raise ValueError(
                f"{name} is {getattr(loading, name)!r}, which only a single file has a use for; "
                f"{source} is in diffusers' layout (EMA weights there are a variant)"
            )
    if Path(source).is_dir():
        check_folder(Path(source), loading.variant)
    described = described_at(source)
    family = family_of(described)
    if loading.prediction_type != "auto":
        described = described.changed("scheduler", prediction_type=loading.prediction_type)
    return Folder(source, family, described, loading)


def described_at(source: str) -> Described:
    """The configurations of a folder or a hub id."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    index = StableDiffusionPipeline.load_config(source)
    there = frozenset(
        name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0]
    )

    def config_of(name: str, kind: Any) -> dict[str, Any]:
        # any class of the kind reads any other's configuration
        return dict(kind.load_config(source, subfolder=name)) if name in there else {}

    return Described(
        pipeline_class=str(index.get("_class_name", "")),
        components=there,
        unet=config_of("unet", UNet2DConditionModel),
        scheduler=config_of("scheduler", DDIMScheduler),
        vae=config_of("vae", AutoencoderKL),
    )


def check_folder(path: Path, variant: str | None) -> None:
    """Name what is wrong with a local folder. Raises FileNotFoundError or ValueError."""
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json: no diffusers model folder")
    try:
        components = json.loads(index.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} cannot be read: {error}") from None
    variants = set(variants_of(path / "unet"))
    if variants and variant not in variants:
        there = ", ".join(sorted(v or "the plain weights (no variant)" for v in variants))
        raise ValueError(f"variant is {variant!r}; {path} has {there}")
    for name, value in components.items():
        if name.startswith("tokenizer") and isinstance(value, list) and value[0]:
            check_tokenizer_files(path / name)
        if not any((path / name).glob("*.safetensors")):
            for file in (path / name).glob("*.bin"):
                unpickled(
                    file, allow_pickle=False
                )  # maps it; diffusers would not say what is wrong


def variants_of(folder: Path) -> Iterator[str | None]:
    """Variants of a UNet's weights: None for diffusion_pytorch_model.safetensors, "fp16" for
    diffusion_pytorch_model.fp16.safetensors, in one file or in several."""
    for file in folder.glob(f"{UNET_FILE}*"):
        _, *named, suffix = file.name.split(".")
        if suffix in ("safetensors", "bin"):
            yield named[0].split("-")[0] if named else None  # fp16-00001-of-00002


def check_tokenizer_files(folder: Path) -> None:
    # transformers makes a tokenizer of a few special tokens of a folder without these, silently
    whole = (folder / "tokenizer.json").is_file()
    if not whole and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise FileNotFoundError(
            f"{folder} lacks its vocabulary: tokenizer.json, or vocab.json and merges.txt"
        )
