"""A file of tensors, looked at before it is read; pickled objects only with consent."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esd_fast.tensor_files import check_sides

DEEPEST = 4  # tables named state_dict in each other
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: names, shapes and dtypes, on the meta device. `loaded`: a pickle's own tensors,
    mapped, since a pickle cannot be looked at by halves."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    loaded: dict[str, torch.Tensor] | None = None

    def read(self) -> dict[str, torch.Tensor]:
        """The weights themselves, mapped from the file where it can be."""
        from safetensors.torch import load_file

        return load_file(self.path) if self.loaded is None else self.loaded


def open_checkpoint(path: Path, allow_pickle: bool) -> Checkpoint:
    """Raises ValueError where the file is damaged, or holds pickled objects without consent."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no checkpoint; it must be one of {', '.join(SUFFIXES)}")
    content = unpickled(path, allow_pickle)
    for _ in range(DEEPEST):  # a table may hold itself
        if isinstance(content, Mapping) and "state_dict" in content:
            content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no table of tensors")  # noqa: TRY004
    loaded = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    return Checkpoint(path, {n: t.to("meta") for n, t in loaded.items()}, {}, loaded)


def open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: piece.get_shape() for name, piece in pieces.items()}
            check_sides(path, shapes.values())
            # of the dtype nothing depends
            tensors = {name: torch.empty(s, device="meta") for name, s in shapes.items()}
            return Checkpoint(path, tensors, opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def unpickled(path: Path, allow_pickle: bool) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)  # the older format cannot be mapped
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = refused_object(error)
        if refused and allow_pickle:
            return unpickled_whole(path, zipped)
        if refused:
            raise ValueError(
                f"{path} holds a pickled object beside its weights ({refused}), and reading one "
                "can run any code; a .safetensors version needs no trust; if you trust where this "
                "one is from, --allow-pickle (allow_pickle=True) reads it, as a single file"
            ) from None
        raise ValueError(f"{path} is no whole checkpoint of tensors") from None
    except Exception as error:  # noqa: BLE001  torch has no error of its own for a damaged file
        raise ValueError(f"{path} is no whole checkpoint: {first_line(error)}") from None


def unpickled_whole(path: Path, zipped: bool) -> Any:
    """With the caller's consent: this runs whatever code the file brings."""
    try:
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=False)
    except ImportError as error:
        raise ValueError(
            f"{path} holds objects of a package that is not installed: {first_line(error)}"
        ) from None
    except Exception as error:  # noqa: BLE001  whatever its objects raise
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from None


def refused_object(error: Exception) -> str:
    """The class or function that torch would not take from the file, or ''."""
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|type) <?class '?([\w.]+)", str(error))
    return next(filter(None, found.groups())) if found else ""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
