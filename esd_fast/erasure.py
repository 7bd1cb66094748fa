"""The result of an erasure: trained tensors and how they came about."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prompts import safe_name

if TYPE_CHECKING:
    import torch

MANIFEST_KEY = "esd_fast_manifest"


class Erasure:
    """Trained tensors by UNet state-dict name (float32, on the CPU) and a manifest.

    `apply` and `revert` work on a pipeline or a UNet. Each model that this erasure was applied
    to is remembered (weakly) with its own tensors, so that `revert` restores every bit.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        self.tensors = tensors
        self.manifest = manifest
        self._originals: weakref.WeakKeyDictionary[Any, dict[str, torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        count = sum(t.numel() for t in self.tensors.values())
        method = self.manifest.get("method", "unknown method")
        concept = self.manifest.get("concept", "unknown concept")
        return f"Erasure({concept!r}, {method}, {len(self.tensors)} tensors, {count:,} weights)"

    @property
    def file_name(self) -> str:
        """The reference's name of such a file, safe on every file system."""
        concept = str(self.manifest.get("concept", "concept"))
        source = self.manifest.get("erase_from") or concept
        method = safe_name(str(self.manifest.get("method", "esd")))
        return f"esd-{safe_name(concept)}-from-{safe_name(str(source))}-{method}.safetensors"

    def remember_original(self, unet: Any, original: dict[str, torch.Tensor]) -> None:
        self._originals[unet] = original

    def apply(self, model: Any, strength: float = 1.0) -> None:
        """Write the erased weights into `model`; applying again changes nothing.

        `strength` scales the move from the original weights (0: original, 1: erased). Raises
        ValueError, with nothing written, where names or shapes do not match the model.
        """
        import torch

        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength!r}; it must be finite: 0 original, 1 erased")
        unet = unet_of(model)
        parameters = dict(unet.named_parameters())
        check_match(self.tensors, parameters)
        if unet not in self._originals:
            self._originals[unet] = {n: parameters[n].detach().clone() for n in self.tensors}
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
        original = self._originals.get(unet)
        if original is None:
            raise ValueError(f"{self!r} was not applied to this model: nothing to revert")
        parameters = dict(unet.named_parameters())
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
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".part")
        try:
            tensors = {n: t.contiguous() for n, t in self.tensors.items()}
            save_file(tensors, temporary, metadata=self.metadata())
            temporary.chmod(0o666 & ~current_umask())  # safetensors writes for the owner alone
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def moves(self, model: Any) -> list[dict[str, Any]]:
        """How far each tensor moved on `model`, relative to what it was; the farthest first."""
        original = self._originals.get(unet_of(model), {})
        moves = [
            {
                "name": name,
                "relative_move": float(
                    (self.tensors[name] - before.cpu().float()).norm()
                    / before.float().norm().cpu().clamp_min(1e-12)
                ),
            }
            for name, before in original.items()
        ]
        return sorted(moves, key=lambda row: -row["relative_move"])

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


def load(path: str | os.PathLike[str]) -> Erasure:
    """An Erasure from a file, ours or the reference's, or from the folder of a run.

    Raises FileNotFoundError, or ValueError where it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    file = delta_in(Path(path))
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from None
    return Erasure(tensors, manifest_from(metadata, file))


def delta_in(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("esd-*.safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(f"{path} holds {len(found)} files esd-*.safetensors; name one")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"erasure {str(path)!r} does not exist")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must be a .safetensors file (pickled files are never opened)")
    return path


def manifest_from(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Our manifest, or what the reference's keys say. The text is untrusted, so only parsed."""
    if MANIFEST_KEY in metadata:
        try:
            manifest = json.loads(metadata[MANIFEST_KEY])
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: its manifest is damaged: {error}") from None
        if isinstance(manifest, dict):
            return manifest
        raise ValueError(f"{file}: its manifest is damaged: no table")
    concept = metadata.get("erase_concept", file.stem)
    source = metadata.get("erase_from")
    return {
        "concept": concept,
        "erase_from": None if source in (None, "", concept) else source,
        "method": metadata.get("train_method", "unknown"),
        "model": metadata.get("base_model_id", "unknown"),
    }


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unet_of(model: Any) -> Any:
    unet = getattr(model, "unet", model)
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


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of the base model's tensors under training, to tell a delta's base apart."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        # flat first: a channels_last 1x1 kernel counts as contiguous with strides of its own
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    packages = ("esd-fast", "torch", "diffusers", "transformers", "safetensors", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
