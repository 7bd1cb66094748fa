"""`esd-fast generate`: pictures of prompts, the erased model's beside the original's."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, check_count, check_number, refuse
from esd_fast.pages import keep_pages
from esd_fast.prompts import clean_prompt, safe_name

from .console import Bars, quiet_libraries
from .loading import loading_of

if TYPE_CHECKING:
    from esd_fast.generate import Shot


def generate(arguments: argparse.Namespace) -> int:
    prompts = [clean_prompt("--prompt", p) for p in arguments.prompt]
    check_count("--images", arguments.images)
    check_count("--num-inference-steps", arguments.num_inference_steps)
    check_number("--strength", arguments.strength)
    if arguments.seed < 0:
        refuse("--seed", arguments.seed, "a whole number from 0")
    if arguments.guidance_scale is not None:
        check_number("--guidance-scale", arguments.guidance_scale)
    # the settings that loading needs, checked by the rules that training uses
    place = EraseConfig(
        concept=prompts[0],
        dtype=arguments.dtype,
        device=arguments.device,
        resolution=arguments.resolution,
        **dataclasses.asdict(loading_of(arguments)),
    )
    keep_pages()
    quiet_libraries()
    from esd_fast.erasure import load
    from esd_fast.generate import Shot
    from esd_fast.models import load_model

    erasure = load(arguments.erasure) if arguments.erasure else None
    model = load_model(arguments.model, place)
    shots = [Shot(p, arguments.seed + i) for p in prompts for i in range(arguments.images)]
    folder, bars = Path(arguments.output), Bars()
    folder.mkdir(parents=True, exist_ok=True)
    embedded = model.source == "embedded"
    settings = {
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale or (4.0 if embedded else 7.5),
        "resolution": arguments.resolution,
        "batch_size": 64 if embedded else 1,
    }
    pipeline = model.pipeline.to(model.unet.device)
    before = draw(pipeline, shots, settings, folder, "base", bars, model.source)
    after = []
    if erasure:
        erasure.apply(pipeline, arguments.strength)
        after = draw(pipeline, shots, settings, folder, "erased", bars, arguments.erasure)
    bars.close()
    sheet = write_grid(folder, prompts, arguments.images, before, after)
    print(f"{len(before) + len(after)} pictures and {sheet}")
    return 0


def draw(
    pipeline: Any,
    shots: list[Shot],
    settings: dict[str, Any],
    folder: Path,
    kind: str,
    bars: Bars,
    source: str,
) -> list[Any]:
    """Each picture is written as soon as it is drawn, with what made it in its metadata."""
    from esd_fast.evaluation.pictures import save_png
    from esd_fast.generate import pictures, to_pil

    bars.close()
    drawn = []
    stream = pictures(pipeline, shots, on_progress=bars.drawing("draw"), **settings)
    for shot, picture in zip(shots, stream, strict=True):
        image = to_pil(picture)
        described = {"prompt": shot.prompt, "seed": shot.seed, "model": source, **settings}
        name = f"{safe_name(shot.prompt)}-{shot.seed}-{kind}.png"
        save_png(image, folder / name, {k: str(v) for k, v in described.items()})
        drawn.append(image)
    return drawn


def write_grid(
    folder: Path, prompts: list[str], columns: int, before: list[Any], after: list[Any]
) -> Path:
    from esd_fast.evaluation.pictures import GridRow, before_after_grid, contact_sheet, save_png

    sheet = folder / "grid.png"
    if not after:
        labels = [prompt for prompt in prompts for _ in range(columns)]
        save_png(contact_sheet(before, labels, columns), sheet, None)
        return sheet
    rows = [
        GridRow(p, "kept", before[i : i + columns], after[i : i + columns])
        for p, i in zip(prompts, range(0, len(before), columns), strict=True)
    ]
    save_png(before_after_grid(rows), sheet, None)
    return sheet
