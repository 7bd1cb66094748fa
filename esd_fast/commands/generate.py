"""`esd-fast generate`: pictures of prompts, those of each erasure beside the original's."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, check_number
from esd_fast.files import check_outside, output_folder
from esd_fast.pages import keep_pages
from esd_fast.prompt_list import Case, read_prompts
from esd_fast.prompts import clean_prompt
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .drawing import check_drawing, check_images, drawing_settings, place_of

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure
    from esd_fast.evaluation.gallery import PromptRow, Variant
    from esd_fast.models import Model


def generate(arguments: argparse.Namespace) -> int:
    asked = Asked.of(arguments)
    check_outside(Path(arguments.output), arguments.model)
    with output_folder(Path(arguments.output)) as output:
        return draw_into(output, asked, arguments)


def draw_into(output: Path, asked: Asked, arguments: argparse.Namespace) -> int:
    keep_pages()
    quiet_libraries()
    from esd_fast.erasure import load
    from esd_fast.evaluation.gallery import rows_of, write_pages
    from esd_fast.models import load_model

    erasures = [(Path(p), load(p, asked.place.allow_pickle)) for p in arguments.erasure or []]
    model = load_model(arguments.model, asked.place)
    check_erasures(erasures, model)
    rows = [row for row in rows_of(asked.cases, asked.images, arguments.seed) if asked.wants(row)]
    pipeline = model.pipeline.to(model.device)
    settings = drawing_settings(arguments, model)
    variants = variants_of(output, model, erasures, settings, arguments.strength)
    drawn, there = draw_all(pipeline, rows, variants, settings, arguments)
    tell(f"{drawn} pictures drawn, {there} were there: {folders(variants)}")
    if not arguments.no_grid:
        first, *others = write_pages(output, rows, variants)
        tell(f"side by side: {first}" + (f" and {len(others)} more" if others else ""))
    return 0


@dataclass(frozen=True)
class Asked:
    """What the arguments say, checked before anything is loaded."""

    cases: list[Case]
    images: int
    first: int | None
    last: int | None
    place: EraseConfig

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Asked:
        check_drawing(arguments)
        check_number("--strength", arguments.strength)
        check_images(arguments)
        cases = cases_of(arguments)
        numbered = cases[0].number is not None
        images = arguments.images or (1 if numbered else 4)
        asked = cls(cases, images, arguments.from_case, arguments.till_case, place_of(arguments))
        asked.check_range(numbered)
        return asked

    def check_range(self, numbered: bool) -> None:
        said = {"--from-case": self.first, "--till-case": self.last}
        for name, value in said.items():
            if value is not None and not numbered:
                raise ValueError(f"{name} is {value}; only a CSV has case numbers (--prompts)")
        if not any(self.holds(case) for case in self.cases):
            numbers = [case.number for case in self.cases if case.number is not None]
            raise ValueError(
                f"--from-case {self.first}, --till-case {self.last}: no case is there; the "
                f"file's go from {min(numbers)} to {max(numbers)}"
            )

    def holds(self, case: Case) -> bool:
        if case.number is None:
            return True
        too_early = self.first is not None and case.number < self.first
        return not too_early and (self.last is None or case.number <= self.last)

    def wants(self, row: PromptRow) -> bool:
        return self.holds(row.case)


def check_erasures(erasures: list[tuple[Path, Erasure]], model: Model) -> None:
    """Raises ValueError where one does not fit; says where one is of other weights."""
    from esd_fast.erasure import check_match, check_values, unet_of
    from esd_fast.export.merge import was_trained_on
    from esd_fast.parameters import plain_parameters

    parameters = plain_parameters(unet_of(model.pipeline))
    for path, erasure in erasures:
        check_match(erasure.tensors, parameters)
        check_values(erasure.tensors)
        weights = {n: p.detach() for n, p in parameters.items() if n in erasure.tensors}
        if "base_fingerprint" in erasure.manifest and not was_trained_on(erasure, weights):
            tell(
                f"note: {path} was trained on other weights than {model.source} holds; "
                "esd-fast verify says more",
                sys.stderr,
            )


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    return [Case(clean_prompt("--prompt", prompt)) for prompt in arguments.prompt]


def variants_of(
    output: Path,
    model: Model,
    erasures: list[tuple[Path, Erasure]],
    settings: dict[str, Any],
    strength: float,
) -> list[Variant]:
    """The model as it is, then with each erasure."""
    import esd_fast
    from esd_fast.erasure import delta_in
    from esd_fast.evaluation.gallery import BASE, Variant, folders_of, model_fingerprint

    side = settings["resolution"] or model.native_resolution
    told = {
        "model": model.source,
        "model_fingerprint": model_fingerprint(model.pipeline),
        "scheduler": type(model.pipeline.scheduler).__name__,
        "num_inference_steps": str(settings["num_inference_steps"]),
        "guidance_scale": f"{settings['guidance_scale']:g}",
        "size": f"{side}x{side}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "Software": f"esd-fast {esd_fast.__version__}",
    }
    variants = [Variant(output / BASE, None, told)]
    digests = [sha256_of(delta_in(path)) for path, _ in erasures]
    named = folders_of(output, [path for path, _ in erasures], digests)
    for (path, erasure), digest, folder in zip(erasures, digests, named, strict=True):
        of_erasure = {
            "erasure": str(path),
            "erasure_sha256": digest,
            "erased_concept": str(erasure.manifest.get("concept", "unknown")),
            "base_fingerprint": str(erasure.manifest.get("base_fingerprint", "not said")),
            "strength": f"{strength:g}",
        }
        variants.append(Variant(folder, erasure, told | of_erasure))
    return variants


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def draw_all(
    pipeline: Any,
    rows: list[PromptRow],
    variants: list[Variant],
    settings: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[int, int]:
    """How many were drawn, and how many were there. Nothing is drawn where another picture is in
    the way of any variant."""
    from esd_fast.evaluation.gallery import draw, unfinished

    bars = Bars()
    missing = [unfinished(rows, variant, arguments.overwrite) for variant in variants]
    for variant, files in zip(variants, missing, strict=True):
        if not files:
            continue
        if variant.erasure is not None:
            variant.erasure.apply(pipeline, arguments.strength)
        draw(pipeline, files, variant, settings, bars.drawing("draw"))
        if variant.erasure is not None:
            variant.erasure.revert(pipeline)
        bars.close()
    total = len({file.name for row in rows for file in row.files}) * len(variants)
    drawn = sum(map(len, missing))
    return drawn, total - drawn


def folders(variants: list[Variant]) -> str:
    return ", ".join(str(variant.folder) for variant in variants)
