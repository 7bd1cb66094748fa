"""Which family a model is of, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esd_fast import processor
from esd_fast.demo import is_embedded, model_path

from .base import Conditioning, Family, Model, PromptSet
from .sd import StableDiffusion

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig

__all__ = ["Conditioning", "Family", "Model", "PromptSet", "load_model"]

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
FAMILIES: tuple[Family, ...] = (StableDiffusion(),)


def load_model(model: Any, config: EraseConfig) -> Model:
    """`model`: a live pipeline, a diffusers folder, a hub id, or None for the embedded one.

    Raises ValueError where the model is of no family known here, FileNotFoundError where a path
    leads nowhere; both before any weight is read.
    """
    if hasattr(model, "unet") and hasattr(model, "scheduler"):
        check_live(model, config)
        family = family_of(type(model).__name__, dict(model.unet.config))
        return Model(family, model, source_of(model), True)
    if model is None:
        source = str(model_path())
    elif isinstance(model, (str, Path)):
        source = str(model)
    else:
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a diffusers pipeline, a folder, "
            "a hub id, or None for the embedded model"
        )
    check_source(source)
    pipeline_class, unet_config = described(source)
    family = family_of(pipeline_class, unet_config)
    device = resolve_device(config.device)
    pipeline = family.load(source, resolve_dtype(config.dtype, device, unet_config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(device)  # the VAE stays behind: no picture is decoded in training
    return Model(family, pipeline, source_of(pipeline), False)


def source_of(pipeline: Any) -> str:
    """Where a pipeline came from, for the manifest."""
    if is_embedded(pipeline):
        return "embedded"
    return str(pipeline.config.get("_name_or_path") or "pipeline")


def family_of(pipeline_class: str, unet_config: dict[str, Any]) -> Family:
    channels = unet_config.get("in_channels"), unet_config.get("out_channels")
    if channels[0] != channels[1]:
        raise ValueError(
            f"this UNet takes {channels[0]} channels and gives {channels[1]} (inpainting, depth or "
            "instruction models do); ESD needs a plain text-to-image model"
        )
    if unet_config.get("time_cond_proj_dim"):
        raise ValueError(
            "this UNet embeds its guidance (a turbo or LCM distillation); erase from the model "
            "that it was distilled from"
        )
    for family in FAMILIES:
        if family.claims(pipeline_class, unet_config):
            return family
    known = ", ".join(f.name for f in FAMILIES)
    raise ValueError(f"{pipeline_class or 'this model'} is of no family known here ({known})")


def described(source: str) -> tuple[str, dict[str, Any]]:
    """Pipeline class and UNet configuration, without reading a weight."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    index = StableDiffusionPipeline.load_config(source)
    if "unet" not in index:
        return str(index.get("_class_name", "")), {"in_channels": 4, "out_channels": 4}
    config = UNet2DConditionModel.load_config(source, subfolder="unet")
    return str(index.get("_class_name", "")), dict(config)


def check_source(source: str) -> None:
    """Name what is wrong with a path before diffusers takes it for a hub id."""
    path = Path(source)
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{path} holds no model_index.json: no diffusers model folder")
        try:
            json.loads(index.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{index} cannot be read: {error}") from None
    elif path.is_file():
        pickled = path.suffix in PICKLED
        reason = " (it may also hold pickled code, which is never run here)" if pickled else ""
        raise ValueError(
            f"{path} is a single file{reason}; convert it to a diffusers folder first: "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
        )
    elif (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
        or path.suffix in (*PICKLED, ".safetensors")
    ):
        raise FileNotFoundError(f"model {source!r} does not exist")


def check_live(pipeline: Any, config: EraseConfig) -> None:
    """A caller's pipeline is never converted or moved behind his back."""
    have, want = str(pipeline.unet.dtype).removeprefix("torch."), config.dtype
    if want not in ("auto", have):
        raise ValueError(f"dtype is {want!r}, the pipeline is {have}; load it with torch_dtype")
    place = str(pipeline.unet.device)
    if config.device not in ("auto", place, place.split(":")[0]):
        raise ValueError(
            f"device is {config.device!r}, the pipeline is on {place}; move it with .to()"
        )


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {device!r}; it must be cpu, cuda, cuda:N or mps")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}; there are {torch.cuda.device_count()} CUDA devices here"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps'; there is none here")
    return resolved


def resolve_dtype(
    dtype: str, device: torch.device, unet_config: dict[str, Any] | None = None
) -> torch.dtype:
    """ "auto" on the CPU depends on the UNet; without its configuration it is a small one."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu" and unet_config is not None:
        return processor.dtype_for(unet_config)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32
