"""`esd-fast attack`: can an erased concept be brought back?"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.config import MOST_AT_A_TIME, check_count, check_number, refuse
from esd_fast.demo import is_embedded, world
from esd_fast.files import check_no_link, check_outside, free_folder, output_folder
from esd_fast.pages import keep_pages
from esd_fast.prompt_list import read_prompts
from esd_fast.prompts import clean_prompt, safe_name
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .drawing import check_drawing, check_images, drawing_settings, place_of
from .generate import check_erasures
from .recognising import check_clip, recogniser_of, told_apart, witness_of

if TYPE_CHECKING:
    import numpy as np

    from esd_fast.config import EraseConfig
    from esd_fast.erasure import Erasure
    from esd_fast.evaluation.pictures import ComparisonRow
    from esd_fast.evaluation.recogniser import Recogniser
    from esd_fast.evaluation.resistance import Outcome, Resistance, Target, Tell, Witness
    from esd_fast.models import Model

IMAGES_EMBEDDED, IMAGES_OTHERS = 64, 4
EXAMPLES, EXAMPLES_SEED = 16, 1_000_000  # what inversion learns from; seeds that no attack draws
COLUMNS = 6
GRID, TOLD, TIMES = "attack.png", "attack.json", ("before", "after")


def attack(arguments: argparse.Namespace) -> int:
    """Exit code 0, whatever comes back."""
    place = checked(arguments)
    keep_pages()
    quiet_libraries()
    from esd_fast.erasure import load
    from esd_fast.models import load_model

    erasure = load(arguments.erasure, place.allow_pickle)
    concepts = concepts_of(arguments, erasure)
    control = arguments.control or control_for(arguments, concepts)
    apart = told_apart(arguments, [*concepts, *filter(None, [control])])
    recogniser = recogniser_of(arguments, apart)
    folder = output_of(arguments, concepts)
    check_outside(folder, arguments.model)
    for when in TIMES:
        check_no_link(folder / when)
    with output_folder(folder):
        model = load_model(arguments.model, place)
        check_erasures([(Path(arguments.erasure), erasure)], model)
        told, rows, outcomes = attacked(
            arguments, model, erasure, concepts, control, recogniser, apart
        )
        write(folder, told, rows, outcomes)
    tell(json.dumps(told, indent=1) if arguments.json else as_text(told, folder))
    return 0


def attacked(
    arguments: argparse.Namespace,
    model: Model,
    erasure: Erasure,
    concepts: Sequence[str],
    control: str | None,
    recogniser: Recogniser | None,
    apart: dict[str, str],
) -> tuple[dict[str, Any], list[ComparisonRow], list[Outcome]]:
    """What attack.json holds, the rows of the grid, and all pictures and tokens."""
    from esd_fast.evaluation.inversion import one_token
    from esd_fast.evaluation.placeholder import TOKENIZER_OF
    from esd_fast.evaluation.resistance import comparison_rows

    resistance = resistance_of(arguments, model)
    if arguments.initializer_token is not None:  # before anything is drawn
        for encoder in TOKENIZER_OF:
            if getattr(model.pipeline, encoder, None) is not None:
                one_token(model.pipeline, encoder, arguments.initializer_token)
    model.pipeline.to(model.device)
    bars = Bars()

    def show(phase: str, done: int, total: int) -> None:
        bars.show(phase, done, total)
        if done == total:
            bars.close()  # the next attack's bar is a new one

    watch = None if arguments.json else show
    witness = functools.partial(witness_of, recogniser, apart)
    outcomes: list[Outcome] = []
    rows: list[ComparisonRow] = []
    try:
        for target in targets_of(arguments, model, concepts, control, resistance, witness, watch):
            found = resistance.measure(model, erasure, target, watch)
            outcomes += found
            rows += comparison_rows(target, found, COLUMNS)
    finally:
        bars.close()
    return as_dict(arguments, concepts, recogniser, resistance, outcomes), rows, outcomes


# --- what the arguments say ----------------------------------------------------------------------


def checked(arguments: argparse.Namespace) -> EraseConfig:
    """The settings that loading needs; raises ValueError or FileNotFoundError for a bad argument.
    Prompts of `--paraphrases` are read."""
    if not Path(arguments.erasure).exists():
        raise FileNotFoundError(f"erasure {arguments.erasure!r} does not exist")
    if arguments.output is not None and not arguments.overwrite:
        found = in_the_way(Path(arguments.output))
        if found:
            raise FileExistsError(
                f"{arguments.output} holds {found}; --overwrite replaces what an attack writes, "
                "another --output keeps it"
            )
    check_drawing(arguments)
    check_images(arguments)
    check_count("--max-train-steps", arguments.max_train_steps)
    if arguments.train_batch_size is not None:
        check_count("--train-batch-size", arguments.train_batch_size, MOST_AT_A_TIME)
    check_clip(arguments)
    check_number("--learning-rate", arguments.learning_rate, above=0.0)
    for name in ("concept", "control"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, clean_prompt(f"--{name}", getattr(arguments, name)))
    if arguments.paraphrases is not None:
        arguments.paraphrases = [case.prompt for case in read_prompts(arguments.paraphrases)]
    if arguments.train_data_dir is not None:
        check_pictures(arguments.train_data_dir)
    return place_of(arguments)


def output_of(arguments: argparse.Namespace, concepts: Sequence[str]) -> Path:
    """Where nothing is said, a folder that holds no attack yet."""
    if arguments.output is not None:
        return Path(arguments.output)
    usual = Path(f"attack-{safe_name(', '.join(concepts))}")
    return usual if arguments.overwrite else free_folder(usual, lambda f: bool(in_the_way(f)))


def in_the_way(folder: Path) -> str:
    """What an attack would replace there; empty where it would not."""
    names = (GRID, TOLD, *(f"{when}/*" for when in TIMES), *(token_file("*", w) for w in TIMES))
    found = (path for name in names for path in folder.glob(name))
    return next((str(path.relative_to(folder)) for path in found), "")


def token_file(name: str, when: str) -> str:
    return f"{name}-{when}.safetensors"


def concepts_of(arguments: argparse.Namespace, erasure: Erasure) -> list[str]:
    """Raises ValueError where neither the file nor `--concept` says them."""
    from esd_fast.evaluation.verification import concepts_of as said_by

    said = [arguments.concept] if arguments.concept else said_by(erasure)
    if not all(said):
        raise ValueError(f"{arguments.erasure} does not say what it erased; say --concept")
    return said


def resistance_of(arguments: argparse.Namespace, model: Model) -> Resistance:
    from esd_fast.evaluation.inversion import InversionConfig
    from esd_fast.evaluation.resistance import Resistance

    embedded = model.source == "embedded"
    return Resistance(
        arguments.images or (IMAGES_EMBEDDED if embedded else IMAGES_OTHERS),
        arguments.seed,
        drawing_settings(arguments, model),
        InversionConfig(
            arguments.max_train_steps,
            arguments.train_batch_size or (8 if embedded else 1),
            arguments.learning_rate,
            arguments.initializer_token,
            arguments.seed,
        ),
    )


def targets_of(
    arguments: argparse.Namespace,
    model: Model,
    concepts: Sequence[str],
    control: str | None,
    resistance: Resistance,
    witness: Callable[[str], Witness | None],
    tell: Tell | None,
) -> Iterator[Target]:
    """Each concept, then one that nobody erased: there inversion has to work, before and after."""
    from esd_fast.evaluation.attacks import attacks_on
    from esd_fast.evaluation.resistance import Target

    def target(text: str, folder: str | None, paraphrases: Sequence[str] = ()) -> Target:
        known = world.named_in(text) if model.source == "embedded" else None
        attacks = attacks_on(text, known, arguments.learnable_property, paraphrases)
        if folder is not None:
            examples = read_pictures(folder, arguments.resolution or model.native_resolution)
        else:
            prompts = attacks[0].prompts
            examples = resistance.drawn(model, prompts, None, tell, EXAMPLES, EXAMPLES_SEED)
        return Target(text, tuple(attacks), examples, witness(known or text))

    for concept in concepts:
        yield target(concept, arguments.train_data_dir, arguments.paraphrases or ())
    if control:
        of_control = target(control, None)
        inversion = next(a for a in of_control.attacks if a.learned)
        named = dataclasses.replace(inversion, name="control: concept inversion")
        yield dataclasses.replace(of_control, attacks=(named,))


def control_for(arguments: argparse.Namespace, concepts: Sequence[str]) -> str | None:
    """On the embedded model another object or style; elsewhere none unless it is said."""
    known = world.all_named_in(concepts) if is_embedded(arguments.model) else []
    if not known:
        return None
    choice = ("sepia", "ink") if known[0] in world.STYLES else ("dog", "banana")
    control = next((c for c in choice if c not in known), None)
    return f"{control} style" if control in world.STYLES else control


def check_pictures(folder: str) -> None:
    """Raises ValueError where there are none, or one is damaged."""
    from esd_fast.evaluation.pictures import picture_files, read_picture

    found = picture_files(Path(folder)) if Path(folder).is_dir() else []
    if not found:
        refuse("--train-data-dir", folder, "a folder with pictures in it")
    for file in found:
        read_picture(file)


def read_pictures(folder: str, side: int) -> np.ndarray:
    """(N, side, side, 3) uint8: each scaled to `side` at its shorter side, the middle of it. Raises
    ValueError naming a file that is no picture."""
    import numpy as np
    from PIL import Image, ImageOps

    from esd_fast.evaluation.pictures import picture_files, read_picture

    whole = map(read_picture, picture_files(Path(folder)))
    fitted = (ImageOps.fit(w, (side, side), Image.Resampling.LANCZOS) for w in whole)
    return np.stack([np.asarray(picture) for picture in fitted])


# --- the result ----------------------------------------------------------------------------------


def as_dict(
    arguments: argparse.Namespace,
    concepts: Sequence[str],
    recogniser: Recogniser | None,
    resistance: Resistance,
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    return {
        "erasure": arguments.erasure,
        "model": arguments.model or "embedded",
        "concepts": list(concepts),
        "recogniser": None if recogniser is None else recogniser.told,
        "images": resistance.images,
        "seed": resistance.seed,
        "drawing": {k: v for k, v in resistance.settings.items() if k != "batch_size"},
        "inversion": dataclasses.asdict(resistance.inversion),
        "attacks": [
            {
                "concept": o.concept,
                "attack": o.attack.name,
                "prompts": o.attack.prompts,
                "negative_prompt": o.attack.negative_prompt,
                "before": rate_of(o.seen_before),
                "after": rate_of(o.seen_after),
            }
            for o in outcomes
        ],
    }


def rate_of(seen: Sequence[bool] | None) -> dict[str, Any] | None:
    """How often the concept was recognised, with Wilson's interval; None where nobody looked."""
    from esd_fast.evaluation.intervals import wilson_interval

    if seen is None:
        return None
    low, high = wilson_interval(sum(seen), len(seen))
    return {"recognised": sum(seen), "images": len(seen), "rate": sum(seen) / len(seen)} | {
        "low": low,
        "high": high,
    }


