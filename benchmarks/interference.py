"""The interference matrix of measured rows: what each erasure did to every other concept.

    python benchmarks/interference.py                      # of the committed table
    python benchmarks/interference.py ROWS --recipe '{"train_method": "esd-x"}' --output PNG

Nothing is run: rows of erasure_table.py say of each picture whether the judge saw what was asked
for, and which concept that was follows from the row's concept and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import erasure_table

from esd_fast.evaluation.interference import interference_picture
from esd_fast.evaluation.pictures import save_png
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions
from esd_fast.evaluation.retention import InterferenceRow

ROWS = erasure_table.RESULTS / "erasure_table.jsonl"
OUTPUT = erasure_table.RESULTS / "interference.png"
TITLE = "Erased (row), recognised (column), by the embedded model's judge"


def asked(concept: str, seed: int, erased: list[int], kept: list[int]) -> dict[Question, int]:
    """Each of a run's questions with its answer."""
    questions = [
        *erased_questions(concept, len(erased), seed),
        *kept_questions(concept, len(kept), seed),
    ]
    return dict(zip(questions, [*erased, *kept], strict=True))


def matrix(
    rows: list[dict[str, Any]], recipe: dict[str, Any], judge: str = "judge"
) -> list[InterferenceRow]:
    """A row for the model as it is, then one for each erased concept over all seeds."""
    base: dict[tuple[int, Question], int] = {}
    erased: dict[str, dict[tuple[int, Question], int]] = {}
    for row in rows:
        seed = row["seed"]
        if row["settings"] == "base":
            for concept, seen in row["erased"].items():
                answers = asked(concept, seed, seen[judge], row["kept"][concept][judge])
                base |= {(seed, q): a for q, a in answers.items()}
        elif row["settings"] == recipe:
            answers = asked(row["concept"], seed, row["erased"][judge], row["kept"][judge])
            erased.setdefault(row["concept"], {}).update({(seed, q): a for q, a in answers.items()})
    found = [InterferenceRow("nothing", (), counts(base))]
    return found + [InterferenceRow(c, (c,), counts(seen)) for c, seen in erased.items()]


def counts(answers: dict[tuple[int, Question], int]) -> dict[str, tuple[int, int]]:
    """concept -> (recognised, pictures), in alphabetical order."""
    by_concept: dict[str, list[int]] = {}
    for (_, question), seen in answers.items():
        by_concept.setdefault(question.concept, []).append(seen)
    return {c: (sum(seen), len(seen)) for c, seen in sorted(by_concept.items())}


def worst(rows: Iterable[InterferenceRow], base: InterferenceRow, at_most: int = 5) -> str:
    """The kept concepts that lost most, as lines."""
    losses = []
    for row in rows:
        for concept, (seen, images) in row.seen.items():
            was, n = base.seen.get(concept, (0, 0))
            if n and concept not in row.erased:
                losses.append((was / n - seen / images, row.name, concept, seen, images))
    losses.sort(key=lambda loss: -loss[0])
    return "\n".join(
        f"{name} erased: {concept} recognised in {seen} of {images} ({-100 * loss:+.0f} points)"
        for loss, name, concept, seen, images in losses[:at_most]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?", type=Path, default=ROWS)
    parser.add_argument("--recipe", type=json.loads, default={}, help="settings of the rows, JSON")
    parser.add_argument("--judge", choices=erasure_table.JUDGES, default="judge")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    base, *erased = matrix(
        erasure_table.read_rows(arguments.rows), arguments.recipe, arguments.judge
    )
    if not erased:
        parser.error(f"{arguments.rows} has no rows of the recipe {json.dumps(arguments.recipe)}")
    save_png(interference_picture([base, *erased], TITLE), arguments.output)
    print(f"{worst(erased, base)}\n{arguments.output}")


if __name__ == "__main__":
    main()
