"""Pictures of many prompts as files: each described by its metadata, drawn only where it is not
there yet, and laid side by side in pages. No more than a batch and a page are held at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.files import check_no_link
from esd_fast.generate import Shot, pictures, to_pil
from esd_fast.live import parts_to_place
from esd_fast.prompts import safe_name

from .pictures import (
    ComparisonRow,
    comparison_grid,
    png_text,
    read_picture,
    read_png_text,
    save_png,
    tile,
    was_cut,
)

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure
    from esd_fast.prompt_list import Case

PAGE_ROWS, PAGE_COLUMNS = 16, 8
BASE = "base"
# what decides over the pixels; other metadata may differ in a file that counts as finished
DECISIVE = (
    *("prompt", "seed", "sample", "model_fingerprint", "erasure_sha256", "strength"),
    *("scheduler", "num_inference_steps", "guidance_scale", "size", "dtype"),
)
GRID_MARK = "esd_fast_grid"


@dataclass(frozen=True)
class PictureFile:
    """One picture to be: `name` in the folder of each model that draws it."""

    shot: Shot
    name: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its pictures."""

    case: Case
    files: tuple[PictureFile, ...]

    @property
    def note(self) -> str:
        if self.case.number is None:
            return ""
        return f"case {self.case.number}, seed {self.files[0].shot.seed}"


@dataclass(frozen=True)
class Variant:
    """The model with one erasure, or (None) as it is, and the folder of its pictures."""

    folder: Path
    erasure: Erasure | None = None
    told: dict[str, str] = field(default_factory=dict)
    """Metadata of each of its pictures."""


# --- names ---------------------------------------------------------------------------------------


def rows_of(cases: Sequence[Case], images: int, seed: int) -> list[PromptRow]:
    """`images` files for each case, no two of one name (upper and lower case count as one).

    A numbered case is drawn as the public scripts do: samples 0, 1, ... of its own seed (`seed`
    where it has none), named NUMBER_SAMPLE.png. A prompt without a number gets the seeds `seed`,
    `seed` + 1, ... and PROMPT-SEED.png. A name that another picture took gets a hash.
    """
    taken: dict[str, Shot] = {}
    rows = []
    for case in cases:
        files = []
        for i in range(images):
            if case.number is None:
                shot = Shot(case.prompt, seed + i)
                stem = f"{safe_name(case.prompt)}-{shot.seed}"
            else:
                shot = Shot(case.prompt, seed if case.seed is None else case.seed, i)
                stem = f"{case.number}_{i}"
            if taken.setdefault(stem.casefold(), shot) != shot:
                digest = hashlib.sha256(repr(shot).encode()).hexdigest()[:8]
                stem = f"{stem}-{digest}"
            files.append(PictureFile(shot, f"{stem}.png"))
        rows.append(PromptRow(case, tuple(files)))
    return rows


def folders_of(output: Path, paths: Sequence[Path], digests: Sequence[str]) -> list[Path]:
    """A folder in `output` for each erasure, called as its file or run is; where two would share
    one, the later gets the start of its digest."""
    taken = {BASE}
    folders = []
    for path, digest in zip(paths, digests, strict=True):
        whole = path.resolve()
        name = safe_name(whole.stem if whole.is_file() else whole.name)
        if name.casefold() in taken:
            name = f"{name}-{digest[:8]}"
        taken.add(name.casefold())
        folders.append(output / name)
    return folders


# --- metadata ------------------------------------------------------------------------------------


def model_fingerprint(pipeline: Any) -> str:
    """A hash of all that draws: UNet, VAE, text encoders, and the scheduler's settings."""
    from esd_fast.erasure import fingerprint

    parts = {"unet": pipeline.unet, **parts_to_place(pipeline)}
    weights = {f"{p}.{n}": t for p, part in parts.items() for n, t in part.state_dict().items()}
    settings = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    told = fingerprint(weights) + json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def metadata_of(row: PromptRow, file: PictureFile, variant: Variant) -> dict[str, str]:
    shot, case = file.shot, row.case
    told = {"prompt": shot.prompt, "seed": str(shot.seed), "sample": str(shot.sample)}
    if case.number is not None:
        told["case_number"] = str(case.number)
    if case.columns:
        told["columns"] = json.dumps(case.columns, ensure_ascii=False)
    return {k: png_text(v) for k, v in (told | variant.told).items()}


