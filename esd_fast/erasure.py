"""The result of an erasure: trained tensors and how they came about."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import check_number
from .exact_copies import ExactCopies
from .files import parsed_json, replacing
from .live import check_held, check_idle, plain_module
from .moves import moves_of
from .parameters import plain_parameters
from .prompts import file_part, safe_name

if TYPE_CHECKING:
    import torch

    from .export import Exported

MANIFEST_KEY = "esd_fast_manifest"


class Erasure:
    """Trained tensors by UNet state-dict name (float32, on the CPU) and a manifest.

    `apply` and `revert` work on a pipeline or a UNet. Each model that this erasure was applied
    to is remembered (weakly) with its own tensors, so that `revert` restores every bit.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        self.tensors = tensors
        self.manifest = manifest
        self._originals: weakref.WeakKeyDictionary[Any, Mapping[str, torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        count = sum(t.numel() for t in self.tensors.values())
        method = self.manifest.get("method", "unknown method")
        concept = self.manifest.get("concept", "unknown concept")
        return f"Erasure({concept!r}, {method}, {len(self.tensors)} tensors, {count:,} weights)"

    @property
    def concepts(self) -> tuple[str, ...]:
        """What it erases, one by one; empty where its file does not say."""
        said = self.manifest.get("concepts", self.manifest.get("concept"))
        texts = said if isinstance(said, list) else [said]
        return tuple(str(text) for text in texts if text)

    @property
    def file_name(self) -> str:
        """The reference's name of such a file, safe on every file system."""
        source, method = self.manifest.get("erase_from"), self.manifest.get("method", "esd")
        return file_name_of(self.concepts, source, method)

    def remember_original(self, unet: Any, original: Mapping[str, torch.Tensor]) -> None:
        self._originals[unet] = original

    def original_of(self, unet: Any) -> Mapping[str, torch.Tensor] | None:
        """What `unet` held before this erasure; None where it is not in place there."""
        return self._originals.get(unet)

    def apply(self, model: Any, strength: float = 1.0) -> None:
        """Write the erased weights into `model`; applying again changes nothing.

        `strength` scales the move from the original weights (0: original, 1: erased). Raises
        ValueError, with nothing written, where names or shapes do not match the model.
        """
        import torch

        check_number("strength", strength)
        unet = unet_of(model)
        check_idle(unet)
        parameters = plain_parameters(unet)
        check_held(parameters)
        check_match(self.tensors, parameters)
        check_values(self.tensors)
        if unet not in self._originals:
            self._originals[unet] = ExactCopies({n: parameters[n] for n in self.tensors})
        original = self._originals[unet]
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                value = tensor.to(parameters[name].device)
                if strength != 1.0:
                    value = torch.lerp(original[name].float(), value.float(), strength)
                parameters[name].copy_(value)

    def revert(self, model: Any) -> None:
        """Put back what `model` held before. With several erasures revert the last one first.

        Raises ValueError where this erasure was not applied to `model`.
        """
        import torch

        unet = unet_of(model)
        check_idle(unet)
        original = self._originals.get(unet)
        if original is None:
            raise ValueError(f"{self!r} was not applied to this model: nothing to revert")
        parameters = plain_parameters(unet)
        check_held(parameters)
        with torch.no_grad():
            for name, tensor in original.items():
                parameters[name].copy_(tensor)
        del self._originals[unet]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: to `path`, or under the usual name in the folder `path`.

        `unet.load_state_dict(load_file(path), strict=False)` loads it. Written beside its place,
        then renamed: never half a file.
        """
        from safetensors.torch import save_file

        target = Path(path)
        if target.suffix != ".safetensors":
            target = target / self.file_name
        tensors = {n: t.contiguous() for n, t in self.tensors.items()}
        with replacing(target) as temporary:
            save_file(tensors, temporary, metadata=self.metadata())
        return target

    def export(self, target: str | os.PathLike[str], format: str, **settings: Any) -> Exported:
        """Write it for other programs: "delta", "diffusers", "single-file", "lora" or "kohya".
        What `settings` there are, and what is raised: `esd_fast.export.export`."""
        from .export import export

        return export(self, target, format, **settings)

    def moves(self, model: Any) -> list[dict[str, Any]]:
        """How far each tensor moved on `model`, relative to what it was; the farthest first. What
        the rows hold: `esd_fast.moves.move_of`."""
        return moves_of(self.tensors, self._originals.get(unet_of(model), {}))

    def metadata(self) -> dict[str, str]:
        """The reference's keys, and the whole manifest as JSON."""
        manifest = self.manifest
        return {
            "format": "erasing-esd-v2",
            "component": "unet",
            "base_model_id": str(manifest.get("model", "")),
            "train_method": str(manifest.get("method", "")),
            "erase_concept": str(manifest.get("concept", "")),
            "erase_from": str(manifest.get("erase_from") or manifest.get("concept", "")),
            MANIFEST_KEY: json.dumps(manifest),
        }


def file_name_of(concepts: Sequence[str], source: object, method: object) -> str:
    """`source`: what they are erased from; without one, themselves."""
    concept = file_part(concepts) or "concept"
    origin = safe_name(str(source or concept))
    return f"esd-{safe_name(concept)}-from-{origin}-{safe_name(str(method))}.safetensors"


def erased_from(sources: Sequence[str | None]) -> str | None:
    """As manifests and file names have it; None: from everything."""
    return ", ".join(dict.fromkeys(filter(None, sources))) or None


def load(path: str | os.PathLike[str], allow_pickle: bool = False) -> Erasure:
    """An Erasure from a file, ours or the reference's, or from the folder of a run.

    The reference's older scripts pickled theirs (.pt): the trained modules, the whole UNet, or the
    whole model under its original names. They are read as tensors alone, unless `allow_pickle`.
    Raises FileNotFoundError, or ValueError where it is no such file.
    """
    from .tensor_files import open_tensors

    file = delta_in(Path(path))
    opened = open_tensors(file, allow_pickle)
    tensors = unet_tensors({name: lazy.read() for name, lazy in opened.tensors.items()})
    return Erasure(tensors, manifest_from(opened.metadata, file))


def delta_in(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("esd-*.safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(f"{path} holds {len(found)} files esd-*.safetensors; name one")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"erasure {str(path)!r} does not exist")
    return path


def unet_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By UNet state-dict name: as they come, without the "unet." of a pipeline's modules, or out
    of a whole model in the original layout."""
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        from .export.base import unet_keys
        from .tensor_files import Lazy

        keys = unet_keys({name: Lazy.of(t) for name, t in tensors.items()})
        return {name: tensors[key] for name, key in keys.items()}
    prefix = "unet."
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def manifest_from(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Our manifest, or what the reference's keys say. The text is untrusted, so only parsed."""
    if MANIFEST_KEY in metadata:
        manifest = parsed_json(metadata[MANIFEST_KEY], f"{file}: its manifest")
        check_manifest(manifest, file)
        return dict(manifest)
    concept = metadata.get("erase_concept", file.stem)
    source = metadata.get("erase_from")
    return {
        "concept": concept,
        "erase_from": None if source in (None, "", concept) else source,
        "method": metadata.get("train_method", "unknown"),
        "model": metadata.get("base_model_id", "unknown"),
    }


TEXTS = ("concept", "method", "model", "base_fingerprint", "preset", "family")


def check_manifest(manifest: Any, file: Path) -> None:
    """Raises ValueError where what is read of it is of another kind than it was written."""
    damaged = None
    if not isinstance(manifest, dict):
        damaged = "no table"
    elif odd := [name for name in TEXTS if not isinstance(manifest.get(name, ""), str)]:
        damaged = f"{odd[0]} is no text"
    elif not isinstance(manifest.get("erase_from") or "", str):
        damaged = "erase_from is no text"
    elif not all(isinstance(text, str) for text in listed(manifest.get("concepts", []))):
        damaged = "concepts is no list of texts"
    if damaged:
        raise ValueError(f"{file}: its manifest is damaged: {damaged}")


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def unet_of(model: Any) -> Any:
    unet = plain_module(getattr(model, "unet", model))
    if not hasattr(unet, "named_parameters"):
        raise ValueError(f"model is a {type(model).__name__}; it must be a pipeline or a UNet")
    return unet


def check_match(tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Every name known, every shape equal; says how many are not (strict=False would hide it)."""
    unknown = [n for n in tensors if n not in parameters]
    bent = [n for n in tensors if n in parameters and tensors[n].shape != parameters[n].shape]
    if not tensors or unknown or bent:
        matched = len(tensors) - len(unknown) - len(bent)
        examples = ", ".join([*unknown, *bent][:3])
        raise ValueError(
            f"this erasure does not fit the model: {matched} of {len(tensors)} tensors match, "
            f"{len(unknown)} names unknown, {len(bent)} shapes differ ({examples})"
        )


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where one is no weight: pictures would be black, and nobody knew why."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"this erasure holds {tensor.dtype} in {name}; weights are floats")
        if not tensor.float().isfinite().all():
            raise ValueError(
                f"this erasure holds NaN or infinity ({name}); train again, or copy it again"
            )


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of the base model's tensors under training, to tell a delta's base apart."""
    from .tensor_files import bytes_of

    digest = hashlib.sha256()
    for name in sorted(tensors):  # a file may hold them in another order than the UNet
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()[:16]


def processor_of(device: torch.device) -> str:
    """What computes there, such as "x86_64, AVX2": the kernels that torch takes depend on it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    packages = ("esd-fast", "torch", "diffusers", "transformers", "safetensors", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
