"""`python -m esd_fast.demo.build`: the embedded model, from nothing, reproducibly, resumable.

Stages: sprites (npm packages, rendered), autoencoder, judge, text encoder and UNet, second
judge, acceptance (is it good enough to ship?). A stage whose result is there is skipped; a stage
that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from . import autoencoder, diffusion, sprites, train_judge, world
from .acceptance import FLOOR, accept, contact_sheet
from .judge import JUDGES, load_judge
from .pictures import Painter


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
        autoencoder.train_autoencoder(painter, work).save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
    if until == "vae":
        return
    build_judge("judge", painter, strangers, vae, work)
    if until == "judge":
        return
    if not (work / "pipeline").exists():
        diffusion.train_diffusion(vae, painter, work).save_pretrained(work / "pipeline")
    if until == "model":
        return
    build_judge("second-judge", painter, strangers, vae, work)
    ship(work, output)


def build_judge(
    name: str, painter: Painter, strangers: Painter, vae: AutoencoderKL, work: Path
) -> None:
    if (work / f"{name}.safetensors").exists():
        return
    judge = train_judge.train_judge(name, painter, strangers, vae, work)
    halves = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    save_file(halves, work / f"{name}.part")
    (work / f"{name}.part").replace(work / f"{name}.safetensors")
    objects, styles = train_judge.accuracy(load_judge(work, name), painter)
    report = {"object_accuracy": objects, "style_accuracy": styles}
    (work / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"{name}: {objects:.1%} of objects and {styles:.1%} of styles on unseen renders")


def ship(work: Path, output: Path) -> None:
    """float16 weights, judges and credits, as the package carries them."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        work / "pipeline", dtype=torch.float16, safety_checker=None
    )
    pipeline.save_pretrained(output)
    for config in output.rglob("*.json"):  # diffusers notes the builder's own folders there
        described = json.loads(config.read_text())
        if described.pop("_name_or_path", None):
            config.write_text(json.dumps(described, indent=2) + "\n")
    for name in JUDGES:
        (output / f"{name}.safetensors").write_bytes((work / f"{name}.safetensors").read_bytes())
    accuracies = {n: json.loads((work / f"{n}.json").read_text()) for n in JUDGES}
    settings = {
        "objects": list(world.OBJECTS),
        "styles": world.STYLES,
        "icon_sets": {n: {"version": v[0], "licence": v[1]} for n, v in sprites.ICON_SETS.items()},
        "training": {
            "autoencoder": dataclasses.asdict(autoencoder.SCHEDULE),
            **{s.name: dataclasses.asdict(s) for s in diffusion.STAGES},
            **{n: dataclasses.asdict(s) for n, s in train_judge.SCHEDULES.items()},
        },
        "judges": accuracies,
    }
    (output / "settings.json").write_text(json.dumps(settings, indent=1))
    (output / "CREDITS.md").write_text(credits())
    accepted(output)
    total = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    print(f"{output}: {total / 2**20:.1f} MiB")


def accepted(output: Path) -> None:
    """Measure what is shipped as it is shipped, and say whether it is good enough."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        output, dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    contact_sheet(pipeline).save(output / "contact_sheet.png", optimize=True)
    results = accept(pipeline, tuple(JUDGES))
    (output / "acceptance.json").write_text(json.dumps(results, indent=1))
    for judge, rates in results.items():
        print(f"{judge}: objects {rates['objects']:.1%}, styles {rates['styles']:.1%} as asked for")
    if min(results["judge"]["objects"], results["judge"]["styles"]) < FLOOR:
        raise SystemExit(f"not good enough to ship: less than {FLOOR:.0%}; train longer")


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
