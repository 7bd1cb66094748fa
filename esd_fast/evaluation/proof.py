"""Pictures before and after, and (on the embedded model) what its judge recognises in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esd_fast.demo import world
from esd_fast.generate import Shot, pictures, to_pil
from esd_fast.live import parts_to_place

from .intervals import before_after
from .pictures import GridRow
from .recognition import Question, erased_questions, judged, kept_questions

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.models import Model

ERASED_IMAGES, KEPT_IMAGES = 32, 64
FEWEST_IMAGES = 8  # of each of many erased concepts
ERASED_ROWS = 8  # of the grid, at most
STYLES_SHOWN, OBJECTS_SHOWN = ("ink", "sepia"), ("dog", "banana", "house", "rocket")
GUIDANCE_EMBEDDED, GUIDANCE_OTHERS = 4.0, 7.5


@dataclass(frozen=True)
class Proof:
    """What is drawn twice from the same seeds: grid rows, then questions for the judge."""

    prompts: tuple[tuple[str, str], ...]  # (prompt, kind) a row
    columns: int
    erased: tuple[Question, ...]
    kept: tuple[Question, ...]
    guidance_scale: float
    resolution: int | None
    batch_size: int
    preserved: tuple[str, ...] = ()
    """Prompts that were to stay; the concepts that they name are counted apart, too."""

    @property
    def shots(self) -> list[Shot]:
        grid = [Shot(prompt, seed) for prompt, _ in self.prompts for seed in range(self.columns)]
        return grid + [q.shot for q in (*self.erased, *self.kept)]

    def draw(self, pipeline: Any, on_progress: Callable[[int, int], None]) -> list[np.ndarray]:
        if not self.shots:
            return []
        with at_home(pipeline):
            return list(
                pictures(
                    pipeline,
                    self.shots,
                    guidance_scale=self.guidance_scale,
                    resolution=self.resolution,
                    batch_size=self.batch_size,
                    on_progress=on_progress,
                )
            )

    def rows(self, before: list[np.ndarray], after: list[np.ndarray]) -> list[GridRow]:
        return [
            GridRow(
                prompt,
                kind,
                [to_pil(p) for p in before[i * self.columns : (i + 1) * self.columns]],
                [to_pil(p) for p in after[i * self.columns : (i + 1) * self.columns]],
            )
            for i, (prompt, kind) in enumerate(self.prompts)
            if self.columns
        ]

    def apart(self, was: Sequence[bool], now: Sequence[bool]) -> dict[str, Any]:
        """Of the kept concepts those that were preserved, and those that were only not erased."""
        if not self.preserved:
            return {}
        named = named_by(self.preserved)
        groups: dict[str, list[int]] = {"preserved": [], "not_preserved": []}
        for row, question in enumerate(self.kept):
            groups["preserved" if question.concept in named else "not_preserved"].append(row)
        return {
            name: before_after([was[i] for i in rows], [now[i] for i in rows])
            for name, rows in groups.items()
        }

    def results(self, before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, Any]:
        """`erased` and `kept` of the report; empty where there is no judge to ask."""
        if not self.erased:
            return {}
        questions = (*self.erased, *self.kept)
        first = len(self.prompts) * self.columns
        was, now = (
            judged(np.stack(drawn[first:]), questions, ("judge",)).seen["judge"]
            for drawn in (before, after)
        )
        n = len(self.erased)

        return {
            "erased": {
                **before_after(was[:n], now[:n]),
                "by_concept": by_concept(self.erased, was[:n], now[:n]),
            },
            "kept": {
                **before_after(was[n:], now[n:]),
                **self.apart(was[n:], now[n:]),
                "by_concept": by_concept(self.kept, was[n:], now[n:]),
            },
        }


def named_by(prompts: Sequence[str]) -> set[str]:
    """Objects and styles of the embedded model's world."""
    words = {word for prompt in prompts for word in prompt.lower().split()}
    return words & {*world.OBJECTS, *world.STYLES}


def by_concept(
    questions: Sequence[Question], was: Sequence[bool], now: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    table = {}
    for concept in sorted({q.concept for q in questions}):
        rows = [i for i, q in enumerate(questions) if q.concept == concept]
        table[concept] = before_after([was[i] for i in rows], [now[i] for i in rows])
    return table


@contextmanager
def at_home(pipeline: Any) -> Iterator[None]:
    """Within: what drawing needs is on the UNet's device; after: where it was."""
    home = pipeline.unet.device
    places = {n: c.device for n, c in parts_to_place(pipeline).items()}
    try:
        for part in parts_to_place(pipeline).values():
            part.to(home)
        yield
    finally:
        for name, place in places.items():
            getattr(pipeline, name).to(place)


def proof_for(
    model: Model, config: EraseConfig, columns: int, keep_prompts: Sequence[str]
) -> Proof:
    """The embedded model's concepts are judged; other models get the grid alone."""
    embedded = model.source == "embedded"
    known = world.all_named_in(config.concepts) if embedded else []
    each = max(ERASED_IMAGES // max(1, len(known)), FEWEST_IMAGES)
    prompts = embedded_rows(known) if known else other_rows(config.concepts, keep_prompts)
    return Proof(
        prompts=tuple(prompts),
        columns=columns,
        erased=tuple(q for c in known for q in erased_questions(c, each, config.seed)),
        kept=tuple(kept_questions(known, KEPT_IMAGES, config.seed)) if known else (),
        guidance_scale=GUIDANCE_EMBEDDED if embedded else GUIDANCE_OTHERS,
        resolution=config.resolution,
        batch_size=64 if embedded else 1,
        preserved=tuple(config.preserve),
    )


def embedded_rows(concepts: Sequence[str]) -> list[tuple[str, str]]:
    """What goes, in two rows (a row each, where there are several), one style and three objects
    that stay."""
    style, *_ = (*(s for s in (*STYLES_SHOWN, *world.STYLES) if s not in concepts), "")
    objects = [o for o in (*OBJECTS_SHOWN, *world.OBJECTS) if o not in concepts]
    in_style = f" in {style} style" if style else ""
    if len(concepts) > 1:
        gone = [f"{c} style" if c in world.STYLES else f"a {c}" for c in concepts[:ERASED_ROWS]]
    elif concepts[0] in world.STYLES:
        gone = [f"{concepts[0]} style", f"a dog in {concepts[0]} style"]
    else:
        gone = [f"a {concepts[0]}", f"a {concepts[0]}{in_style}"]
    kept = [f"a {o}{s}" for o, s in zip(objects, ("", "", in_style), strict=False)]
    styles = [(f"{style} style", "style")] if style else []
    return [(p, "erased") for p in gone] + styles + [(p, "kept") for p in kept]


def other_rows(concepts: Sequence[str], keep_prompts: Sequence[str]) -> list[tuple[str, str]]:
    gone = [(concept, "erased") for concept in concepts[:ERASED_ROWS]]
    return [*gone, *((p, "kept") for p in keep_prompts)]