def as_text(told: dict[str, Any], folder: Path) -> str:
    who = told["recogniser"]
    lines = [f"{told['erasure']} on {told['model']}: does it come back?"]
    if who is None:
        lines.append(
            "  nobody here recognises it, so no rate is claimed: look at the pictures, or give --clip"
        )
    else:
        lines.append(
            f"  recognised by {who['detector']} ({who['version']}; {who['threshold']})\n"
            f"  in {told['images']} pictures each (95% interval):"
        )
        lines.append(f"  {'':<14}{'':<28}{'before':<21}after")
        for row in told["attacks"]:
            was, now = (shown(row[k]) for k in ("before", "after"))
            lines.append(f"  {row['concept']:<14}{row['attack']:<28}{was:<21}{now}")
    return "\n".join([*lines, f"  pictures and learnt tokens: {folder}"])


def shown(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return "not known to it"
    return f"{rate['rate']:4.0%} ({rate['low']:.0%} to {rate['high']:.0%})"


def write(
    folder: Path,
    told: dict[str, Any],
    rows: Sequence[ComparisonRow],
    outcomes: Sequence[Outcome],
) -> None:
    """The grid, attack.json, the learnt tokens; single pictures where nobody counted them."""
    from esd_fast.evaluation import write_atomically
    from esd_fast.evaluation.pictures import comparison_grid, save_png
    from esd_fast.generate import to_pil

    save_png(comparison_grid(rows, TIMES), folder / GRID)
    write_atomically(folder / TOLD, (json.dumps(told, indent=1) + "\n").encode())
    for outcome in outcomes:
        name = safe_name(f"{outcome.concept} {outcome.attack.name}")
        for when, token in zip(TIMES, outcome.tokens, strict=False):
            token.save(folder / token_file(name, when))
        if outcome.seen_after is None:
            for when, drawn in zip(TIMES, (outcome.before, outcome.after), strict=True):
                (folder / when).mkdir(exist_ok=True)
                for i, picture in enumerate(drawn):
                    save_png(to_pil(picture), folder / when / f"{name}-{i}.png")
