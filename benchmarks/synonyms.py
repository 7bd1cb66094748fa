"""Is esd-x bound to the words, and esd-u not? Erase a word, ask for it and for its synonym.

    python benchmarks/synonyms.py                 # runs what is not in the file yet
    python benchmarks/synonyms.py --show FILE     # the table of measured rows, nothing is run

Captions of the embedded model's world say a synonym of each object in an eighth of the cases ("kitty"
for "cat"), so the model draws it, and nothing in an erasure of the word names it. Every run is one
row of a JSON-lines file; runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import erasure_table
from tqdm import tqdm

import esd_fast
from esd_fast.demo import world
from esd_fast.esd import run
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions
from esd_fast.generate import Shot
from esd_fast.models import load_model

FILE = erasure_table.RESULTS / "synonyms.jsonl"
# the model draws the synonym of each of these as often as the word, or nearly
CONCEPTS = ("cat", "dog", "bicycle", "rabbit")
ASKED, KEPT = 32, 64
# keep_vocabulary holds updates to all words of the tokenizer, and synonyms are among them
RECIPES: dict[str, dict[str, Any]] = {
    "esd-x": {"train_method": "esd-x", "learning_rate": 2e-3, "keep_vocabulary": 0.0},
    "esd-x-strict": {"train_method": "esd-x-strict", "keep_vocabulary": 0.0},
    "esd-u": {"train_method": "esd-u", "learning_rate": 1e-4},
    "esd-x, words kept": {"train_method": "esd-x", "learning_rate": 2e-3},
    "esd-x-strict, words kept": {"train_method": "esd-x-strict"},
}
GROUPS = ("word", "synonym", "kept")


def questions(concept: str, seed: int) -> dict[str, list[Question]]:
    """Pictures of the word, of its synonym (the same captions and seeds but for the word), and of
    other objects and styles."""
    word = erased_questions(concept, ASKED, seed)
    return {
        "word": word,
        "synonym": [in_other_words(question) for question in word],
        "kept": kept_questions(concept, KEPT, seed),
    }


def in_other_words(question: Question) -> Question:
    """ "an umbrella on a blue background" -> "a parasol on a blue background" """
    concept, shot = question.concept, question.shot
    synonym = world.OBJECTS[concept][1]

    def replaced(found: re.Match[str]) -> str:
        article = f"{world.article(synonym)} " if found[1] else ""
        return article + synonym

    prompt = re.sub(rf"\b(an? )?{re.escape(concept)}\b", replaced, shot.prompt)
    return Question(Shot(prompt, shot.seed), concept)


def measure(concept: str, recipe: str, seed: int) -> dict[str, Any]:
    """How often the judge sees what was asked for: of the model as it is (recipe "base"), or from
    which the word `concept` was erased."""
    row: dict[str, Any] = {"concept": concept, "recipe": recipe, "seed": seed}
    drawing = erasure_table.base_model()
    if recipe != "base":
        config = esd_fast.EraseConfig.from_preset("fast", concept, seed=seed, **RECIPES[recipe])
        erasure = run(load_model(None, config), config)
        erasure.apply(drawing.pipeline)
        told = erasure.manifest["config"]
        row |= {k: told[k] for k in ("train_method", "learning_rate", "keep_vocabulary")}
    asked = questions(concept, seed)
    seen = iter(
        erasure_table.judge_all(drawing.pipeline, [q for g in asked.values() for q in g])["judge"]
    )
    return row | {name: [next(seen) for _ in group] for name, group in asked.items()}


def run_all(concepts: Iterable[str], seeds: int, file: Path) -> list[dict[str, Any]]:
    rows = erasure_table.read_rows(file) if file.exists() else []
    have = {key_of(row) for row in rows}
    jobs = [(c, r, s) for s in range(seeds) for c in concepts for r in ("base", *RECIPES)]
    for job in tqdm(jobs, desc="runs"):
        if job in have:
            continue
        rows.append(measure(*job))
        with file.open("a") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    return rows


def key_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["concept"], row["recipe"], row["seed"]


def table(rows: list[dict[str, Any]]) -> str:
    """A line a recipe: the share recognised when asked for by the word, by its synonym, and of what
    is kept, with Wilson's 95% interval."""
    lines = ["| erased by | the word | its synonym | other things |", "|---|---|---|---|"]
    for recipe in ("base", *RECIPES):
        group = [row for row in rows if row["recipe"] == recipe]
        if group:
            name = "(nothing)" if recipe == "base" else recipe
            cells = [share([s for row in group for s in row[kind]]) for kind in GROUPS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_concept(rows: list[dict[str, Any]]) -> str:
    """A line a concept: word / synonym under each recipe."""
    recipes = ("base", *RECIPES)
    lines = ["| word / synonym | " + " | ".join(recipes) + " |", "|---" * (len(recipes) + 1) + "|"]
    for concept in dict.fromkeys(row["concept"] for row in rows):
        cells = []
        for recipe in recipes:
            group = [r for r in rows if (r["concept"], r["recipe"]) == (concept, recipe)]
            seen = [[s for r in group for s in r[kind]] for kind in ("word", "synonym")]
            cells.append(" / ".join(f"{sum(s) / len(s):.0%}" for s in seen) if group else "")
        synonym = world.OBJECTS[concept][1]
        lines.append(f"| {concept} / {synonym} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(seen: list[int]) -> str:
    from esd_fast.evaluation.intervals import wilson_interval

    low, high = wilson_interval(sum(seen), len(seen))
    return f"{sum(seen) / len(seen):.1%} ({100 * low:.0f} to {100 * high:.0f}%)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", nargs="+", choices=list(world.OBJECTS), default=CONCEPTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--show", type=Path, help="a file of rows: nothing is run")
    arguments = parser.parse_args()
    rows = erasure_table.shown_or_measured(
        arguments.show, lambda: run_all(arguments.concepts, arguments.seeds, arguments.file)
    )
    print(table(rows), by_concept(rows), sep="\n\n")


if __name__ == "__main__":
    main()
