"""The model that an erasure is put onto: a diffusers folder, a single file, or a live pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.tensor_files import PICKLED, Lazy, TensorFile, open_tensors

from .original_layout import UNET

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WEIGHTS = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Base:
    """`unet`: its tensors by diffusers' names. Exactly one of `folder`, `file` and `pipeline`."""

    source: str
    unet: Mapping[str, Lazy]
    folder: Path | None = None
    file: TensorFile | None = None
    pipeline: Any = None
    keys: Mapping[str, str] = field(default_factory=dict)
    """With `file`: a UNet tensor's name in it."""
    ema_keys: Mapping[str, str] = field(default_factory=dict)
    """With `file`: the name of its running average, where the file holds one."""


def open_base(source: Any, erasure: Erasure | None = None, allow_pickle: bool = False) -> Base:
    """`source`: a path, a hub id, "embedded" (or None), or a pipeline, on which `erasure` may be
    in place: what it held before is taken then. Weights are read later, one by one.

    Raises FileNotFoundError or ValueError where it is no model.
    """
    if hasattr(source, "unet"):
        return of_pipeline(source, erasure)
    if source is None or source == "embedded":
        from esd_fast.demo import model_path

        return of_folder(model_path(), "embedded")
    path = Path(source)
    if path.is_file():
        return of_file(open_tensors(path, allow_pickle))
    from esd_fast.models import check_source

    check_source(str(source))
    return of_folder(path if path.is_dir() else hub_folder(str(source)), str(source), allow_pickle)


def hub_folder(name: str) -> Path:
    """Through diffusers' own cache; its offline switches are honoured."""
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name, use_safetensors=True))


def of_folder(folder: Path, source: str, allow_pickle: bool = False) -> Base:
    return Base(source, component_of(folder, "unet", allow_pickle), folder=folder)


def of_file(file: TensorFile) -> Base:
    keys = unet_keys(file.tensors)
    if not keys:
        raise ValueError(
            f"{file.path} is no Stable Diffusion checkpoint in the original layout: it holds no "
            f"tensors named {UNET}..."
        )
    averages = {n: ema_key(key) for n, key in keys.items()}
    return Base(
        str(file.path),
        {n: file.tensors[key] for n, key in keys.items()},
        file=file,
        keys=keys,
        ema_keys={n: key for n, key in averages.items() if key in file.tensors},
    )


def of_pipeline(pipeline: Any, erasure: Erasure | None) -> Base:
    from esd_fast.live import check_held, plain_module
    from esd_fast.models import source_of
    from esd_fast.parameters import plain_parameters

    parameters = plain_parameters(plain_module(pipeline.unet))
    check_held(parameters)
    unet = {n: Lazy.of(p.detach()) for n, p in parameters.items()}
    original = erasure.original_of(plain_module(pipeline.unet)) if erasure else None
    unet |= {n: Lazy.of(t) for n, t in (original or {}).items()}
    return Base(source_of(pipeline), unet, pipeline=pipeline)


def unet_keys(tensors: Mapping[str, Lazy]) -> dict[str, str]:
    """diffusers' name -> name in the file, by diffusers' own converter: it moves values about and
    looks into none, so names may stand for them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    keys = {n: n for n in tensors if n.startswith(UNET)}
    if not keys:
        return {}
    sizes = [
        int(n.split(".")[3]) for n in keys if n.startswith(UNET + "input_blocks.") and ".op." in n
    ]
    config: dict[str, Any] = {"layers_per_block": min(sizes, default=3) - 1}
    if UNET + "label_emb.0.0.weight" in keys:
        config["addition_embed_type"] = "text_time"
    found = convert_ldm_unet_checkpoint(keys, config)
    return {name: key for name, key in found.items() if key is not None}


def ema_key(key: str) -> str:
    """As CompVis' LitEma names the running average of a parameter: no dots, no "model."."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# ------------------------------------------------------------------------- diffusers folders


def component_of(folder: Path, name: str, allow_pickle: bool = False) -> dict[str, Lazy]:
    """A component's tensors, in its preferred files: plain before variants, safetensors before
    pickled. Raises FileNotFoundError where there are none."""
    return {
        key: tensor
        for file in weight_files(folder / name)
        for key, tensor in open_tensors(file, allow_pickle).tensors.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights, all its shards."""
    found = [f for f in sorted(folder.glob("*")) if f.suffix in WEIGHTS]
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in found:
        stem = file.name.removesuffix(file.suffix)
        head, shard, tail = stem.partition("-00")
        name = head + ("." + tail.partition(".")[2] if shard and "." in tail else "")
        groups.setdefault((name, file.suffix), []).append(file)
    # "model" comes before "model.fp16"; safetensors before what is pickled
    for key in sorted(groups, key=lambda k: (k[1] != ".safetensors", k[0].count("."), k[0])):
        return groups[key]
    raise FileNotFoundError(f"{folder} holds no weights ({', '.join(WEIGHTS)})")


def config_of(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    return json.loads(file.read_text())


def components_of(base: Base, allow_pickle: bool = False) -> dict[str, Mapping[str, Lazy]]:
    """Every component's tensors by diffusers' names; of a folder or a pipeline."""
    if base.folder is not None:
        index = json.loads((base.folder / "model_index.json").read_text())
        rest = [c for c in COMPONENTS[1:] if (index.get(c) or [None])[0] is not None]
        return {"unet": base.unet} | {c: component_of(base.folder, c, allow_pickle) for c in rest}
    there = [(c, getattr(base.pipeline, c, None)) for c in COMPONENTS[1:]]
    return {"unet": base.unet} | {
        c: {n: Lazy.of(t) for n, t in module.state_dict().items()}
        for c, module in there
        if module is not None
    }


def configs_of(base: Base) -> dict[str, Mapping[str, Any]]:
    if base.folder is not None:
        return {c: config_of(base.folder, c) for c in ("text_encoder", "scheduler")}
    pipeline = base.pipeline
    return {
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "scheduler": dict(pipeline.scheduler.config),
    }
