"""Pictures that `esd-fast generate` drew, read back: the model's own and those of each erasure, from
the same noise."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .gallery import BASE, DECISIVE, difference
from .pictures import read_picture, read_png_text

OF_ERASURE = ("erasure_sha256", "strength")


@dataclass(frozen=True)
class DrawnPicture:
    """One picture; every folder has it under `name`."""

    name: str
    prompt: str
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What else the prompt list said of it."""


@dataclass(frozen=True)
class DrawnFolder:
    """What one model drew."""

    path: Path
    told: dict[str, str]
    """The metadata that all of its pictures share."""

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, pictures: Sequence[DrawnPicture]) -> list[np.ndarray]:
        """(H, W, 3) uint8 each. Raises ValueError naming a file that is damaged, or not as large
        as its metadata say."""
        read = []
        for path in (self.path / picture.name for picture in pictures):
            picture = read_picture(path)
            size = f"{picture.width}x{picture.height}"
            if self.told.get("size", size) != size:
                raise ValueError(
                    f"{path} has {size} pixels and says {self.told['size']}: another program wrote "
                    "it; draw it again"
                )
            read.append(np.asarray(picture))
        return read


@dataclass(frozen=True)
class Drawn:
    """`base` and at least one of `erased`, with the same pictures each."""

    pictures: tuple[DrawnPicture, ...]
    base: DrawnFolder
    erased: tuple[DrawnFolder, ...]

    @property
    def folders(self) -> tuple[DrawnFolder, ...]:
        return self.base, *self.erased

    @property
    def embedded(self) -> bool:
        return self.base.told.get("model") == "embedded"


def read_drawn(
    folder: str | Path,
    names: Collection[str] | None = None,
    of_erasures: Collection[Path] | None = None,
) -> Drawn:
    """Of a folder that `generate` wrote, all pictures that every model drew, or those in `names`;
    of the folders of all erasures, or `of_erasures`.

    Raises FileNotFoundError or ValueError where it is no such folder, where pictures of one name
    are not from the same prompt and noise, and where one folder holds pictures of several models.
    """
    folder = Path(folder)
    if not (folder / BASE).is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder {BASE!r}; give what `esd-fast generate --output` wrote"
        )
    base = metadata_in(folder / BASE, names)
    others = {
        path: metadata
        for path in (sorted(folder.iterdir()) if of_erasures is None else of_erasures)
        if path.is_dir() and (metadata := metadata_in(path, names, erased=True))
    }
    if not base or not others:
        what = "the model's own pictures" if not base else "pictures of an erasure"
        raise ValueError(f"{folder} holds no {what}; draw them with `esd-fast generate --erasure`")
    common = [name for name in base if all(name in metadata for metadata in others.values())]
    if not common:
        raise ValueError(f"no picture in {folder} was drawn by every model; draw them again")
    for path, metadata in others.items():
        for name in common:
            check_pair(path / name, base[name], metadata[name])
    return Drawn(
        tuple(picture_of(name, base[name]) for name in common),
        folder_of(folder / BASE, [base[n] for n in common]),
        tuple(folder_of(p, [metadata[n] for n in common]) for p, metadata in others.items()),
    )


def metadata_in(
    folder: Path, names: Collection[str] | None, erased: bool = False
) -> dict[str, dict[str, str]]:
    """By file name, of the pictures that `generate` wrote."""
    found = {}
    for path in sorted(folder.glob("*.png"), key=lambda p: natural(p.name)):
        if names is not None and path.name not in names:
            continue
        told = read_png_text(path)
        if told and "prompt" in told and ("erasure_sha256" in told) == erased:
            found[path.name] = told
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Case 2 before case 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def check_pair(path: Path, base: dict[str, str], told: dict[str, str]) -> None:
    for key in DECISIVE:
        if key not in OF_ERASURE and base.get(key) != told.get(key):
            raise ValueError(
                f"{path} does not belong to the base's picture of that name: "
                f"{difference(key, base, told)}; draw both into one folder"
            )


def picture_of(name: str, told: dict[str, str]) -> DrawnPicture:
    try:
        columns = json.loads(told.get("columns", "{}"))
    except json.JSONDecodeError:
        columns = {}
    plain = {str(k): str(v) for k, v in columns.items()} if isinstance(columns, dict) else {}
    return DrawnPicture(name, told["prompt"], plain)


def folder_of(path: Path, metadata: Sequence[dict[str, str]]) -> DrawnFolder:
    first = metadata[0]
    for key in ("model_fingerprint", *OF_ERASURE):
        if len({told.get(key) for told in metadata}) > 1:
            raise ValueError(f"{path} holds pictures of more than one {key}; draw them again")
    shared = {k: v for k, v in first.items() if all(told.get(k) == v for told in metadata)}
    return DrawnFolder(path, shared)
