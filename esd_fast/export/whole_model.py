"""Whole checkpoints: the base with the changed tensors in it, as a single file or a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.files import replacing_folder
from esd_fast.tensor_files import Lazy, TensorFile, open_tensors, write_tensors

from .base import WEIGHTS, components_of, configs_of
from .merge import replaced
from .original_layout import whole_original

if TYPE_CHECKING:
    import torch

    from .base import Base
    from .merge import Merged

# what a file says of its own content, which is no longer so
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def write_single_file(base: Base, merged: Merged, target: Path, allow_pickle: bool = False) -> None:
    """One .safetensors file in the original layout, for A1111, Forge and ComfyUI.

    From a single file: its keys, shapes, dtypes and metadata, and every other tensor's bytes. From
    a diffusers folder or a pipeline: UNet, VAE and text encoders converted, in their own dtypes.
    """
    if base.file is not None:
        write_like(base.file, whole_file(base, merged), merged, target)
        return
    components = components_of(base, allow_pickle)
    names = {name: name for name in merged.tensors}
    components["unet"] = replaced(components["unet"], names, merged)
    whole = whole_original(components, configs_of(base))
    write_tensors(target, whole, {"format": "pt", **said(merged)})


def whole_file(base: Base, merged: Merged) -> dict[str, Lazy]:
    """A single file's tensors with the erased ones in it, running averages (EMA) too: a program
    that prefers those would find the concept again."""
    assert base.file is not None
    tensors = replaced(base.file.tensors, base.keys, merged)
    for name, key in base.ema_keys.items():
        if name in merged.tensors:
            tensors[key] = moved(base.file.tensors[key], name, merged)
    return tensors


def moved(average: Lazy, name: str, merged: Merged) -> Lazy:
    """The average plus the move: where it equals the weight itself, exactly the erased one."""

    def read() -> torch.Tensor:
        before, original = average.read(), merged.original[name]
        if before.equal(original):
            return merged.stored(name, average.dtype)
        return (before.float() + (merged.tensors[name] - original.float())).to(average.dtype)

    return Lazy(average.dtype, average.shape, read)


def write_like(file: TensorFile, tensors: Mapping[str, Lazy], merged: Merged, target: Path) -> None:
    """`file` again, `tensors` in place of its own; what is the same object is copied as bytes."""
    kept = {k: v for k, v in file.metadata.items() if k not in STALE}
    metadata = {"format": "pt", **kept, **said(merged)}

    def raw(name: str) -> memoryview | None:
        unchanged = tensors[name] is file.tensors[name]
        return file.raw(name) if file.raw and unchanged else None

    write_tensors(target, tensors, metadata, raw)


def said(merged: Merged) -> dict[str, str]:
    """What was erased, for whoever opens the file."""
    import json

    told = [
        {k: m.get(k) for k in ("concept", "erase_from", "method", "model")}
        for m in merged.manifests
    ]
    return {"esd_fast_erased": json.dumps(told)}


# ------------------------------------------------------------------------- diffusers folders


def write_folder(base: Base, merged: Merged, target: Path, allow_pickle: bool = False) -> list[str]:
    """A diffusers folder: the UNet's files with the changed tensors in them, everything else byte
    for byte. Gives the names of files that were left out: those that hold the UNet unerased, in
    forms that are not rewritten here.

    `base` is a folder or a pipeline.
    """
    left_out: list[str] = []
    with replacing_folder(target) as folder:
        if base.folder is None:
            save_pipeline(base.pipeline, merged, folder)
            return left_out
        for path, names, files in os.walk(base.folder):
            here = Path(path).relative_to(base.folder)
            names[:] = [n for n in names if not n.startswith(".")]
            (folder / here).mkdir(exist_ok=True)
            for name in files:
                source = Path(path) / name
                if here == Path("unet") and source.suffix in WEIGHTS:
                    write_unet_file(source, merged, folder / here, allow_pickle)
                elif here == Path("unet") and name.endswith(".bin.index.json"):
                    index = folder / here / name.replace(".bin.", ".safetensors.")
                    index.write_text(source.read_text().replace('.bin"', '.safetensors"'))
                elif unerased(here, source):
                    left_out.append(str(here / name))
                else:
                    shutil.copyfile(source, folder / here / name)
    return left_out


OTHER_WEIGHTS = (".msgpack", ".onnx", ".onnx_data", ".pb", ".h5", ".xml", ".gguf")


def unerased(here: Path, file: Path) -> bool:
    """A whole model beside the components, or the UNet in another framework's format."""
    if here == Path():
        return file.suffix in WEIGHTS
    return here.parts[0] in ("unet", "unet_ema") and file.suffix in (*OTHER_WEIGHTS, *WEIGHTS)


def write_unet_file(source: Path, merged: Merged, folder: Path, allow_pickle: bool) -> None:
    """One weight file, or a shard of one, of any variant; pickled ones become safetensors."""
    opened = open_tensors(source, allow_pickle)
    tensors = replaced(opened.tensors, {n: n for n in opened.tensors}, merged)
    target = folder / source.name
    if source.suffix != ".safetensors":
        target = folder / f"{source.name.removesuffix(source.suffix)}.safetensors"
        if target.exists() or (source.parent / target.name).exists():
            return  # the same weights, in the better format
    write_like(opened, tensors, merged, target)


def save_pipeline(pipeline: Any, merged: Merged, folder: Path) -> None:
    """diffusers' own writer, with the erased weights in place while it writes."""
    import torch

    from esd_fast.live import plain_module
    from esd_fast.parameters import plain_parameters

    parameters = plain_parameters(plain_module(pipeline.unet))
    before = {n: parameters[n].detach().clone() for n in merged.tensors}
    try:
        with torch.no_grad():
            for name in merged.tensors:
                parameters[name].copy_(merged.tensors[name])
        pipeline.save_pretrained(folder)
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
