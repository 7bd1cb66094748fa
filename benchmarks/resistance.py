"""Does an erased concept of the embedded model come back, and what does hardening cost?

    python benchmarks/resistance.py                # the committed table
    python benchmarks/resistance.py --show FILE    # the table of measured rows, nothing is run

Every concept is attacked on the model as it is (recipe "base") and on what each recipe leaves of it.
Every run is one row of a JSON-lines file; runs that are there are skipped, so it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import erasure_table
from tqdm import tqdm

import esd_fast
from esd_fast.commands.console import quiet_libraries
from esd_fast.demo import world
from esd_fast.erasure import Erasure
from esd_fast.esd import run
from esd_fast.evaluation.attacks import attacks_on
from esd_fast.evaluation.embedded_judge import EmbeddedJudge
from esd_fast.evaluation.intervals import wilson_interval
from esd_fast.evaluation.inversion import InversionConfig
from esd_fast.evaluation.recognition import Question, erased_questions, kept_questions
from esd_fast.evaluation.resistance import Resistance, Witness
from esd_fast.hardening import SEED, drawn_adversary, harden
from esd_fast.models import Model, load_model
from esd_fast.pages import keep_pages

FILE = erasure_table.RESULTS / "resistance.jsonl"
CONCEPTS = ("cat", "flat", "banana", "sepia", "robot")
# the recipe's own rate for esd-x has become 1e-3 since the first rows were measured
ESD_X = {"train_method": "esd-x", "learning_rate": 2e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "fast": {},
    "fast, esd-x": ESD_X,
    "fast, hardened": {"harden": 2},
    "fast, esd-x, hardened": {**ESD_X, "harden": 2},
    "fast, esd-x, hardened, preserved": {**ESD_X, "harden": 2, "preserve": "default"},
}
ERASED, KEPT, EXAMPLES = 24, 96, 16
RESISTANCE = Resistance(
    images=24,
    seed=0,
    settings={"num_inference_steps": 10, "guidance_scale": 4.0, "batch_size": 24},
    inversion=InversionConfig(steps=100),
)
HARDENING = InversionConfig(steps=100, seed=SEED)
EXAMPLES_SEED = 1_000_000


def measure(concept: str, recipe: str, seed: int) -> dict[str, Any]:
    text = erasure_table.concept_prompt(concept)
    settings = dict(RECIPES[recipe])
    rounds = settings.pop("harden", 0)
    config = esd_fast.EraseConfig.from_preset("fast", text, seed=seed, **settings)
    model = load_model(None, config)
    attacks = attacks_on(text, concept)
    examples = RESISTANCE.drawn(model, attacks[0].prompts, None, None, EXAMPLES, EXAMPLES_SEED)
    started, erasure = time.process_time(), None  # other work on the core does not count
    if recipe != "base":
        erasure = (
            harden(model, config, rounds, [drawn_adversary(model, text)], HARDENING)
            if rounds
            else run(model, config)
        )
    seconds = time.process_time() - started
    witness = Witness(EmbeddedJudge(), concept)
    found = {}
    for attack in attacks:
        drawn, _ = RESISTANCE.attacked(model, attack, examples)
        found[attack.name] = [int(s) for s in witness.sees(drawn)]
    return {
        "concept": concept,
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds, 1),
        "unet_passes": passes_of(erasure),
        "attacks": found,
        **kept_by(model, concept, seed),
    }


def passes_of(erasure: Erasure | None) -> int:
    if erasure is None:
        return 0
    told = erasure.manifest
    hardening = told.get("hardening")
    return int(hardening["unet_passes"] if hardening else told["unet_passes"]["total"])


def kept_by(model: Model, concept: str, seed: int) -> dict[str, list[int]]:
    """What the judge sees of the erased concept, of others of its domain, and of the other one:
    the questions of erasure_table.py."""
    erased = erased_questions(concept, ERASED, seed)
    kept = kept_questions(concept, KEPT, seed)
    seen = erasure_table.judge_all(model.pipeline, [*erased, *kept])["judge"]

    def domain(question: Question) -> bool:
        return (question.concept in world.STYLES) == (concept in world.STYLES)

    of_kept = list(zip(kept, seen[len(erased) :], strict=True))
    return {
        "erased": seen[: len(erased)],
        "same_domain": [s for q, s in of_kept if domain(q)],
        "other_domain": [s for q, s in of_kept if not domain(q)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a concept and recipe, then the median concept of each recipe that all have."""
    names = list(rows[0]["attacks"])[1:]
    lines = [
        "| erased | recipe | CPU seconds | passes | UA | IRA | CRA | " + " | ".join(names) + " |",
        "|---" * (7 + len(names)) + "|",
    ]
    ordered = sorted(rows, key=lambda r: list(RECIPES).index(r["recipe"]))
    concepts = list(dict.fromkeys(r["concept"] for r in rows))
    for concept in concepts:
        lines += [line_of(r, names) for r in ordered if r["concept"] == concept]
    for recipe in RECIPES:
        group = [r for r in rows if r["recipe"] == recipe]
        if {r["concept"] for r in group} == {*concepts}:
            lines.append(median_line(recipe, group, names))
    return "\n".join(lines)


def line_of(row: dict[str, Any], names: list[str]) -> str:
    cells = [row["concept"], row["recipe"], f"{row['seconds']:.0f}", str(row["unet_passes"])]
    cells += [f"{x:.1%}" for x in accuracies(row)]
    for name in names:
        seen = row["attacks"][name]
        low, high = wilson_interval(sum(seen), len(seen))
        cells.append(f"{rate(seen):.0%} ({low:.0%} to {high:.0%})")
    return "| " + " | ".join(cells) + " |"


def median_line(recipe: str, group: list[dict[str, Any]], names: list[str]) -> str:
    def median(values: list[float]) -> float:
        return float(statistics.median(values))

    cells = ["**median**", recipe]
    cells += [f"{median([r[k] for r in group]):.0f}" for k in ("seconds", "unet_passes")]
    cells += [f"{median(list(column)):.1%}" for column in zip(*map(accuracies, group), strict=True)]
    cells += [f"{median([rate(r['attacks'][n]) for r in group]):.0%}" for n in names]
    return "| " + " | ".join(cells) + " |"


def accuracies(row: dict[str, Any]) -> tuple[float, float, float]:
    """UA, IRA, CRA."""
    return 1 - rate(row["erased"]), rate(row["same_domain"]), rate(row["other_domain"])


def rate(seen: list[int]) -> float:
    return sum(seen) / len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", nargs="*", default=CONCEPTS)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--show", type=Path, help="a file of rows: nothing is run")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(erasure_table.read_rows(arguments.show)))
        return
    keep_pages()
    quiet_libraries()
    file = arguments.file
    rows = erasure_table.read_rows(file) if file.exists() else []
    have = {(r["concept"], r["recipe"], r["seed"]) for r in rows}
    # a recipe after the other: what was stopped has whole columns
    jobs = [(c, r, arguments.seed) for r in arguments.recipes for c in arguments.concepts]
    for job in tqdm([job for job in jobs if job not in have], desc="runs"):
        rows.append(measure(*job))
        with file.open("a") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
