"""`esd-fast eval`: before against after, by every metric that is there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, check_number, refuse
from esd_fast.demo import is_embedded
from esd_fast.files import check_outside, output_folder
from esd_fast.pages import keep_pages
from esd_fast.prompt_list import Case
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .drawing import check_drawing, check_images, drawing_settings, place_of
from .generate import Asked, check_erasures, draw_all, folders, variants_of
from .recognising import check_clip

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure
    from esd_fast.evaluation.drawn import Drawn
    from esd_fast.evaluation.metrics import Metric, Settings

ERASED_IMAGES, KEPT_IMAGES = 32, 64  # of the embedded model, where no prompts are given


def evaluate(arguments: argparse.Namespace) -> int:
    check(arguments)
    check_outside(output_of(arguments), arguments.model)
    with output_folder(output_of(arguments)) as output:
        return evaluate_into(output, arguments)


def evaluate_into(output: Path, arguments: argparse.Namespace) -> int:
    keep_pages()
    quiet_libraries()
    from esd_fast.evaluation.concepts import gathered, with_erased
    from esd_fast.evaluation.evaluate import evaluate as measure
    from esd_fast.evaluation.evaluate import write_evaluation
    from esd_fast.evaluation.metrics import Subject

    drawn, metrics, lacking = (look_at if arguments.pictures else draw)(arguments)
    concepts = gathered(
        arguments.object or [],
        arguments.style or [],
        [picture.columns for picture in drawn.pictures],
        drawn.embedded,
    )
    said = [folder.told.get("erased_concept", "") for folder in drawn.erased]
    concepts = with_erased(concepts, arguments.erased or said)
    subject = Subject.of(drawn, concepts, arguments.erased or ())
    bars = Bars()
    try:
        told, interference = measure(subject, metrics, lacking, bars.drawing)
    finally:
        bars.close()
    page = write_evaluation(output, subject, told, interference)
    tell(as_text(told, page))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError; before anything is loaded."""
    if bool(arguments.erasures) == bool(arguments.pictures):
        raise ValueError("give erasures, or --pictures with a folder that `generate` wrote")
    if arguments.prompt and arguments.prompts:
        raise ValueError("give --prompt or --prompts, not both")
    if arguments.pictures and (arguments.prompt or arguments.prompts):
        raise ValueError("--pictures are of their own prompts; leave out --prompt and --prompts")
    check_drawing(arguments)
    check_images(arguments)
    check_number("--strength", arguments.strength)
    if not 0 < arguments.nudenet_threshold < 1:
        refuse("--nudenet-threshold", arguments.nudenet_threshold, "above 0 and below 1")
    for name in ("pictures", "reference"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"--{name} {folder!r} is no folder")
    if arguments.reference is not None:
        from esd_fast.evaluation.pictures import check_picture, picture_files

        found = picture_files(Path(arguments.reference))
        if len(found) < 2:  # a spread is asked for
            least = f"a folder of 2 pictures or more, not {len(found)}"
            refuse("--reference", arguments.reference, least)
        for file in found:
            check_picture(file)
    check_clip(arguments)
    if arguments.inception is not None and not Path(arguments.inception).is_file():
        raise FileNotFoundError(f"--inception {arguments.inception!r} does not exist")


def output_of(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or arguments.pictures or "evaluation")


# --- the pictures --------------------------------------------------------------------------------

Opened = tuple["Drawn", "dict[str, Metric]", dict[str, str]]


def look_at(arguments: argparse.Namespace) -> Opened:
    """Pictures that are there."""
    from esd_fast.evaluation.drawn import read_drawn
    from esd_fast.evaluation.metrics import opened

    drawn = read_drawn(arguments.pictures)
    return drawn, *opened(arguments.metric or (), settings_of(arguments), drawn.embedded)


