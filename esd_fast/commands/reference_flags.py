"""The reference's command lines, as its scripts spell them.

`esd_sd`'s and `esd_sdxl`'s options are second spellings of ours (cli.py). The paper's script has
options of its own, which are turned into ours here, with that script's recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from esd_fast.parameters import METHODS
from esd_fast.prompts import clean_prompt, file_part, safe_name

# the paper's script's short names for lists of words; it trains on the whole text as one prompt
# unless --seperator (its spelling) splits it
WORD_LISTS = {
    "allartist": (
        "Kelly Mckernan, Thomas Kinkade, Ajin Demi Human, Alena Aenami, Tyler Edlin, Kilian Eng"
    ),
    "i2p": (
        "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
        "bodily fluids, blood"
    ),
    "artifact": (
        "ugly, tiling, poorly drawn hands, poorly drawn feet, poorly drawn face, out of frame, "
        "mutation, mutated, extra limbs, extra legs, extra arms, disfigured, deformed, cross-eye, "
        "body out of frame, blurry, bad art, bad anatomy, blurred, text, watermark, grainy"
    ),
}
# the paper's script's option -> ours
PAPER_OPTIONS = {
    "start_guidance": "guidance_scale",
    "image_size": "resolution",
    "ddim_steps": "num_inference_steps",
    "ckpt_path": "model",
}


def translated(arguments: argparse.Namespace) -> list[str]:
    """Fill our options from the paper's script's, in place; gives what the person should know.

    Raises ValueError for what is not done here, and for options of two scripts at once.
    """
    notes = []
    if arguments.prompt is None:
        paper = [*PAPER_OPTIONS, "seperator", "devices", "regularize"]
        stray = [name for name in paper if getattr(arguments, name) is not None]
        if stray:
            raise ValueError(f"--{stray[0]} is the paper's script's; it goes with --prompt")
    else:
        notes = from_paper_script(arguments)
    reference = arguments.prompt is not None or arguments.save_path is not None
    if reference and arguments.model is None:
        notes.append("no model is named, so the embedded one is used (the reference takes SD 1.4)")
    return notes


def from_paper_script(arguments: argparse.Namespace) -> list[str]:
    arguments.concept = words_of(arguments.prompt, arguments.seperator)
    arguments.preset = arguments.preset or "paper"
    if arguments.regularize:
        raise ValueError(f"--regularize is {arguments.regularize:g}; only 0 is done here")
    for theirs, ours in PAPER_OPTIONS.items():
        given = getattr(arguments, theirs)
        if given is not None:
            setattr(arguments, ours, given)
    if arguments.devices is not None and arguments.device is None:
        first = arguments.devices.split(",")[0].strip()  # the second held the frozen copy
        arguments.device = f"cuda:{first}" if first.isdigit() else first
    if f"ldm-{arguments.train_method}" in METHODS:  # its names mean other weights than ours
        arguments.train_method = f"ldm-{arguments.train_method}"
    unused = [n for n in ("config_path", "diffusers_config_path") if getattr(arguments, n)]
    return [f"--{name} is not needed: not read" for name in unused]


def words_of(prompt: str, separator: str | None) -> list[str]:
    text = WORD_LISTS.get(prompt, prompt)
    words = [text] if separator is None else text.split(separator or None)
    return [w.strip() for w in words if w.strip()] or [clean_prompt("--prompt", "")]


def reference_file(
    folder: Path, concepts: Sequence[str], sources: Sequence[str | None], method: str
) -> Path:
    """Where esd_sd.py writes and its notebooks read: spaces are underscores, methods without
    dashes. What no file system would take is made safe. Of several concepts, which the script
    does not know, the names are joined, and so are the `sources` that they are erased from."""

    def part(text: str) -> str:
        plain = text.replace(" ", "_")
        return plain if safe_name(plain) == plain else safe_name(text)

    short = safe_name(method).replace("-", "")
    origin = dict.fromkeys(s or c for c, s in zip(concepts, sources, strict=True))
    name = f"esd-{part(file_part(concepts))}-from-{part(file_part(list(origin)))}"
    return folder / f"{name}-{short}.safetensors"