# --- drawing -------------------------------------------------------------------------------------


def unfinished(
    rows: Sequence[PromptRow], variant: Variant, overwrite: bool
) -> list[tuple[PromptRow, PictureFile]]:
    """The files that are still to be drawn, each once.

    Raises FileExistsError where another picture is in the way, unless `overwrite`; or a link
    in place of the folder.
    """
    check_no_link(variant.folder)
    missing = []
    others = 0
    example = ""
    wanted = {file.name: (row, file) for row in rows for file in row.files}
    for row, file in wanted.values():
        path = variant.folder / file.name
        if path.is_dir():
            raise FileExistsError(f"{path} is a folder; give another --output")
        there = read_png_text(path)
        if there is None and (was_cut(path) or not os.path.lexists(path)):
            missing.append((row, file))
            continue
        there, told = there or {}, metadata_of(row, file, variant)
        differ = [key for key in DECISIVE if there.get(key) != told.get(key)]
        if differ:
            missing.append((row, file))
            others += 1
            example = example or f"{path} ({difference(differ[0], there, told)})"
    if others and not overwrite:
        raise FileExistsError(
            f"{others} other pictures are in the way, such as {example}; --overwrite replaces "
            "them, another --output keeps them"
        )
    return missing


def difference(key: str, there: dict[str, str], told: dict[str, str]) -> str:
    was, now = (shorten(d.get(key)) for d in (there, told))
    return f"its {key} is {was}, now it would be {now}"


def shorten(value: str | None) -> str:
    if value is None:
        return "not said"
    return repr(value if len(value) <= 40 else value[:37] + "...")


def draw(
    pipeline: Any,
    files: Sequence[tuple[PromptRow, PictureFile]],
    variant: Variant,
    settings: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Each is written as soon as its batch is drawn, whole or not at all."""
    variant.folder.mkdir(parents=True, exist_ok=True)
    shots = [file.shot for _, file in files]
    stream = pictures(pipeline, shots, on_progress=on_progress, **settings)
    for (row, file), picture in zip(files, stream, strict=True):
        told = metadata_of(row, file, variant)
        save_png(to_pil(picture), variant.folder / file.name, told)


# --- pages ---------------------------------------------------------------------------------------


def write_pages(output: Path, rows: Sequence[PromptRow], variants: Sequence[Variant]) -> list[Path]:
    """grid.png, or grid-1.png, grid-2.png, ...: the variants side by side, read from their files.
    Pages of an earlier, longer list go."""
    strips = list(strips_of(rows))
    pages = [strips[i : i + PAGE_ROWS] for i in range(0, len(strips), PAGE_ROWS)]
    digits = len(str(len(pages)))
    written = []
    for number, page in enumerate(pages, 1):
        name = "grid.png" if len(pages) == 1 else f"grid-{number:0{digits}}.png"
        shown = [
            ComparisonRow(row.case.prompt, row.note, [opened(v.folder, files) for v in variants])
            for row, files in page
        ]
        grid = comparison_grid(shown, [variant.folder.name for variant in variants])
        written.append(save_png(grid, output / name, {GRID_MARK: f"{number} of {len(pages)}"}))
    for old in set(output.glob("grid*.png")) - set(written):
        if GRID_MARK in (read_png_text(old) or {}):
            old.unlink()
    return written


def strips_of(rows: Iterable[PromptRow]) -> Iterable[tuple[PromptRow, Sequence[PictureFile]]]:
    """A row of the grid holds PAGE_COLUMNS pictures of a variant at most; more go below."""
    for row in rows:
        for first in range(0, len(row.files), PAGE_COLUMNS):
            yield row, row.files[first : first + PAGE_COLUMNS]


def opened(folder: Path, files: Sequence[PictureFile]) -> list[Any]:
    # as small as the page shows them
    return [tile(read_picture(folder / file.name)) for file in files]
