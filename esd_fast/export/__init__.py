"""Where results go: other programs' formats, and what differs between two checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import check_count, check_number, refuse
from esd_fast.files import check_target

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure

    from .base import Base
    from .lora import LoraReport
    from .merge import Merged

FORMATS = {
    "delta": "the trained tensors, as the reference's scripts write them",
    "diffusers": "a whole diffusers folder",
    "single-file": "one .safetensors in the original layout: A1111, Forge, ComfyUI",
    "lora": "a LoRA under diffusers' (peft's) names",
    "kohya": "a LoRA under kohya's names, for A1111, Forge, ComfyUI",
}


@dataclass(frozen=True)
class Exported:
    path: Path
    format: str
    notes: list[str] = field(default_factory=list)
    """What the person should know."""
    lora: LoraReport | None = None


def export(
    erasures: Erasure | Sequence[Erasure],
    target: str | os.PathLike[str],
    format: str,
    *,
    model: Any = None,
    strength: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float16",
    overwrite: bool = False,
    allow_pickle: bool = False,
    allow_other_base: bool = False,
    model_config: str | None = None,
) -> Exported:
    """Write one erasure, or several merged, onto `model` in a format of FORMATS.

    `model`: a diffusers folder, a single file, a hub id, a live pipeline (the erasure may be in
    place there), or None for what the erasure was trained on, where that is a path or the embedded
    model. `model_config`: for a folder of a single file, the configurations of its components where
    they are not its family's own. `rank`, `energy` and `dtype` are a LoRA's: see lora.write_lora.
    Raises ValueError or FileExistsError, with nothing written, for a bad argument, an erasure that
    does not fit, or a target that exists without `overwrite`.
    """
    from .base import open_base
    from .merge import merge, trained_side

    several = list(erasures) if isinstance(erasures, Sequence) else [erasures]
    path = checked_target(target, format, overwrite)
    check_lora(format, rank, energy, dtype)
    check_number("strength", strength)
    base = open_base(model_of(several, model), several[0] if several else None, allow_pickle)
    if format in ("single-file", "diffusers"):
        check_no_adapters(base.pipeline)
    base = trained_side(base, several)
    if base.folder is not None and base.folder.resolve() in path.resolve().parents:
        raise ValueError(f"{path} lies in the model's own folder; name another place")
    if model_config is not None and (format != "diffusers" or base.file is None):
        raise ValueError(
            f"model_config is {model_config!r}; only a folder that is made of a single file has a "
            "use for it"
        )
    merged = merge(several, base, strength, allow_other_base)
    notes = list(merged.notes)
    report = None
    if format == "delta":
        merged_erasure(merged).save(path)
    elif format == "diffusers":
        notes += to_folder(base, merged, path, allow_pickle, model_config)
    elif format == "single-file":
        from .whole_model import write_single_file

        write_single_file(base, merged, path, allow_pickle)
    else:
        from .lora import write_lora

        names = "kohya" if format == "kohya" else "diffusers"
        report = write_lora(base, merged, path, names=names, rank=rank, energy=energy, dtype=dtype)
    return Exported(path, format, notes, report)


def checked_target(target: str | os.PathLike[str], format: str, overwrite: bool) -> Path:
    if format not in [*FORMATS]:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    path = Path(target)
    if format != "diffusers" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must be the name of a .safetensors file")
    check_target(path, overwrite, folder=format == "diffusers")
    return path


def check_lora(format: str, rank: int | None, energy: float | None, dtype: str) -> None:
    if format not in ("lora", "kohya") and (rank is not None or energy is not None):
        raise ValueError(f"rank and energy are a LoRA's; format is {format!r}")
    if rank is not None and energy is not None:
        raise ValueError("rank and energy are both given; give one")
    if rank is not None:
        check_count("rank", rank)
    if energy is not None:
        check_number("energy", energy, above=0.0)
        if energy > 1:
            refuse("energy", energy, "above 0 and at most 1, such as 0.99")
    if dtype not in ("float32", "float16", "bfloat16"):
        refuse("dtype", dtype, "'float32', 'float16' or 'bfloat16'")


def model_of(erasures: Sequence[Erasure], model: Any) -> Any:
    """What the first erasure was trained on, where it can be had without asking a network."""
    if model is not None:
        return model
    told = erasures[0].manifest.get("model") if erasures else None
    if told == "embedded" or (isinstance(told, str) and Path(told).exists()):
        return told
    raise ValueError(f"model is not given, and the erasure's own ({told}) is no path here; name it")


def check_no_adapters(pipeline: Any) -> None:
    """A whole model with a LoRA beside its weights would be neither with it nor without."""
    parts = getattr(pipeline, "components", {}).values()
    if any(hasattr(m, "base_layer") for p in parts if hasattr(p, "modules") for m in p.modules()):
        raise ValueError(
            "the pipeline has LoRA adapters; call pipe.fuse_lora() to keep them, and then "
            "pipe.unload_lora_weights(), before it is written whole"
        )


def merged_erasure(merged: Merged) -> Erasure:
    """One erasure that does what all of them do."""
    from esd_fast.erasure import Erasure, fingerprint

    first, *rest = merged.manifests
    if not rest:
        return Erasure(merged.tensors, first)
    concepts = chain.from_iterable(Erasure({}, m).concepts for m in merged.manifests)
    manifest = {
        "concept": ", ".join(str(m.get("concept", "unknown")) for m in merged.manifests),
        "concepts": list(dict.fromkeys(concepts)),
        "erase_from": None,
        "method": "merged",
        "model": first.get("model", "unknown"),
        "base_fingerprint": fingerprint(merged.original),
        "merged": [{k: v for k, v in m.items() if k != "losses"} for m in merged.manifests],
    }
    return Erasure(merged.tensors, manifest)


def to_folder(
    base: Base, merged: Merged, path: Path, allow_pickle: bool, model_config: str | None
) -> list[str]:
    from dataclasses import replace

    from .whole_model import write_folder

    if base.file is not None:
        base = replace(base, file=None, pipeline=pipeline_of(base, allow_pickle, model_config))
    left_out = write_folder(base, merged, path, allow_pickle)
    if not left_out:
        return []
    return [f"not copied, since they hold the model unerased: {', '.join(left_out)}"]


def pipeline_of(base: Base, allow_pickle: bool, model_config: str | None) -> Any:
    """A single file as a pipeline, in the file's own dtype."""
    from collections import Counter

    from esd_fast.config import EraseConfig
    from esd_fast.models import load_model

    (dtype, _), *_ = Counter(t.dtype for t in base.unet.values()).most_common()
    averages = any(key.startswith("model_ema.") for key in base.keys.values())
    config = EraseConfig(
        concept="none",
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        allow_pickle=allow_pickle,
        ema="yes" if averages else "auto",
        model_config=model_config,
    )
    return load_model(base.source, config).pipeline
