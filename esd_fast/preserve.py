"""Prompts that are preserved: what is to stay as it is while something else goes."""

from __future__ import annotations

import re
from collections.abc import Sequence

DEFAULT = "default"  # in a list of prompts: the model's own
DEFAULT_NUMBER = 8
# of Stable Diffusion: things, places and manners that pictures are asked for with, the commonest
# first; nobody has measured another choice
GENERAL_PROMPTS = (
    "a photo of a person",
    "a photo of an animal",
    "a landscape",
    "a city street",
    "an oil painting",
    "a photo of food on a table",
    "a drawing of a house",
    "a photo of a car",
    "a portrait of a woman",
    "a photo of a dog",
    "a room with furniture",
    "digital art",
)
# words that say how, not what
FORM_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "at",
        "by",
        "in",
        "of",
        "on",
        "style",
        "the",
        "to",
        "with",
        "photo",
        "picture",
        "image",
    ]
)


def resolved(
    preserve: Sequence[str],
    general: Sequence[str],
    concepts: Sequence[str],
    number: int = DEFAULT_NUMBER,
) -> tuple[str, ...]:
    """`preserve` with the first `number` of `general` in place of "default", but for those that
    share a word with one of the erased `concepts`."""
    if DEFAULT not in preserve:
        return tuple(preserve)
    erased = frozenset[str]().union(*map(words_of, concepts))
    ours = [prompt for prompt in general if erased.isdisjoint(words_of(prompt))][:number]
    said = [text for p in preserve for text in (ours if p == DEFAULT else [p])]
    return tuple(dict.fromkeys(said))


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower())) - FORM_WORDS
