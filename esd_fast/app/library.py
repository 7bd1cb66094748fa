"""The erasures in the work folder: a folder each, as `esd-fast train` writes them, and whose they are."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd_fast.evaluation import write_atomically
from esd_fast.files import replacing
from esd_fast.prompts import file_part, safe_name

from .limits import Limits, hide_paths
from .models_offered import OfferedModels
from .wishes import PROOFS

NOTE = "app.json"
READ = (NOTE, "manifest.json", "report.html", "report.json", "exports")
LONGEST = 200  # characters of a text that came with a file
UNET_PARTS = (
    *("conv_in.", "conv_out.", "conv_norm_out.", "time_embedding.", "add_embedding."),
    *("class_embedding.", "down_blocks.", "mid_block.", "up_blocks.", "encoder_hid_proj."),
)
DOWNLOADS = {  # format of esd_fast.export -> what people read
    "delta": "delta",
    "lora": "LoRA (diffusers)",
    "kohya": "LoRA (A1111, ComfyUI)",
    "single-file": "single file",
}


@dataclass(frozen=True)
class Entry:
    """One erasure as a list shows it. Texts of an imported file are cut, and never trusted."""

    folder: Path
    concept: str
    method: str
    model: str
    created: float  # seconds since 1970
    owner: str | None  # None: everybody's, since the owner of the machine put it there
    imported: bool
    steps: int | None
    interrupted: bool
    resumable: bool
    proof: str
    """What was asked to be drawn, and will be where it is gone on with."""

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def title(self) -> str:
        when = time.strftime("%d %b %H:%M", time.localtime(self.created))
        stopped = f", stopped after {self.steps} steps" if self.interrupted else ""
        origin = ", imported" if self.imported else ""
        return f"{self.concept} ({self.method}{stopped}{origin}, {when})"

    @property
    def report(self) -> Path | None:
        file = self.folder / "report.html"
        return file if file.is_file() else None


class Library:
    """`shared`: every browser sees all; otherwise its own, and what has no owner."""

    def __init__(
        self, folder: Path, offered: OfferedModels, limits: Limits, shared: bool = False
    ) -> None:
        self.folder, self.offered, self.limits, self.shared = folder, offered, limits, shared
        folder.mkdir(parents=True, exist_ok=True)

    def entries(self, owner: str) -> list[Entry]:
        """Those that `owner` may see, the newest first."""
        found = (entry_at(path) for path in self.folder.iterdir() if path.is_dir())
        seen = [entry for entry in found if entry is not None and self.may_see(entry, owner)]
        return sorted(seen, key=lambda entry: -entry.created)

    def may_see(self, entry: Entry, owner: str) -> bool:
        return self.shared or entry.owner in (None, owner)

    def get(self, key: object, owner: str) -> Entry:
        """Raises FileNotFoundError where there is none that `owner` may see; the two cases look
        alike."""
        for entry in self.entries(owner):  # never a path made of `key`
            if entry.key == key:
                return entry
        raise FileNotFoundError("there is no such erasure")

    def new_folder(
        self,
        concepts: tuple[str, ...],
        owner: str,
        *,
        imported: bool = False,
        proof: str = "none",
    ) -> Path:
        """For one that is being made: listed once its delta is there."""
        name = f"{safe_name(file_part(concepts), 40)}-{secrets.token_hex(4)}"
        folder = self.folder / name
        folder.mkdir()
        note = {"owner": owner, "created": time.time(), "imported": imported, "proof": proof}
        write_atomically(folder / NOTE, json.dumps(note).encode())
        return folder

    def discard(self, folder: Path) -> None:
        """Nothing came of it."""
        shutil.rmtree(folder, ignore_errors=True)

    def forget_exports(self, folder: Path) -> None:
        """The erasure there is another now."""
        shutil.rmtree(folder / "exports", ignore_errors=True)

    def bring(self, file: Path, name: str, owner: str) -> Entry:
        """An uploaded file, which goes from its place into the library; `name` as it was called.

        Raises ValueError where it is no erasure: not safetensors, no floating-point tensors of a
        UNet, numbers that are not finite, or too many are here already.
        """
        brought = sum(e.imported and e.owner == owner for e in self.entries(owner))
        if brought >= self.limits.uploads:
            raise ValueError(f"{brought} erasures were imported already; no more are taken")
        if not name.lower().endswith(".safetensors"):
            raise ValueError(
                f"{Path(name).name[-60:]!r} must be a .safetensors file: others can run code"
            )
        erasure = checked(file)
        concepts = tuple(cut(text) for text in erasure.concepts) or (safe_name(Path(name).stem),)
        folder = self.new_folder(concepts, owner, imported=True)
        try:
            with replacing(folder / erasure.file_name) as place:
                shutil.copyfile(file, place)
            entry = entry_at(folder)
        except BaseException:
            self.discard(folder)
            raise
        assert entry is not None
        return entry

    def download(self, entry: Entry, format: str) -> tuple[Path, str]:
        """The file in one of DOWNLOADS, written where it is not there yet, and what to call it.

        Raises ValueError or FileNotFoundError where it cannot be made.
        """
        from esd_fast.erasure import delta_in

        delta = delta_in(entry.folder)
        if format == "delta":
            return delta, delta.name
        if format not in DOWNLOADS:
            raise ValueError(f"format is {format!r}; it must be one of {', '.join(DOWNLOADS)}")
        target = entry.folder / "exports" / f"{format}.safetensors"
        if leads_out(target, self.folder):
            raise FileNotFoundError("there is no such file")
        if not target.exists():
            from esd_fast.erasure import load
            from esd_fast.export import export

            target.parent.mkdir(exist_ok=True)
            source = self.offered.source_of(entry.model)
            export(load(delta), target, format, model=source or "embedded")
        return target, f"{delta.stem}-{format}.safetensors"


def entry_at(folder: Path) -> Entry | None:
    """None where no erasure lies there (yet), its file is damaged, or a link leads elsewhere."""
    from esd_fast.erasure import delta_in

    try:
        delta = delta_in(folder)
        if any(leads_out(path, folder.parent) for path in (delta, *(folder / n for n in READ))):
            return None
        told = manifest_of(folder, delta)
        note = json_in(folder / NOTE)
        created = float(note.get("created", delta.stat().st_mtime))
    except (OSError, ValueError, TypeError):
        return None
    losses = told.get("losses")
    owner = note.get("owner")
    return Entry(
        folder=folder,
        concept=cut(told.get("concept") or delta.stem),
        method=cut(told.get("method", "unknown")),
        model=cut(hide_paths(str(told.get("model", "unknown")))),
        created=created,
        owner=owner if isinstance(owner, str) else None,
        imported=note.get("imported") is True,
        steps=len(losses) if isinstance(losses, list) else None,
        interrupted=told.get("interrupted") is True,
        resumable=any(folder.glob("checkpoint-*.safetensors")),
        proof=note["proof"] if note.get("proof") in PROOFS else "none",
    )


def leads_out(path: Path, root: Path) -> bool:
    """Whether links on the way to `path` end outside `root`."""
    return not path.resolve().is_relative_to(root.resolve())


def manifest_of(folder: Path, delta: Path) -> Mapping[str, Any]:
    """The run's own, else what the file's metadata say."""
    told = json_in(folder / "manifest.json")
    if told:
        return told
    from esd_fast.erasure import manifest_from
    from esd_fast.tensor_files import open_safetensors

    return manifest_from(open_safetensors(delta).metadata, delta)


def json_in(file: Path) -> dict[str, Any]:
    """A table; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        told = json.loads(file.read_text())
        if isinstance(told, dict):
            return told
    return {}


