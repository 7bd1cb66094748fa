"""Is the embedded model good enough to ship? Asked-for objects and styles, as the judge sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from esd_fast.evaluation.recognition import Answers, answer, erased_questions
from esd_fast.generate import Shot, pictures

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


def contact_sheet(pipeline: Any) -> Image.Image:
    """Every object in every style, one picture each, for a person to name."""
    shots = [
        Shot(world.compose(world.STYLED_FORMS[0], object, style), seed)
        for seed, object in enumerate(world.OBJECTS)
        for style in world.STYLES
    ]
    drawn = np.stack(list(pictures(pipeline, shots)))  # (objects * styles, 64, 64, 3)
    across, styles, side = 4, len(world.STYLES), drawn.shape[1]  # objects a line
    lines = -(-len(world.OBJECTS) // across)
    blank = np.full((lines * across * styles - len(drawn), *drawn.shape[1:]), 255, drawn.dtype)
    tiles = np.concatenate([drawn, blank]).reshape(lines, across * styles, side, side, 3)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(lines * side, across * styles * side, 3)
    return Image.fromarray(sheet)
