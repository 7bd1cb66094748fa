"""Does an erased concept come back? Each attack on the model as it was and on the erased one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from esd_fast.demo import model_path, world
from esd_fast.demo.judge import load_judge
from esd_fast.demo.judge import recognise as judge_sees
from esd_fast.erasure import Erasure, unet_of
from esd_fast.generate import Shot, pictures, to_pil

from .attacks import Attack
from .inversion import InversionConfig, LearnedToken, invert
from .pictures import ComparisonRow
from .placeholder import Placeholder

if TYPE_CHECKING:
    from esd_fast.models import Model

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class ConceptRecogniser(Protocol):
    """Whoever says in which pictures a concept is to be seen."""

    name: str
    """With its version or weights, for the result."""

    def recognise(self, pictures: np.ndarray) -> Sequence[bool]:
        """For each of `pictures` (N, H, W, 3) uint8."""
        ...


class EmbeddedJudge:
    """The embedded model's judge, looking for one of its objects or styles."""

    name = "the embedded model's judge"

    def __init__(self, concept: str) -> None:
        self.concept, self.judge = concept, load_judge(model_path())

    def recognise(self, pictures: np.ndarray) -> Sequence[bool]:
        tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        verdict = judge_sees(self.judge, tensor)
        seen = verdict.styles if self.concept in world.STYLES else verdict.objects
        return [name == self.concept for name in seen]


@dataclass(frozen=True)
class Target:
    """What is to come back: by which attacks, learnt from what, seen by whom."""

    concept: str
    attacks: tuple[Attack, ...]
    examples: np.ndarray
    """(N, H, W, 3) uint8 that show it: what inversion learns from."""
    recogniser: ConceptRecogniser | None = None


@dataclass(frozen=True)
class Outcome:
    """An attack before and after; `seen` None where there was nobody to recognise anything."""

    concept: str
    attack: Attack
    before: np.ndarray  # (N, H, W, 3) uint8
    after: np.ndarray
    seen_before: tuple[bool, ...] | None
    seen_after: tuple[bool, ...] | None
    recogniser: str | None = None
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
        judge = target.recogniser
        return [
            Outcome(
                target.concept,
                attack,
                was,
                now,
                seen_by(judge, was),
                seen_by(judge, now),
                None if judge is None else judge.name,
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


def seen_by(recogniser: ConceptRecogniser | None, drawn: np.ndarray) -> tuple[bool, ...] | None:
    return None if recogniser is None else tuple(map(bool, recogniser.recognise(drawn)))


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