def cut(text: object) -> str:
    """One line of what came with a file."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def checked(file: Path) -> Any:
    """An Erasure from a file that anybody may have sent. Raises ValueError."""
    import torch

    from esd_fast.erasure import Erasure, manifest_from, unet_tensors
    from esd_fast.tensor_files import open_safetensors

    try:
        opened = open_safetensors(file)
        check_names([*opened.tensors])
        tensors = unet_tensors({name: lazy.read() for name, lazy in opened.tensors.items()})
        manifest = manifest_from(opened.metadata, file)
    except (KeyError, TypeError, RuntimeError, RecursionError, OSError) as error:
        raise ValueError(f"it is no whole safetensors file: {type(error).__name__}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ValueError(f"its tensor {cut(name)} holds what is no finite number")
    return Erasure(tensors, manifest)


def check_names(names: list[str]) -> None:
    """Raises ValueError, with what the file is instead, where they are not those of a UNet."""
    from esd_fast.evaluation.key_kinds import KINDS

    if not names:
        raise ValueError("it holds no tensors")
    plain = [name.removeprefix("unet.") for name in names]
    if all(name.startswith(UNET_PARTS) for name in plain) and ".lora" not in " ".join(plain):
        return
    for pattern, kind, advice in KINDS:
        if any(re.search(pattern, name) for name in plain):
            raise ValueError(f"{kind}; {advice}")
    raise ValueError(
        f"its tensors ({cut(plain[0])}, ...) are not those of a UNet in diffusers' names"
    )


def forget_empty(folder: Path, seconds: float = 600.0) -> None:
    """Gradio leaves an empty file behind for every upload; one that is as young may be arriving."""
    for path in folder.glob("tmp*"):
        with contextlib.suppress(OSError):
            told = path.stat()
            if told.st_size == 0 and time.time() - told.st_mtime > seconds:
                path.unlink()


def folder_size(folder: Path) -> int:
    """Bytes of all files below, as far as they stay there while it counts."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