def draw(arguments: argparse.Namespace) -> Opened:
    """Draws what is not there yet."""
    embedded = is_embedded(arguments.model)
    place = place_of(arguments)
    from esd_fast.erasure import load
    from esd_fast.evaluation.drawn import read_drawn
    from esd_fast.evaluation.gallery import rows_of
    from esd_fast.evaluation.metrics import opened
    from esd_fast.models import load_model

    erasures = [(Path(p), load(p, place.allow_pickle)) for p in arguments.erasures]
    asked = asked_of(arguments, erasures, place, embedded)
    metrics, lacking = opened(arguments.metric or (), settings_of(arguments), embedded)
    model = load_model(arguments.model, place)
    check_erasures(erasures, model)
    rows = [row for row in rows_of(asked.cases, asked.images, arguments.seed) if asked.wants(row)]
    settings = drawing_settings(arguments, model)
    output = output_of(arguments)
    variants = variants_of(output, model, erasures, settings, arguments.strength)
    made, there = draw_all(model.pipeline.to(model.device), rows, variants, settings, arguments)
    tell(f"{made} pictures drawn, {there} were there: {folders(variants)}")
    names = {file.name for row in rows for file in row.files}
    return read_drawn(output, names, [v.folder for v in variants[1:]]), metrics, lacking


def asked_of(
    arguments: argparse.Namespace,
    erasures: Sequence[tuple[Path, Erasure]],
    place: EraseConfig,
    embedded: bool,
) -> Asked:
    """The prompts; of the embedded model it knows some."""
    if arguments.prompt or arguments.prompts:
        return Asked.of(arguments)
    if not embedded:
        raise ValueError("give prompts to draw: --prompts FILE, or --prompt, once or more")
    said = arguments.erased or [str(e.manifest.get("concept", "")) for _, e in erasures]
    return Asked(embedded_cases(said, arguments.seed), arguments.images or 1, None, None, place)


def embedded_cases(said: Sequence[str], seed: int) -> list[Case]:
    """ERASED_IMAGES pictures of each erased concept, KEPT_IMAGES of others."""
    from esd_fast.evaluation.concepts import EMBEDDED, ONE, erased_among
    from esd_fast.evaluation.recognition import erased_questions, kept_questions

    erased = dict.fromkeys(name for concept in said for name in erased_among(concept, EMBEDDED))
    questions = [q for name in erased for q in erased_questions(name, ERASED_IMAGES, seed)]
    questions += kept_questions(list(erased), KEPT_IMAGES, seed)
    return [
        Case(q.shot.prompt, number, q.shot.seed, {ONE: q.concept})
        for number, q in enumerate(questions)
    ]


def settings_of(arguments: argparse.Namespace) -> Settings:
    from esd_fast.evaluation.metrics import Settings
    from esd_fast.models import resolve_device

    return Settings(
        clip=arguments.clip,
        nudenet_threshold=arguments.nudenet_threshold,
        inception=Path(arguments.inception) if arguments.inception else None,
        reference=Path(arguments.reference) if arguments.reference else None,
        download=bool(arguments.metric),
        device=str(resolve_device(arguments.device)),
    )


# --- the answer ----------------------------------------------------------------------------------


def as_text(told: dict[str, Any], page: Path) -> str:
    from esd_fast.evaluation.lines import as_text as table
    from esd_fast.evaluation.lines import lines_of

    parts = []
    for name, erasure in told["erasures"].items():
        groups = erasure["images"]
        erased = ", ".join(erasure["erased"]) or erasure["concept"]
        parts.append(
            f"{name}: {groups.get('erased', 0)} pictures ask for {erased}, "
            f"{groups.get('kept', 0)} for something else"
        )
        lines = [
            line
            for metric, values in told["metrics"].items()
            for line in lines_of(metric, values["by_erasure"][name])
        ]
        parts.append(table(lines))
    parts += [f"{name}: {m['detector']}, {m['version']}" for name, m in told["metrics"].items()]
    parts += [f"not measured: {name}: {text}" for name, text in told["not_measured"].items()]
    return "\n".join([*parts, f"report: {page}"])
