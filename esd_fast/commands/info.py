"""`esd-fast info`: what an erasure is, what a model is, what runs here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from esd_fast.config import Loading
from esd_fast.terminal import tell

from .console import quiet_libraries
from .loading import loading_of


def info(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    found = about(arguments.path, arguments.model, loading_of(arguments))
    tell(json.dumps(found, indent=1) if arguments.json else as_text(found))
    return 0


def about(path: str | None, model: str | None, loading: Loading) -> dict[str, Any]:
    if path is not None and model is not None:
        raise ValueError(f"both {path!r} and --model {model!r} are given; ask about one at a time")
    if path is None:
        return about_machine() if model is None else about_model(model, loading)
    if is_model(Path(path)):
        return about_model(path, loading)
    from esd_fast.erasure import load
    from esd_fast.stored_samples import holds_samples, read_samples

    if holds_samples(Path(path)):
        stored = read_samples(path)
        return {"samples": len(stored), "preserved": stored.preserved, **stored.told()}
    erasure = load(path)
    weights = sum(t.numel() for t in erasure.tensors.values())
    told = {k: v for k, v in erasure.manifest.items() if k != "losses"}
    return {**told, "tensors": len(erasure.tensors), "weights": weights}


def is_model(path: Path) -> bool:
    """Whether it is a model rather than an erasure or the folder of a run."""
    if path.suffix != ".safetensors" or not path.is_file():
        return (path / "model_index.json").exists() or path.suffix in (".ckpt", ".pt", ".pth")
    from esd_fast.models.checkpoint import open_safetensors

    return any(name.startswith("model.diffusion_model.") for name in open_safetensors(path).tensors)


def about_machine() -> dict[str, Any]:
    import torch

    from esd_fast import ops, processor
    from esd_fast.config import PRESETS
    from esd_fast.erasure import versions
    from esd_fast.models import resolve_device, resolve_dtype
    from esd_fast.parameters import METHODS

    device = resolve_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": f"{device} ({name})",
        "dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        **({"processor": processor.told()} if device.type == "cpu" else {}),
        "paths": ops.paths(device),
        "versions": versions(),
        "presets": {n: values or "the defaults" for n, values in PRESETS.items()},
        "methods": METHODS,
    }


def about_model(source: str, loading: Loading) -> dict[str, Any]:
    """Family, settings and the size of each train method; no weight is read."""
    import torch
    from diffusers import UNet2DConditionModel

    from esd_fast.models import look_at
    from esd_fast.models.folder_check import loading as loading_from
    from esd_fast.parameters import METHODS, trainable_names

    found = look_at(source, loading)
    family, described = found.family, found.described
    with loading_from(source), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(described.unet))
    sizes = {n: p.numel() for n, p in unet.named_parameters()}
    methods = {}
    for method in METHODS:
        try:
            names = trainable_names(unet, method, family.name)
        except ValueError:
            methods[method] = "nothing to train in this UNet"
            continue
        methods[method] = f"{sum(sizes[n] for n in names):,} weights in {len(names)} tensors"
    return {
        "model": source,
        "family": family.name,
        "title": family.title,
        "pipeline": described.pipeline_class,
        "prediction_type": described.prediction_type or "not said: the UNet is asked when loaded",
        "native_resolution": described.native_resolution,
        "unet_weights": f"{sum(sizes.values()):,}",
        "recipe": dict(family.recipe("fast", "esd-x")) or "the defaults",
        "methods": methods,
    }


def as_text(value: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", as_text(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {item}")
    return "\n".join(lines)
