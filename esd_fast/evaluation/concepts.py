"""Which concepts a prompt asks for, and which of them an erasure is of."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from esd_fast.demo import world

OBJECT, STYLE = "object", "style"  # UnlearnCanvas's two domains
Concepts = Mapping[str, str]  # name -> domain
# columns of prompt lists whose cells name what the picture asks for; the reference's among them
COLUMNS = {"object": OBJECT, "class": OBJECT, "style": STYLE, "artist": STYLE}
ONE = "concept"  # a column that names the one concept which the picture is asked about
EMBEDDED: Concepts = {**dict.fromkeys(world.OBJECTS, OBJECT), **dict.fromkeys(world.STYLES, STYLE)}


def gathered(
    objects: Sequence[str],
    styles: Sequence[str],
    columns: Sequence[Mapping[str, str]],
    embedded: bool,
) -> dict[str, str]:
    """All that can be asked about: what was named, what the lists' columns name, and the embedded
    model's world. Names that differ in case alone are one."""
    found = dict(EMBEDDED) if embedded else {}
    found |= dict.fromkeys(objects, OBJECT) | dict.fromkeys(styles, STYLE)
    for cells in columns:
        for column, domain in {**COLUMNS, ONE: OBJECT}.items():
            if name := cells.get(column, "").strip():
                found.setdefault(name, domain)
    once: dict[str, str] = {}
    for name in found:
        once.setdefault(name.casefold(), name)
    return {name: found[name] for name in once.values()}


def asked(prompt: str, columns: Mapping[str, str], concepts: Concepts) -> tuple[str, ...]:
    """What the picture asks for: what its columns say, or else the concepts that its prompt names."""
    by_name = {name.casefold(): name for name in concepts}
    said = [columns[c].strip().casefold() for c in (ONE, *COLUMNS) if columns.get(c, "").strip()]
    if said:
        chosen = said[:1] if columns.get(ONE, "").strip() else said
        return tuple(by_name[name] for name in chosen if name in by_name)
    return named(prompt, concepts)


def named(text: str, names: Collection[str]) -> tuple[str, ...]:
    """The names that stand in `text` as whole words; "a fire truck" names no "truck" where "fire
    truck" is one of them."""
    found = set()
    for name in sorted(names, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
        text, count = re.subn(pattern, "\0", text, flags=re.IGNORECASE)
        if count:
            found.add(name)
    return tuple(name for name in names if name in found)


def erased_among(concept: str, concepts: Concepts) -> tuple[str, ...]:
    """Those that an erasure of `concept` is of: "ink style" is of ink, "Van Gogh" of Vincent van
    Gogh."""
    return named(concept, concepts) or tuple(c for c in concepts if named(c, [concept]))


def with_erased(concepts: Concepts, erased: Sequence[str], domain: str = OBJECT) -> dict[str, str]:
    """And those of `erased` that name none of them: of `domain`, or "... style" as a style."""
    found = dict(concepts)
    for concept in erased:
        if concept and not erased_among(concept, found):
            found[concept] = STYLE if concept.casefold().endswith("style") else domain
    return found
