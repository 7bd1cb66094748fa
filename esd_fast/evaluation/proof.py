"""Pictures before and after, and (on the embedded model) what its judge recognises in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esd_fast.demo import world
from esd_fast.generate import Shot, pictures, to_pil

from .pictures import GridRow
from .recognition import Question, erased_questions, judged, kept_questions

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.models import Model

ERASED_IMAGES, KEPT_IMAGES = 32, 64
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

    @property
    def shots(self) -> list[Shot]:
        grid = [Shot(prompt, seed) for prompt, _ in self.prompts for seed in range(self.columns)]
        return grid + [q.shot for q in (*self.erased, *self.kept)]

    def draw(self, pipeline: Any, on_progress: Callable[[int, int], None]) -> list[np.ndarray]:
        home = pipeline.unet.device
        if not self.shots:
            return []
        places = {n: c.device for n, c in parts_to_place(pipeline).items()}
        for part in parts_to_place(pipeline).values():
            part.to(home)
        drawn = list(
            pictures(
                pipeline,
                self.shots,
                guidance_scale=self.guidance_scale,
                resolution=self.resolution,
                batch_size=self.batch_size,
                on_progress=on_progress,
            )
        )
        for name, place in places.items():
            getattr(pipeline, name).to(place)
        return drawn

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

        def share(seen: Sequence[bool]) -> float:
            return sum(seen) / len(seen)

        return {
            "erased": {"before": share(was[:n]), "after": share(now[:n]), "images": n},
            "kept": {
                "before": share(was[n:]),
                "after": share(now[n:]),
                "images": len(self.kept),
                "by_concept": by_concept(self.kept, was[n:], now[n:]),
            },
        }


def by_concept(
    questions: Sequence[Question], was: Sequence[bool], now: Sequence[bool]
) -> dict[str, dict[str, float]]:
    table = {}
    for concept in sorted({q.concept for q in questions}):
        rows = [i for i, q in enumerate(questions) if q.concept == concept]
        table[concept] = {
            "before": sum(was[i] for i in rows) / len(rows),
            "after": sum(now[i] for i in rows) / len(rows),
            "images": len(rows),
        }
    return table


def parts_to_place(pipeline: Any) -> dict[str, Any]:
    """What drawing needs on the UNet's device besides the UNet."""
    names = [n for n in pipeline.components if n == "vae" or n.startswith("text_encoder")]
    return {n: getattr(pipeline, n) for n in names if getattr(pipeline, n) is not None}


def proof_for(
    model: Model, config: EraseConfig, columns: int, keep_prompts: Sequence[str]
) -> Proof:
    """The embedded model's concepts are judged; other models get the grid alone."""
    embedded = model.source == "embedded"
    known = world.named_in(config.concept) if embedded else None
    prompts = embedded_rows(known) if known else other_rows(config.concept, keep_prompts)
    return Proof(
        prompts=tuple(prompts),
        columns=columns,
        erased=tuple(erased_questions(known, ERASED_IMAGES, config.seed)) if known else (),
        kept=tuple(kept_questions(known, KEPT_IMAGES, config.seed)) if known else (),
        guidance_scale=GUIDANCE_EMBEDDED if embedded else GUIDANCE_OTHERS,
        resolution=config.resolution,
        batch_size=64 if embedded else 1,
    )


def embedded_rows(concept: str) -> list[tuple[str, str]]:
    """Two rows of what goes, one style and three objects that stay."""
    style = next(s for s in ("ink", "sepia") if s != concept)
    objects = [o for o in ("dog", "banana", "house", "rocket") if o != concept]
    if concept in world.STYLES:
        gone = [f"{concept} style", f"a dog in {concept} style"]
    else:
        gone = [f"a {concept}", f"a {concept} in {style} style"]
    kept = [f"a {objects[0]}", f"a {objects[1]}", f"a {objects[2]} in {style} style"]
    return (
        [(p, "erased") for p in gone] + [(f"{style} style", "style")] + [(p, "kept") for p in kept]
    )


def other_rows(concept: str, keep_prompts: Sequence[str]) -> list[tuple[str, str]]:
    return [(concept, "erased"), *((p, "kept") for p in keep_prompts)]
