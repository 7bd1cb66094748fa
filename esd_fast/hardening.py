"""Hardening: what concept inversion finds against the erased model is erased as well, in rounds.

Erase; learn a token that brings the concept back (evaluation/inversion.py); erase again, from the
model's own weights, the concept and all tokens found so far. Adversarial training in its plainest
form; its price is an inversion and a longer erasure each round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .demo import world
from .esd import EraseInterrupted, Progress, run
from .evaluation.attacks import OBJECT, attacks_on
from .evaluation.inversion import InversionConfig, LearnedToken, invert
from .evaluation.placeholder import Placeholder
from .evaluation.proof import GUIDANCE_EMBEDDED, GUIDANCE_OTHERS
from .generate import Shot, pictures
from .live import parts_to_place
from .models.text import visiting

if TYPE_CHECKING:
    from .config import EraseConfig
    from .erasure import Erasure
    from .models import Conditioning, Model


EXAMPLES = 16
SEED = 2_000_000  # other pictures and draws than those that `esd-fast attack` measures with


@dataclass(frozen=True)
class Adversary:
    """Of one concept: what inversion learns from, and is asked with."""

    examples: np.ndarray
    """(N, H, W, 3) uint8 that show it."""
    templates: tuple[str, ...]
    """With {} where the token goes; the last one is what is erased with the token in it."""


def harden(
    model: Model,
    config: EraseConfig,
    rounds: int,
    adversaries: Sequence[Adversary],
    inversion: InversionConfig | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> Erasure:
    """`run` with `rounds` rounds of hardening, an adversary for each concept; `config.iterations`
    of the first run are taken once more for each round so far.

    The manifest's "hardening" says rounds, seconds, UNet passes, and each round's inversion loss.
    Raises as `run` does; EraseInterrupted has the last round's erasure.
    """
    inversion = inversion or InversionConfig(seed=SEED)
    started, passes = time.perf_counter(), 0
    losses: list[list[float]] = []
    extra: list[Conditioning] = []
    erasure = run(model, config, on_progress=on_progress)
    for number in range(rounds):
        passes += erasure.manifest["unet_passes"]["total"]
        seeded = dataclasses.replace(inversion, seed=inversion.seed + number)
        try:
            found = [learnt(model, a, seeded, on_progress) for a in adversaries]
        except KeyboardInterrupt:
            raise EraseInterrupted(erasure) from None
        finally:
            erasure.revert(model.pipeline)
        passes += 2 * len(found) * inversion.steps * inversion.batch_size  # forward and backward
        losses.append([token.losses[-1] for token, _ in found])
        extra += [asked for _, asked in found]
        longer = dataclasses.replace(
            config, iterations=config.iterations * (1 + len(extra) // len(config.concepts))
        )
        erasure = run(model, longer, extra=extra, on_progress=on_progress)
    erasure.manifest["hardening"] = {
        "rounds": rounds,
        "inversion": dataclasses.asdict(inversion),
        "inversion_losses": losses,
        "seconds": time.perf_counter() - started,
        "unet_passes": passes + erasure.manifest["unet_passes"]["total"],
    }
    return erasure


def learnt(
    model: Model,
    adversary: Adversary,
    config: InversionConfig,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[LearnedToken, Conditioning]:
    """A token that works on `model` as it is, and the prompt (1, ...) with it."""

    def tell(step: int, loss: float) -> None:
        if on_progress:
            on_progress(Progress("invert", step + 1, config.steps, loss))

    placeholder = Placeholder.beside(model.pipeline, adversary.templates)
    token = invert(model, adversary.examples, adversary.templates, placeholder, config, tell)
    prompt = adversary.templates[-1].format(placeholder.word)
    resolution = adversary.examples.shape[1]
    with placeholder.meaning(model.pipeline, token.vectors):
        return token, model.family.encode(model.pipeline, prompt, resolution)


def drawn_adversary(
    model: Model,
    concept: str,
    learnable_property: str = OBJECT,
    resolution: int | None = None,
    num_inference_steps: int = 15,
    on_progress: Callable[[int, int], None] | None = None,
) -> Adversary:
    """From EXAMPLES pictures that `model` draws of `concept` as it is. `learnable_property`:
    "object" or "style"; of what the embedded model knows, what it is."""
    embedded = model.source == "embedded"
    known = world.named_in(concept) if embedded else None
    plain, *_, inversion = attacks_on(concept, known, learnable_property)
    shots = [Shot(plain.prompts[i % len(plain.prompts)], SEED + i) for i in range(EXAMPLES)]
    with visiting(model.device, *parts_to_place(model.pipeline).values()):
        drawn = pictures(
            model.pipeline,
            shots,
            num_inference_steps=num_inference_steps,
            guidance_scale=GUIDANCE_EMBEDDED if embedded else GUIDANCE_OTHERS,
            resolution=resolution,
            batch_size=EXAMPLES if embedded else 1,
            on_progress=on_progress,
        )
        return Adversary(np.stack(list(drawn)), inversion.prompts)
