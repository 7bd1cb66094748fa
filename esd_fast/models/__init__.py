"""Which family a model is of, and how it is loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esd_fast.config import refuse
from esd_fast.demo import is_embedded, model_path
from esd_fast.live import check_workable

from .base import Conditioning, Described, Family, Model, PromptSet
from .checkpoint import SUFFIXES
from .families import FAMILIES, family_of
from .prediction import settle
from .tokenizer import check_vocabulary

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig, Loading

    from .folder import Folder
    from .single_file import SingleFile

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Described",
    "Family",
    "Model",
    "PromptSet",
    "load_model",
    "look_at",
]


# While diffusers and transformers load they set torch's default dtype and replace methods of
# nn.Module, for all threads, and put back what they found: two at once would leave it changed.
_ONE_LOADS = threading.Lock()


def load_model(model: Any, config: EraseConfig) -> Model:
    """`model`: a live pipeline, a diffusers folder, a hub id, a single file in the original
    layout, or None for the embedded one.

    Raises ValueError where the model is of no family known here or its file is damaged,
    FileNotFoundError where a path leads nowhere; all before a weight is read.
    """
    if hasattr(model, "unet") and hasattr(model, "scheduler"):
        check_live(model, config)
        check_vocabulary(model)
        return Model(family_of(described_live(model)), model, source_of(model), True)
    if model is not None and not isinstance(model, (str, Path)):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a diffusers pipeline, a folder, "
            "a checkpoint file, a hub id, or None for the embedded model"
        )
    with _ONE_LOADS:
        found = look_at(str(model_path() if model is None else model), config.loading)
        device = resolve_device(config.device)
        pipeline = found.load(resolve_dtype(config.dtype, device, found.described.unet))
    check_vocabulary(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(device)  # the VAE stays behind: no picture is decoded in training
    if found.described.prediction_type is None:
        settle(found.family, pipeline)
    source = "embedded" if is_embedded(found.source) else found.source
    return Model(found.family, pipeline, source, False)


def look_at(source: str, loading: Loading) -> Folder | SingleFile:
    """What the model at `source` is, without reading a weight; raises as `load_model` does."""
    check_source(source)
    if Path(source).is_file():
        from .single_file import look_at_file

        return look_at_file(Path(source), loading)
    from .folder import look_at_folder

    return look_at_folder(source, loading)


def described_live(pipeline: Any) -> Described:
    there = {name: part for name, part in pipeline.components.items() if part is not None}
    configs = {
        name: dict(there[name].config) if name in there else {}
        for name in ("unet", "scheduler", "vae")
    }
    return Described(type(pipeline).__name__, frozenset(there), **configs)


def source_of(pipeline: Any) -> str:
    """Where a live pipeline came from, for the manifest."""
    if is_embedded(pipeline):
        return "embedded"
    return str(pipeline.config.get("_name_or_path") or "pipeline")


def check_source(source: str) -> None:
    """A path that leads nowhere is no hub id. Raises FileNotFoundError; ValueError for no path."""
    if not source.strip() or "\0" in source:
        refuse("model", source, "a folder, a checkpoint file or a hub id")
    path = Path(source)
    if path.exists():
        return
    if (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
        or path.suffix in SUFFIXES
    ):
        raise FileNotFoundError(f"model {source!r} does not exist")


def check_live(pipeline: Any, config: EraseConfig) -> None:
    """A caller's pipeline is never converted or moved behind his back."""
    check_workable(pipeline)
    have, want = str(pipeline.unet.dtype).removeprefix("torch."), config.dtype
    if want not in ("auto", have):
        raise ValueError(f"dtype is {want!r}, the pipeline is {have}; load it with torch_dtype")
    place = str(pipeline.unet.device)
    if config.device not in ("auto", place, place.split(":")[0]):
        raise ValueError(
            f"device is {config.device!r}, the pipeline is on {place}; move it with .to()"
        )
    predicts = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if config.prediction_type not in ("auto", predicts):
        raise ValueError(
            f"prediction_type is {config.prediction_type!r}, the pipeline's scheduler has "
            f"{predicts!r}; give it another scheduler"
        )
    unused = {"variant": None, "ema": "auto", "allow_pickle": False, "model_config": None}
    for name, plain in unused.items():
        if getattr(config, name) != plain:
            raise ValueError(f"{name} is {getattr(config, name)!r}; the pipeline is loaded already")


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
    dtype: str, device: torch.device, unet_config: Mapping[str, Any] | None = None
) -> torch.dtype:
    """ "auto" on the CPU depends on the UNet; without its configuration it is a small one."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu" and unet_config is not None:
        from esd_fast.processor import dtype_for

        return dtype_for(unet_config)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32
