"""Does keep_vocabulary keep words that it was not told of?

    python benchmarks/held_out_words.py [--file ROWS]     # about ten minutes
    python benchmarks/held_out_words.py --show ROWS

Half of the objects' names, with their synonyms, are taken out of the words that updates are held to.
Then objects are erased three times: held to no word, to the words that are left, to all. Every kept
picture asks for one of the objects that were taken out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import erasure_table
from tqdm import tqdm

import esd_fast
from esd_fast.demo import world
from esd_fast.esd import run
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions
from esd_fast.models import load_model
from esd_fast.vocabulary import words_of

FILE = erasure_table.RESULTS / "held_out_words.jsonl"
CONCEPTS = ("cat", "banana", "cake", "airplane")
ERASED, KEPT = 64, 240


def held_out() -> set[str]:
    """Half of the objects, drawn once; none that is erased."""
    objects = sorted(set(world.OBJECTS) - set(CONCEPTS))
    return set(random.Random(1).sample(objects, len(objects) // 2))


def words_without(objects: set[str], words: list[str]) -> list[str]:
    """`words` without what the tokenizer makes of those objects' names: the name, or its pieces."""
    names = {n for o in objects for n in (o, *world.OBJECTS[o][1].replace("-", " ").split())}
    return [w for w in words if not any(w in name for name in names)]


def questions(concept: str, seed: int) -> list[Question]:
    """Pictures that ask for a held-out object."""
    wanted = held_out()
    pool = kept_questions(concept, 12 * KEPT, seed)
    return [q for q in pool if q.concept in wanted][:KEPT]


def measure(seed: int) -> Iterator[dict[str, Any]]:
    for concept in tqdm(CONCEPTS, desc="concepts"):
        asked = [*erased_questions(concept, ERASED, seed), *questions(concept, seed)]
        for held_to in ("base", "no word", "words left", "all words"):
            yield measure_one(concept, held_to, asked, seed)


def measure_one(concept: str, held_to: str, asked: list[Question], seed: int) -> dict[str, Any]:
    strength = 0.0 if held_to == "no word" else None
    config = esd_fast.EraseConfig.from_preset("fast", concept, seed=seed, keep_vocabulary=strength)
    model = load_model(None, config)
    every = words_of(model.pipeline.tokenizer)
    words = words_without(held_out(), every) if held_to == "words left" else every
    if held_to != "base":
        run(model, config, words=words)
    seen = erasure_table.judge_all(model.pipeline, asked)["judge"]
    return {
        "concept": concept,
        "seed": seed,
        "held_to": held_to,
        "words": len(words),
        "erased": sum(seen[:ERASED]) / ERASED,
        "kept": sum(seen[ERASED:]) / len(seen[ERASED:]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Erased and kept (as a share of the base's) by what updates are held to."""
    columns = ("no word", "words left", "all words")
    found = {(r["concept"], r["held_to"]): r for r in rows}
    lines = ["| erased | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for concept in CONCEPTS:
        base = found[concept, "base"]["kept"]
        cells = [
            f"{found[concept, c]['erased']:.1%} / {found[concept, c]['kept'] / base:.1%}"
            for c in columns
        ]
        lines.append(f"| {concept} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--show", type=Path, help="a file of rows: nothing is run")
    arguments = parser.parse_args()
    rows = erasure_table.shown_or_measured(arguments.show, lambda: measure(arguments.seed))
    if not arguments.show:
        arguments.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
