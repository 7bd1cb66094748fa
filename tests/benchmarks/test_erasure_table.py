"""The table of README.md: which concepts, and how rows become percentages."""

import json

import erasure_table
import pytest

from esd_fast.demo import world
from esd_fast.quantize import QUANTIZERS


def base(seed, **kept):
    seen = {c: dict.fromkeys(erasure_table.JUDGES, v) for c, v in kept.items()}
    full = {c: {j: [1, 1, 1, 1] for j in erasure_table.JUDGES} for c in kept}
    return {"seed": seed, "settings": "base", "erased": full, "kept": seen}


def run(concept, seed, erased, kept, **more):
    row = {"concept": concept, "seed": seed, "settings": {}, "seconds": 7.0, "unet_passes": 800}
    judges = erasure_table.JUDGES
    return (
        row | {"erased": dict.fromkeys(judges, erased), "kept": dict.fromkeys(judges, kept)} | more
    )


def cells(table, concept):
    (line,) = [x for x in table.splitlines() if x.startswith(f"| {concept} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_concepts_are_those_of_the_target():
    chosen = erasure_table.table_concepts()
    assert {"cat", "banana"} <= set(chosen)
    assert set(sorted(world.OBJECTS)[::8]) <= set(chosen)
    assert set(world.STYLES) - {world.NEUTRAL_STYLE} <= set(chosen)
    assert world.NEUTRAL_STYLE not in chosen
    assert len(chosen) == len(set(chosen))


def test_kept_is_relative_to_the_base_on_the_same_pictures():
    rows = [
        base(0, cat=[1, 1, 1, 0]),
        base(1, cat=[1, 1, 1, 1]),
        run("cat", 0, erased=[0, 0, 0, 1], kept=[1, 1, 0, 0]),
        run("cat", 1, erased=[0, 0, 0, 0], kept=[1, 1, 1, 1], seconds=9.0),
    ]
    shown = cells(erasure_table.summary(rows), "cat")
    assert shown[1:4] == ["100.0%", "12.5%", f"{6 / 7:.1%}"]
    assert shown[6:] == ["8.0", "800"]


def test_bases_of_separate_runs_are_joined():
    rows = [base(0, cat=[1, 0]), base(0, ink=[1, 1])]
    rows += [run("cat", 0, [0], [1, 0]), run("ink", 0, [1], [0, 1])]
    table = erasure_table.summary(rows)
    assert cells(table, "cat")[3] == "100.0%"
    assert cells(table, "ink")[3] == "50.0%"
    assert cells(table, "**all**")[2] == "50.0%"


def test_recipes_get_a_table_each(tmp_path):
    rows = [base(0, cat=[1]), run("cat", 0, [0], [1])]
    rows.append(run("cat", 0, [1], [1], settings={"learning_rate": 0.1}))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    tables = erasure_table.all_tables(erasure_table.read_rows(file))
    assert "the default recipe" in tables
    assert '`{"learning_rate": 0.1}`' in tables
    assert tables.count("| cat |") == 2


def test_recipes_side_by_side_are_compared_with_the_first():
    low = {"dtype": "bfloat16", "optimizer": "adamw"}
    rows = [
        base(0, cat=[1, 1, 1, 0], ink=[1, 1, 1, 1]),
        run("cat", 0, [0, 0, 0, 1], [1, 1, 0, 0], settings={"dtype": "float32"}),
        run("ink", 0, [0, 0, 0, 0], [1, 1, 1, 1], settings={"dtype": "float32"}),
        run("cat", 0, [0, 0, 0, 0], [1, 1, 1, 0], settings=low),
        run("ink", 0, [0, 0, 0, 0], [1, 1, 1, 0], settings=low),
    ]
    heading, _, cat, _, every, points = erasure_table.side_by_side(rows).splitlines()
    assert heading == "| erased | float32 | bfloat16, adamw |"
    assert cat == f"| cat | 25.0% / {2 / 3:.1%} | 0.0% / 100.0% |"
    assert every == f"| **all** | 12.5% / {6 / 7:.1%} | 0.0% / {6 / 7:.1%} |"
    assert points == "| points from the first | | -12.5 / +0.0 |"


def test_precision_starts_from_float32():
    assert erasure_table.PRECISION[0] == {"dtype": "float32"}
    rest = erasure_table.PRECISION[1:]
    assert all(s["dtype"] != "float32" or s["quantize"] in QUANTIZERS for s in rest)


@pytest.mark.parametrize("concept", erasure_table.SWEEP_CONCEPTS)
def test_styles_are_erased_by_the_words_that_ask_for_them(concept):
    prompt = erasure_table.concept_prompt(concept)
    assert prompt == (f"{concept} style" if concept in world.STYLES else concept)
