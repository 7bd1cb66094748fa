"""Does an erased concept come back? Each attack on the model as it was and on the erased one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esd_fast.erasure import Erasure, unet_of
from esd_fast.generate import Shot, pictures, to_pil

from .attacks import Attack
from .inversion import InversionConfig, LearnedToken, invert
from .pictures import ComparisonRow
from .placeholder import Placeholder
from .recogniser import Recogniser

if TYPE_CHECKING:
    from esd_fast.models import Model

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Witness:
    """Whoever says in which pictures the concept is to be seen."""

    recogniser: Recogniser
    concept: str
    """As the recogniser knows it: "ink" where "ink style" was erased."""

    def sees(self, drawn: np.ndarray) -> tuple[bool, ...]:
        """For each of `drawn` (N, H, W, 3) uint8."""
        return tuple(self.recogniser.shows([*drawn], [self.concept])[:, 0].tolist())


@dataclass(frozen=True)
class Target:
    """What is to come back: by which attacks, learnt from what, seen by whom."""

    concept: str
    attacks: tuple[Attack, ...]
    examples: np.ndarray
    """(N, H, W, 3) uint8 that show it: what inversion learns from."""
    witness: Witness | None = None


@dataclass(frozen=True)
class Outcome:
    """An attack before and after; `seen` None where there was nobody to recognise anything."""

    concept: str
    attack: Attack
    before: np.ndarray  # (N, H, W, 3) uint8
    after: np.ndarray
    seen_before: tuple[bool, ...] | None
    seen_after: tuple[bool, ...] | None
    tokens: tuple[LearnedToken, ...] = ()
    """Before and after; empty where nothing is learnt."""


@dataclass(frozen=True)
class Resistance:
    """How a model is attacked."""

    images: int
    """Pictures of each attack."""
    seed: int
    settings: dict[str, Any]
    """Of `esd_fast.generate.pictures`."""
    inversion: InversionConfig

    def measure(
        self, model: Model, erasure: Erasure, target: Target, tell: Tell | None = None
    ) -> list[Outcome]:
        """Every attack on `model` as it is, then with `erasure` in place. The model is left as it
        was, whatever happens."""
        before = [self.attacked(model, a, target.examples, tell) for a in target.attacks]
        with in_place(erasure, model):
            after = [self.attacked(model, a, target.examples, tell) for a in target.attacks]
        sees = target.witness.sees if target.witness else lambda _: None
        return [
            Outcome(
                target.concept,
                attack,
                was,
                now,
                sees(was),
                sees(now),
                tuple(token for token in (then, later) if token is not None),
            )
            for attack, (was, then), (now, later) in zip(target.attacks, before, after, strict=True)
        ]

    def attacked(
        self, model: Model, attack: Attack, examples: np.ndarray, tell: Tell | None = None
    ) -> tuple[np.ndarray, LearnedToken | None]:
        """The attack's pictures (N, H, W, 3) of the model as it is, and the token of inversion."""
        if not attack.learned:
            return self.drawn(model, attack.prompts, attack.negative_prompt, tell), None
        placeholder = Placeholder.beside(model.pipeline, attack.prompts)
        steps = self.inversion.steps
        token = invert(
            model,
            examples,
            attack.prompts,
            placeholder,
            self.inversion,
            (lambda step, _: tell("invert", step + 1, steps)) if tell else None,
        )
        prompts = [template.format(placeholder.word) for template in attack.prompts]
        with placeholder.meaning(model.pipeline, token.vectors):
            return self.drawn(model, prompts, None, tell), token

    def drawn(
        self,
        model: Model,
        prompts: Sequence[str],
        negative_prompt: str | None = None,
        tell: Tell | None = None,
        images: int | None = None,
        first_seed: int | None = None,
    ) -> np.ndarray:
        """(N, H, W, 3) uint8: the prompts in turn, each picture with a seed of its own."""
        seed = self.seed if first_seed is None else first_seed
        shots = [Shot(prompts[i % len(prompts)], seed + i) for i in range(images or self.images)]
        stream = pictures(
            model.pipeline,
            shots,
            negative_prompt=negative_prompt,
            on_progress=(lambda done, total: tell("draw", done, total)) if tell else None,
            **self.settings,
        )
        return np.stack(list(stream))


@contextmanager
def in_place(erasure: Erasure, model: Model) -> Iterator[None]:
    """Within: `model` has the erasure; after: its own weights. A copy is put on, since the caller's
    may be in place somewhere already, and would be taken off."""
    unet = unet_of(model.pipeline)
    trial = Erasure(erasure.tensors, erasure.manifest)
    trial.apply(unet)
    try:
        yield
    finally:
        trial.revert(unet)


def comparison_rows(
    target: Target, outcomes: Sequence[Outcome], columns: int
) -> list[ComparisonRow]:
    """A row an attack, before and after; above the first that learns, what it learns from."""
    rows = []
    for outcome in outcomes:
        if outcome.tokens:
            learnt_from = [to_pil(p) for p in target.examples[:columns]]
            rows.append(ComparisonRow(f"{outcome.concept}: learnt from", "", (learnt_from, [])))
        both = [[to_pil(p) for p in d[:columns]] for d in (outcome.before, outcome.after)]
        rows.append(ComparisonRow(outcome.attack.name, note_of(outcome), both))
    return rows


def note_of(outcome: Outcome) -> str:
    was, now = outcome.seen_before, outcome.seen_after
    if was is None or now is None:
        return ""
    return f"{sum(was) / len(was):.0%}, then {sum(now) / len(now):.0%}"
