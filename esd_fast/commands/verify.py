"""`esd-fast verify`: does this erasure belong to this model, and does it change anything?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, refuse
from esd_fast.pages import keep_pages
from esd_fast.prompts import clean_prompt
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .drawing import check_drawing, check_images, drawing_settings, place_of

if TYPE_CHECKING:
    from esd_fast.evaluation.verification import Verification
    from esd_fast.models import Model

IMAGES_EMBEDDED, IMAGES_OTHERS = 16, 2
LAYERS_SHOWN = 5


def verify(arguments: argparse.Namespace) -> int:
    """Exit code 0 where all is fine, else 1."""
    place = checked(arguments)
    prompts = [clean_prompt("--prompt", prompt) for prompt in arguments.prompt or []]
    keep_pages()
    quiet_libraries()
    from esd_fast.erasure import load
    from esd_fast.evaluation.verification import Look, Verification
    from esd_fast.evaluation.verification import verify as look_at
    from esd_fast.models import load_model

    bars = Bars()
    manifest: dict[str, Any] = {}
    try:
        erasure = load(arguments.file, place.allow_pickle)
    except ValueError as error:  # no whole file: that is an answer, not a wrong argument
        found = Verification()
        found.say("file", "problem", str(error), "copy it again, or save it as .safetensors")
    else:
        manifest = erasure.manifest
        model = load_model(arguments.model, place)
        count = images_of(arguments, model)
        look = None
        if count:
            settings = drawing_settings(arguments, model)
            look = Look.of(model, erasure, count, arguments.seed, settings, prompts)
            model.pipeline.to(model.device)
        found = look_at(
            erasure,
            model,
            look,
            allow_other_base=arguments.allow_other_base,
            on_progress=None if arguments.json else bars.drawing("draw"),
        )
        bars.close()
    told = as_dict(arguments, manifest, found)
    tell(json.dumps(told, indent=1) if arguments.json else as_text(told))
    return 0 if found.fine else 1


def checked(arguments: argparse.Namespace) -> EraseConfig:
    """The settings that loading needs; raises ValueError for a bad argument."""
    if not Path(arguments.file).exists():
        raise FileNotFoundError(f"erasure {arguments.file!r} does not exist")
    if arguments.images is not None and arguments.images < 0:
        refuse("--images", arguments.images, "a whole number from 0 (no pictures)")
    if arguments.images:
        check_images(arguments)
    check_drawing(arguments)
    return place_of(arguments)


def images_of(arguments: argparse.Namespace, model: Model) -> int:
    if arguments.images is not None:
        return int(arguments.images)
    return IMAGES_EMBEDDED if model.source == "embedded" else IMAGES_OTHERS


def as_dict(
    arguments: argparse.Namespace, manifest: dict[str, Any], found: Verification
) -> dict[str, Any]:
    return {
        "fine": found.fine,
        "file": arguments.file,
        "model": arguments.model or "embedded",
        "concept": manifest.get("concept"),
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
        **found.numbers,
    }


def as_text(told: dict[str, Any]) -> str:
    from esd_fast.evaluation.verification import IF_YOUR_PICTURES_DO_NOT_CHANGE

    lines = [f"{told['file']} on {told['model']}: {'fine' if told['fine'] else 'NOT FINE'}"]
    for finding in told["findings"]:
        lines.append(f"  {MARKS[finding['level']]:<8} {finding['what']}: {finding['text']}")
        if finding["advice"]:
            lines.append(f"{'':11}{finding['advice']}")
    layers = told.get("moves", {}).get("by_layer", [])
    if layers:
        lines.append("moved most, of their size:")
        lines += [f"  {row['relative_move']:9.3%}  {row['name']}" for row in layers[:LAYERS_SHOWN]]
    if told["fine"] and told.get("pictures"):
        lines.append("if your own pictures do not change:")
        lines += [f"  - {hint}" for hint in IF_YOUR_PICTURES_DO_NOT_CHANGE]
    return "\n".join(lines)


MARKS = {"fine": "fine", "note": "note", "problem": "PROBLEM"}
