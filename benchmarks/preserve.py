"""What preserved prompts bring, by their number and weight, where erasing takes other things along.

    python benchmarks/preserve.py                  # the committed rows
    python benchmarks/preserve.py --show ROWS      # tables of measured rows, nothing is run

The default recipe keeps nearly all, so methods and settings that damage more are measured. The
preserved prompts are the first of the embedded model's own ("default" takes eight); kept concepts
that they name and those that they do not are counted apart. Every run is one row of a JSON-lines
file; runs that are there are skipped, so it can be stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import erasure_table
from tqdm import tqdm

import esd_fast
from esd_fast.demo import world
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions
from esd_fast.preserve import DEFAULT, resolved

FILE = erasure_table.RESULTS / "preserve.jsonl"
JUDGE = erasure_table.JUDGES[0]
ERASED, KEPT = 32, 96  # pictures a run


@dataclass(frozen=True)
class Case:
    """What is erased together, and how."""

    name: str
    concepts: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


ESD_U = {"train_method": "esd-u"}
ESD_X = {"train_method": "esd-x", "keep_vocabulary": 0.0, "iterations": 400}
FOUR = ("cat", "doughnut", "robot", "grapes")
CASES = (
    *(Case("esd-u", (concept,), ESD_U) for concept in ("cat", "doughnut")),
    Case("esd-x, no words kept, four at once", FOUR, ESD_X),
)
# (prompts, weight): the weight of eight, then their number
VARIANTS = ((0, 1.0), (8, 1.0), (8, 3.0), (8, 10.0), (16, 1.0), (4, 1.0), (8, 0.3))


def questions(case: Case, seed: int) -> list[Question]:
    """Those about what is erased first."""
    each = ERASED // len(case.concepts)
    erased = [q for c in case.concepts for q in erased_questions(c, each, seed)]
    return [*erased, *kept_questions(case.concepts, KEPT, seed)]


def prompts(case: Case, number: int) -> tuple[str, ...]:
    general = world.general_prompts()
    return resolved([DEFAULT] if number else [], general, case.concepts, number)


def measure(case: Case, number: int, weight: float, seed: int) -> dict[str, Any]:
    """One erasure, or with a `number` below 0 the model as it is."""
    drawing, told = erasure_table.base_model(), {}
    if number >= 0:
        config = esd_fast.EraseConfig.from_preset(
            "fast",
            [erasure_table.concept_prompt(c) for c in case.concepts],
            preserve=prompts(case, number),
            preserve_weight=weight,
            seed=seed,
            **case.settings,
        )
        told = erasure_table.erased_onto(drawing, config)
    seen = erasure_table.judge_all(drawing.pipeline, questions(case, seed))
    return {**key_of(case, number, weight, seed), **told, "seen": seen}


def key_of(case: Case, number: int, weight: float, seed: int) -> dict[str, Any]:
    return {
        "case": case.name,
        "concepts": list(case.concepts),
        "settings": case.settings,
        "preserved": number,
        "weight": weight,
        "seed": seed,
        "drawn_in": str(erasure_table.drawing_dtype()).removeprefix("torch."),
    }


def run_all(seed: int, file: Path) -> list[dict[str, Any]]:
    rows = erasure_table.read_rows(file) if file.exists() else []
    jobs = [(case, *variant) for variant in ((-1, 1.0), *VARIANTS) for case in CASES]
    for job in tqdm(jobs, desc="runs"):
        key = key_of(*job, seed)
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(measure(*job, seed))
        with file.open("a") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    return rows


def rates_of(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float | None]:
    """UA; IRA and CRA; and of the kept concepts those that prompts name and the others, of base."""
    case = Case(row["case"], tuple(row["concepts"]))
    asked, seen, was = questions(case, row["seed"]), row["seen"][JUDGE], base["seen"][JUDGE]
    gone = [q.concept in case.concepts for q in asked]
    named = {w for p in prompts(case, max(0, row["preserved"])) for w in p.split()}

    def share(picked: Sequence[bool]) -> float | None:
        rows = [i for i, p in enumerate(picked) if p and not gone[i]]
        return sum(seen[i] for i in rows) / sum(was[i] for i in rows) if rows else None

    style = [q.concept in world.STYLES for q in asked]
    preserved = [q.concept in named for q in asked]
    left = [s for s, g in zip(seen, gone, strict=True) if g]
    return {
        "UA": 1 - sum(left) / len(left),
        "IRA": share([not s for s in style]),  # only objects are erased here
        "CRA": share(style),
        "preserved": share(preserved),
        "others": share([not p for p in preserved]),
        "kept": share([True] * len(asked)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the concepts of a case; kept ones as shares of what the base model reaches."""
    bases = {(r["case"], *r["concepts"]): r for r in rows if r["preserved"] < 0}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["preserved"] >= 0:
            key = (row["case"], row["preserved"], row["weight"])
            groups.setdefault(key, []).append(row)
    columns = ("UA", "IRA", "CRA", "preserved", "others", "kept")
    heads = ("case", "prompts", "weight", *columns, "passes", "CPU s")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (case, number, weight), group in sorted(groups.items()):
        found = [rates_of(r, bases[(case, *r["concepts"])]) for r in group]
        cells = [mean([f[c] for f in found]) for c in columns]
        shown = ["" if c is None else f"{c:.1%}" for c in cells]
        passes = mean([r["unet_passes"] for r in group])
        seconds = mean([r["cpu_seconds"] for r in group])
        lines.append(
            f"| {case} | {number} | {weight if number else ''} | {' | '.join(shown)} | "
            f"{passes:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--show", type=Path, help="a file of rows: nothing is run")
    arguments = parser.parse_args()
    rows = erasure_table.shown_or_measured(
        arguments.show, lambda: run_all(arguments.seed, arguments.file)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
