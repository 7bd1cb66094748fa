"""Rates of several erased concepts and of the rest, counted by hand."""

import many_concepts
from many_concepts import CONCEPTS, NUMBERS, questions, table

from esd_fast.demo import world


def test_concepts_are_sixteen_of_both_kinds():
    assert len(set(CONCEPTS)) == NUMBERS[-1] == 16
    assert {c in world.STYLES for c in CONCEPTS[: NUMBERS[1]]} == {True, False}


def test_rates_are_counted_by_concept_and_kind():
    concepts = CONCEPTS[:4]
    asked = questions(concepts, 0)
    # of the first concept a quarter is still seen, of the others nothing; of other objects half is
    # kept, of other styles everything
    first = [i for i, q in enumerate(asked) if q.concept == concepts[0]]
    objects = [i for i, q in enumerate(asked) if q.concept not in (*concepts, *world.STYLES)]
    seen = [0] * len(asked)
    for i in first[: len(first) // 4]:
        seen[i] = 1
    for i in objects[: len(objects) // 2]:
        seen[i] = 1
    styles = [i for i, q in enumerate(asked) if q.concept in world.STYLES and q.concept != "flat"]
    for i in styles:
        seen[i] = 1
    was = [int(q.concept not in concepts) for q in asked]
    rows = [
        {"number": 4, "recipe": "base", "seed": 0, "concepts": concepts, "seen": {"judge": was}},
        {
            "number": 4,
            "recipe": "default",
            "seed": 0,
            "concepts": concepts,
            "seen": {"judge": seen},
            "unet_passes": 3200,
            "cpu_seconds": 12.4,
        },
    ]
    (line,) = table(rows).splitlines()[2:]
    kept = (len(objects) // 2 + len(styles)) / (len(objects) + len(styles))
    half = len(objects) // 2 / len(objects)
    assert line == (
        f"| 4 | default | 93.8% (75.0%) | {kept:.1%} | {half:.1%} | 100.0% | 3200 | 12 |"
    )


def test_every_recipe_is_a_configuration():
    import esd_fast

    for settings in many_concepts.RECIPES.values():
        known = {k: v for k, v in settings.items() if k != "iterations_each"}
        esd_fast.EraseConfig.from_preset("fast", "cat", **known)
