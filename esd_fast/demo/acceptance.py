"""Is the embedded model good enough to ship? Asked-for objects and styles, as the judge sees them."""

from __future__ import annotations

from typing import Any

from esd_fast.evaluation.recognition import Answers, answer, erased_questions

from . import world

IMAGES_A_PROMPT = 16
FLOOR = 0.95


def accept(pipeline: Any, judges: tuple[str, ...] = ("judge",)) -> dict[str, Any]:
    """IMAGES_A_PROMPT pictures of every object, four times as many of every style."""
    asked = [q for o in world.OBJECTS for q in erased_questions(o, IMAGES_A_PROMPT)]
    asked += [q for s in world.STYLES for q in erased_questions(s, 4 * IMAGES_A_PROMPT)]
    answers = answer(pipeline, asked, judges)
    return {judge: rates(answers, judge) for judge in judges}


def rates(answers: Answers, judge: str) -> dict[str, Any]:
    by_concept = {c: seen / n for c, (seen, n) in answers.by_concept(judge).items()}
    return {
        "objects": answers.rate(judge, lambda c: c in world.OBJECTS),
        "styles": answers.rate(judge, lambda c: c in world.STYLES),
        "by_concept": by_concept,
    }
