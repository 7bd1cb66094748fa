"""Is the erased concept gone, are the others kept? Asked of the embedded model's judge."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esd_fast.demo import model_path, world
from esd_fast.demo.judge import Verdict, load_judge, recognise
from esd_fast.generate import Shot, pictures

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 4.0


@dataclass(frozen=True)
class Question:
    """A picture and the object or style that its caption asks for."""

    shot: Shot
    concept: str


def erased_questions(concept: str, count: int, seed: int = 0) -> list[Question]:
    """`count` pictures of the concept: every form of caption in turn."""
    rng = random.Random(f"erased {concept} {seed}")
    forms = world.captions_of(concept)
    rng.shuffle(forms)
    return [ask(forms[i % len(forms)], concept, rng) for i in range(count)]


def kept_questions(erased: str | Sequence[str], count: int, seed: int = 0) -> list[Question]:
    """`count` pictures of other concepts, none of whose captions names `erased` (or one of it).

    The first ones that qualify of a pool that depends on the seed alone, so that runs which erase
    different concepts are asked about the same pictures.
    """
    names = {erased} if isinstance(erased, str) else {*erased}
    qualify = (q for q in pool(seed) if names.isdisjoint(q.shot.prompt.split()))
    return list(itertools.islice(qualify, count))


def pool(seed: int) -> Iterator[Question]:
    """Endless questions: the objects in turn, every third time a style."""
    rng = random.Random(f"kept {seed}")
    objects, styles = (shuffled_cycle(list(n), rng) for n in (world.OBJECTS, world.STYLES))
    for i in itertools.count():
        concept = next(styles) if i % 3 == 2 else next(objects)
        yield ask(rng.choice(world.captions_of(concept)), concept, rng)


def ask(caption: str, concept: str, rng: random.Random) -> Question:
    return Question(Shot(caption, rng.randrange(2**31)), concept)


def shuffled_cycle(names: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(names, len(names))


@dataclass(frozen=True)
class Answers:
    """For each question: did each judge see what the caption asked for?"""

    questions: tuple[Question, ...]
    seen: dict[str, tuple[bool, ...]]  # by judge

    def rate(self, judge: str = "judge", where: Callable[[str], bool] = bool) -> float:
        """Share recognised among the questions whose concept satisfies `where`."""
        picked = [
            s for s, q in zip(self.seen[judge], self.questions, strict=True) if where(q.concept)
        ]
        return sum(picked) / max(1, len(picked))

    def by_concept(self, judge: str = "judge") -> dict[str, tuple[int, int]]:
        """concept -> (recognised, images)"""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for seen, question in zip(self.seen[judge], self.questions, strict=True):
            counts[question.concept][0] += seen
            counts[question.concept][1] += 1
        return {c: (n[0], n[1]) for c, n in sorted(counts.items())}


def answer(
    pipeline: Any,
    questions: Sequence[Question],
    judges: Sequence[str] = ("judge",),
    on_progress: Callable[[int, int], None] | None = None,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    batch_size: int = 64,
) -> Answers:
    """Draw every question's picture and show it to the judges."""
    drawn = np.stack(
        list(
            pictures(
                pipeline,
                [q.shot for q in questions],
                num_inference_steps=num_inference_steps,
                guidance_scale=GUIDANCE_SCALE,
                on_progress=on_progress,
                batch_size=batch_size,
            )
        )
    )
    return judged(drawn, questions, judges)


def judged(drawn: np.ndarray, questions: Sequence[Question], judges: Sequence[str]) -> Answers:
    """`drawn` (N, 64, 64, 3) uint8, one picture a question."""
    tensor = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = {
        name: recognised(recognise(load_judge(model_path(), name), tensor), questions)
        for name in judges
    }
    return Answers(tuple(questions), seen)


def recognised(verdict: Verdict, questions: Sequence[Question]) -> tuple[bool, ...]:
    return tuple(
        q.concept == (style if q.concept in world.STYLES else object)
        for q, object, style in zip(questions, verdict.objects, verdict.styles, strict=True)
    )
