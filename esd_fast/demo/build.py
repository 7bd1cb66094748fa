"""`python -m esd_fast.demo.build`: the embedded model, from nothing, reproducibly, resumable.

Stages: sprites (npm packages, rendered), autoencoder, judge, text encoder and UNet, second
judge, acceptance (is it good enough to ship?). A stage whose result is there is skipped; a stage
that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from . import sprites, world
from .autoencoder import train_autoencoder
from .diffusion import train_diffusion
from .judge import JUDGES, load_judge
from .pictures import Painter
from .train_judge import accuracy, train_judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo-build"), help="checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--until", choices=["vae", "judge", "model", "all"], default="all")
    arguments = parser.parse_args()
    build(arguments.work, arguments.output, arguments.until)


def build(work: Path, output: Path, until: str = "all") -> None:
    work.mkdir(parents=True, exist_ok=True)
    painter = Painter(sprites.sprites(work))
    strangers = Painter(sprites.strangers(work))
    if not (work / "vae").exists():
        train_autoencoder(painter, work).save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
    if until == "vae":
        return
    build_judge("judge", painter, strangers, vae, work)
    if until == "judge":
        return
    if not (work / "pipeline").exists():
        train_diffusion(vae, painter, work).save_pretrained(work / "pipeline")
    if until == "model":
        return
    build_judge("second-judge", painter, strangers, vae, work)
    ship(work, output)


def build_judge(
    name: str, painter: Painter, strangers: Painter, vae: AutoencoderKL, work: Path
) -> None:
    if (work / f"{name}.safetensors").exists():
        return
    judge = train_judge(name, painter, strangers, vae, work)
    halves = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    save_file(halves, work / f"{name}.part")
    (work / f"{name}.part").replace(work / f"{name}.safetensors")
    objects, styles = accuracy(load_judge(work, name), painter)
    report = {"object_accuracy": objects, "style_accuracy": styles}
    (work / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"{name}: {objects:.1%} of objects and {styles:.1%} of styles on unseen renders")


def ship(work: Path, output: Path) -> None:
    """float16 weights, judges and credits, as the package carries them."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        work / "pipeline", dtype=torch.float16, safety_checker=None
    )
    pipeline.save_pretrained(output)
    for name in JUDGES:
        (output / f"{name}.safetensors").write_bytes((work / f"{name}.safetensors").read_bytes())
    accuracies = {n: json.loads((work / f"{n}.json").read_text()) for n in JUDGES}
    settings = {
        "objects": list(world.OBJECTS),
        "styles": world.STYLES,
        "icon_sets": {n: {"version": v[0], "licence": v[1]} for n, v in sprites.ICON_SETS.items()},
        "judges": accuracies,
    }
    (output / "settings.json").write_text(json.dumps(settings, indent=1))
    (output / "CREDITS.md").write_text(credits())
    total = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    print(f"{output}: {total / 2**20:.1f} MiB")


def credits() -> str:
    rows = "\n".join(
        f"| {name} {version} | {credit} | {licence} |"
        for name, (version, licence, credit) in sprites.ICON_SETS.items()
    )
    head = "| icon set (npm: @iconify-json/...) | drawn by | licence |\n|---|---|---|\n"
    intro = (
        "# Credits\n\nThe embedded model was trained from nothing by this project on renders of "
        "free emoji drawings. The `pixel` and `sepia` styles are changed renders.\n\n"
    )
    return intro + head + rows + "\n"


if __name__ == "__main__":
    main()
