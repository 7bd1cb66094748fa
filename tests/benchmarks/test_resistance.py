"""The table counts what the rows say."""

from typing import Any

import resistance as suite


def row(concept: str, recipe: str, inverted: list[int]) -> dict[str, Any]:
    return {
        "concept": concept,
        "recipe": recipe,
        "seed": 0,
        "seconds": 8.0,
        "unet_passes": 800,
        "attacks": {"no attack": [0, 0], "paraphrases": [0, 1], "concept inversion": inverted},
        "erased": [0, 0, 0, 1],
        "same_domain": [1, 1],
        "other_domain": [1, 0],
    }


def test_rates_and_medians() -> None:
    rows = [row("cat", "fast", [1, 1]), row("flat", "fast", [0, 0]), row("key", "fast", [1, 0])]
    table = suite.table(rows).splitlines()
    assert table[2].startswith("| cat | fast | 8 | 800 | 75.0% | 100.0% | 50.0% | 50% (9% to 91%)")
    assert table[2].endswith("100% (34% to 100%) |")
    assert table[-1].startswith("| **median** | fast | 8 | 800 | 75.0% | 100.0% | 50.0% |")
    assert table[-1].endswith("| 50% | 50% |")


def test_recipes_in_their_order_and_no_median_of_what_was_not_run() -> None:
    rows = [row("cat", "fast, hardened", [1, 1]), row("cat", "fast", [1, 0])]
    rows += [row("flat", "fast", [0, 0]), row("cat", "base", [1, 1]), row("flat", "base", [1, 1])]
    lines = [line.split(" | ")[:2] for line in suite.table(rows).splitlines()[2:]]
    assert lines == [
        *(["| cat", recipe] for recipe in ("base", "fast", "fast, hardened")),
        *(["| flat", recipe] for recipe in ("base", "fast")),
        *(["| **median**", recipe] for recipe in ("base", "fast")),
    ]


def test_concepts_are_of_both_kinds() -> None:
    from esd_fast.demo import world

    assert set(suite.CONCEPTS) & set(world.OBJECTS)
    assert set(suite.CONCEPTS) & set(world.STYLES)
