"""Does the quality hold as more concepts are erased at once? On the embedded model, objects and styles mixed.

    python benchmarks/many_concepts.py                # the committed rows
    python benchmarks/many_concepts.py --show FILE    # the table of measured rows, nothing is run

Every run is one row of a JSON-lines file; runs that are there are skipped, so it can be stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import erasure_table
from tqdm import tqdm

import esd_fast
from esd_fast.demo import world
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions

FILE = erasure_table.RESULTS / "many_concepts.jsonl"
JUDGE = erasure_table.JUDGES[0]
OBJECTS = sorted(world.OBJECTS)[::3][:14]  # of 44, all over the alphabet
CONCEPTS = (*OBJECTS[:3], "flat", *OBJECTS[3:], "ink")
NUMBERS = (1, 4, 16)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "half the iterations": {"iterations_each": 100},
    "preserved": {"preserve": "default"},
    "esd-x": {"train_method": "esd-x"},
}
FEWEST, ERASED, KEPT = 8, 48, 120  # pictures of an erased concept, of all of them, of others


def questions(concepts: Sequence[str], seed: int) -> list[Question]:
    """Those about what is erased first."""
    each = max(FEWEST, ERASED // len(concepts))
    erased = [q for c in concepts for q in erased_questions(c, each, seed)]
    return [*erased, *kept_questions(concepts, KEPT, seed)]


def measure(number: int, recipe: str | None, seed: int) -> dict[str, Any]:
    """One erasure, or without a recipe the model as it is."""
    concepts, told = CONCEPTS[:number], {}
    drawing = erasure_table.base_model()
    if recipe is not None:
        settings = dict(RECIPES[recipe])
        if each := settings.pop("iterations_each", None):
            settings["iterations"] = each * number
        config = esd_fast.EraseConfig.from_preset(
            "fast", [erasure_table.concept_prompt(c) for c in concepts], seed=seed, **settings
        )
        told = erasure_table.erased_onto(drawing, config)
    seen = erasure_table.judge_all(drawing.pipeline, questions(concepts, seed))
    return {**key_of(number, recipe, seed), "concepts": concepts, **told, "seen": seen}


def key_of(number: int, recipe: str | None, seed: int) -> dict[str, Any]:
    return {
        "number": number,
        "recipe": recipe or "base",
        "seed": seed,
        "drawn_in": str(erasure_table.drawing_dtype()).removeprefix("torch."),
    }


def run_all(recipes: Sequence[str], seed: int, file: Path) -> list[dict[str, Any]]:
    rows = erasure_table.read_rows(file) if file.exists() else []
    jobs = [(number, recipe) for recipe in (None, *recipes) for number in NUMBERS]
    for number, recipe in tqdm(jobs, desc="runs"):
        key = key_of(number, recipe, seed)
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(measure(number, recipe, seed))
        with file.open("a") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """UA: mean and least of any concept; kept ones as shares of what the base model reaches."""
    bases = {(r["number"], r["seed"]): r for r in rows if r["recipe"] == "base"}
    lines = [
        "| concepts | recipe | UA (least) | kept, of base | IRA | CRA | passes | CPU seconds |",
        "|---" * 8 + "|",
    ]
    for row in sorted(rows, key=lambda r: (r["number"], r["recipe"])):
        if row["recipe"] == "base":
            continue
        asked = questions(row["concepts"], row["seed"])
        seen, was = (r["seen"][JUDGE] for r in (row, bases[row["number"], row["seed"]]))
        each = [gone(asked, seen, concept) for concept in row["concepts"]]
        objects, styles = (kept(asked, seen, was, row["concepts"], s) for s in ((False,), (True,)))
        both = kept(asked, seen, was, row["concepts"], (False, True))
        lines.append(
            f"| {row['number']} | {row['recipe']} | {sum(each) / len(each):.1%} ({min(each):.1%}) | "
            f"{both:.1%} | {objects:.1%} | {styles:.1%} | {row['unet_passes']} | "
            f"{row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def gone(asked: Sequence[Question], seen: Sequence[int], concept: str) -> float:
    """Share of the concept's own pictures in which it is not recognised."""
    there = [s for q, s in zip(asked, seen, strict=True) if q.concept == concept]
    return 1 - sum(there) / len(there)


def kept(
    asked: Sequence[Question],
    seen: Sequence[int],
    was: Sequence[int],
    erased: Sequence[str],
    styles: tuple[bool, ...],
) -> float:
    """Recognised, of what the base recognises, among questions about objects or styles."""
    picked = [
        i
        for i, q in enumerate(asked)
        if q.concept not in erased and (q.concept in world.STYLES) in styles
    ]
    return sum(seen[i] for i in picked) / sum(was[i] for i in picked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--show", type=Path, help="a file of rows: nothing is run")
    arguments = parser.parse_args()
    rows = erasure_table.shown_or_measured(
        arguments.show, lambda: run_all(arguments.recipes, arguments.seed, arguments.file)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
