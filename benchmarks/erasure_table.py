"""Erasure and preservation of the default recipe on the embedded model, as a table.

    python benchmarks/erasure_table.py                # the committed table
    python benchmarks/erasure_table.py --methods      # every object and style, by each train method
    python benchmarks/erasure_table.py --sweep        # recipes of each method against each other
    python benchmarks/erasure_table.py --precision    # dtypes and optimizers against float32
    python benchmarks/erasure_table.py --show FILE    # tables of measured rows, nothing is run

Every run is one row of a JSON-lines file; runs that are there are skipped, so it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import esd_fast
from esd_fast import processor
from esd_fast.commands.console import quiet_libraries
from esd_fast.demo import world
from esd_fast.esd import run
from esd_fast.evaluation.recognition import (
    Question,
    answer,
    erased_questions,
    kept_questions,
)
from esd_fast.models import load_model
from esd_fast.pages import keep_pages

RESULTS = Path(__file__).parent / "results"
JUDGES = ("judge", "second-judge")
DRAWING_STEPS = 15


@dataclass(frozen=True)
class Sizes:
    """Pictures a run."""

    erased: int
    kept: int


def table_concepts() -> list[str]:
    """cat, banana, every eighth object by alphabet, every style but the neutral one."""
    objects = dict.fromkeys(["cat", "banana", *sorted(world.OBJECTS)[::8]])
    return [*objects, *(s for s in world.STYLES if s != world.NEUTRAL_STYLE)]


def measure(concept: str, seed: int, settings: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """One erasure from a freshly loaded model, judged on pictures that all recipes share; what
    draws them is the base row's model with the erased weights, whatever they were trained in."""
    config = esd_fast.EraseConfig.from_preset(
        settings.get("preset", "fast"),
        concept_prompt(concept),
        seed=seed,
        **{k: v for k, v in settings.items() if k != "preset"},
    )
    model = load_model(None, config)
    started = time.perf_counter()
    erasure = run(model, config)
    seconds = time.perf_counter() - started
    erased = erased_questions(concept, sizes.erased, seed)
    kept = kept_questions(concept, sizes.kept, seed)
    drawing = base_model()
    erasure.apply(drawing.pipeline)
    seen = judge_all(drawing.pipeline, [*erased, *kept])
    return {
        "concept": concept,
        "seed": seed,
        "settings": settings,
        "seconds": round(seconds, 2),
        "unet_passes": erasure.manifest["unet_passes"]["total"],
        "erased": {j: s[: len(erased)] for j, s in seen.items()},
        "kept": {j: s[len(erased) :] for j, s in seen.items()},
    }


def measure_base(concepts: list[str], seed: int, sizes: Sizes) -> dict[str, Any]:
    """The unerased model on the same pictures, each drawn once for all concepts."""
    model = base_model()
    erased = {c: erased_questions(c, sizes.erased, seed) for c in concepts}
    kept = {c: kept_questions(c, sizes.kept, seed) for c in concepts}
    asked = list(dict.fromkeys(q for g in (*erased.values(), *kept.values()) for q in g))
    seen = judge_all(model.pipeline, asked)
    place = {q: i for i, q in enumerate(asked)}

    def picked(groups: dict[str, list[Question]]) -> dict[str, dict[str, list[int]]]:
        return {
            c: {j: [s[place[q]] for q in group] for j, s in seen.items()}
            for c, group in groups.items()
        }

    return {"seed": seed, "settings": "base", "erased": picked(erased), "kept": picked(kept)}


def erased_onto(drawing: Any, config: esd_fast.EraseConfig) -> dict[str, Any]:
    """One erasure from a freshly loaded model, then put onto `drawing`: what it took."""
    model = load_model(None, config)
    started = time.process_time()
    erasure = run(model, config)
    told = {
        "cpu_seconds": round(time.process_time() - started, 2),
        "unet_passes": erasure.manifest["unet_passes"]["total"],
    }
    erasure.apply(drawing.pipeline)
    return told


def base_model() -> Any:
    return load_model(None, esd_fast.EraseConfig(concept="nothing", dtype="float32"))


def concept_prompt(concept: str) -> str:
    """A style is erased by the words that ask for it."""
    return f"{concept} style" if concept in world.STYLES else concept


def judge_all(pipeline: Any, questions: list[Question]) -> dict[str, list[int]]:
    """Per judge: 1 where it sees what the caption asks for. Drawn in bfloat16 where the processor
    is faster in it (training is not); the same for every contestant."""
    dtype = drawing_dtype()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        answers = answer(
            pipeline, questions, JUDGES, num_inference_steps=DRAWING_STEPS, batch_size=100
        )
    return {judge: [int(s) for s in seen] for judge, seen in answers.seen.items()}


def drawing_dtype() -> torch.dtype:
    return processor.faster_of(processor.probe(1280, 8))


def run_all(
    concepts: list[str], seeds: int, settings: list[dict[str, Any]], file: Path, sizes: Sizes
) -> list[dict[str, Any]]:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(file) if file.exists() else []
    have = {key_of(r.get("concept"), r["seed"], r["settings"]) for r in rows}
    jobs: list[tuple[str | None, int, Any]] = [(None, s, "base") for s in range(seeds)]
    jobs += [(c, s, x) for x in settings for c in concepts for s in range(seeds)]
    for concept, seed, chosen in tqdm(jobs, desc="runs"):
        if key_of(concept, seed, chosen) in have:
            continue
        row = (
            measure_base(concepts, seed, sizes)
            if concept is None
            else measure(concept, seed, chosen, sizes)
        )
        with file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def shown_or_measured(
    show: Path | None, measure: Callable[[], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of the file `show`; without one, what `measure` gives."""
    if show:
        return read_rows(show)
    keep_pages()
    quiet_libraries()
    return list(measure())


def all_tables(rows: list[dict[str, Any]]) -> str:
    """A table for each recipe that the rows measured."""
    recipes = {json.dumps(r["settings"]) for r in rows if r["settings"] != "base"}
    tables = []
    for recipe in sorted(recipes):
        picked = [r for r in rows if r["settings"] in ("base", json.loads(recipe))]
        name = "the default recipe" if recipe == "{}" else f"`{recipe}`"
        tables.append(f"{name}\n\n{summary(picked)}")
    return "\n\n".join(tables)


def key_of(concept: str | None, seed: int, settings: Any) -> str:
    return json.dumps([concept, seed, settings], sort_keys=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """A line a concept over its seeds; kept relative to the base on the same pictures."""
    base = merged_bases([r for r in rows if r["settings"] == "base"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["settings"] != "base":
            groups.setdefault(row["concept"], []).append(row)
    lines = [
        "| erased | before | after | kept, of base | second judge: after | kept | seconds | passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    everything = [r for g in groups.values() for r in g]
    lines += [line_of(n, g, base) for n, g in [*groups.items(), ("**all**", everything)]]
    return "\n".join(lines)


def side_by_side(rows: list[dict[str, Any]]) -> str:
    """A column a recipe: recognised after, and kept, of base, by the first judge; then how far
    their means over the concepts are from the first recipe's, in points."""
    base = merged_bases([r for r in rows if r["settings"] == "base"])
    runs = [r for r in rows if r["settings"] != "base"]
    recipes = list(dict.fromkeys(label_of(r["settings"]) for r in runs))
    lines = ["| erased | " + " | ".join(recipes) + " |", "|---" * (len(recipes) + 1) + "|"]
    for concept in dict.fromkeys(r["concept"] for r in runs):
        cells = []
        for recipe in recipes:
            group = [
                r for r in runs if (r["concept"], label_of(r["settings"])) == (concept, recipe)
            ]
            cells.append("{:.1%} / {:.1%}".format(*rates_of(group, base)) if group else "")
        lines.append(f"| {concept} | " + " | ".join(cells) + " |")
    means = [rates_of([r for r in runs if label_of(r["settings"]) == n], base) for n in recipes]
    lines.append("| **all** | " + " | ".join(f"{e:.1%} / {k:.1%}" for e, k in means) + " |")
    points = [(100 * (e - means[0][0]), 100 * (k - means[0][1])) for e, k in means[1:]]
    told = " | ".join(f"{e:+.1f} / {k:+.1f}" for e, k in points)
    return "\n".join([*lines, f"| points from the first | | {told} |"])


def by_method(rows: list[dict[str, Any]]) -> str:
    """UA, IRA and CRA by the first judge, the kept ones as shares of what the base model reaches on the same
    pictures: means over all erased objects, and over all styles; in brackets the least of any concept."""
    base = merged_bases([r for r in rows if r["settings"] == "base"])
    runs = [r for r in rows if r["settings"] != "base"]
    lines = [
        "| method | erased | concepts | UA | IRA | CRA | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(label_of(r["settings"]) for r in runs):
        for kind, names in (("objects", world.OBJECTS), ("styles", world.STYLES)):
            group = [r for r in runs if label_of(r["settings"]) == recipe and r["concept"] in names]
            if not group:
                continue
            columns = zip(*(accuracies_of(r, base[r["seed"]]) for r in group), strict=True)
            shown = " | ".join(f"{np.mean(c):.1%} ({min(c):.1%})" for c in columns)
            seconds = np.median([r["seconds"] for r in group])
            concepts = len({r["concept"] for r in group})
            lines.append(f"| {recipe} | {kind} | {concepts} | {shown} | {seconds:.1f} |")
    return "\n".join(lines)


def accuracies_of(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float, float]:
    """UA, IRA (kept concepts of the same kind, of base), CRA (of the other kind, of base) of a run."""
    kept = row["kept"][JUDGES[0]]
    was = base["kept"][row["concept"]][JUDGES[0]]
    style = row["concept"] in world.STYLES
    same = [
        (q.concept in world.STYLES) == style
        for q in kept_questions(row["concept"], len(kept), row["seed"])
    ]

    def share(alike: bool) -> float:
        picked = [i for i, s in enumerate(same) if s == alike]
        return sum(kept[i] for i in picked) / sum(was[i] for i in picked)

    return 1 - float(np.mean(row["erased"][JUDGES[0]])), share(True), share(False)


def label_of(settings: dict[str, Any]) -> str:
    return ", ".join(str(v) for v in settings.values()) or "default"


def rates_of(group: list[dict[str, Any]], base: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """By the first judge: how often the erased is still seen, and the kept as a share of base."""

    def mean(parts: list[dict[str, list[int]]]) -> float:
        return float(np.mean(np.concatenate([p[JUDGES[0]] for p in parts])))

    was = mean([base[r["seed"]]["kept"][r["concept"]] for r in group])
    return mean([r["erased"] for r in group]), mean([r["kept"] for r in group]) / was


def merged_bases(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By seed; runs over different concepts each bring a base row of their own."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        of_seed = merged.setdefault(row["seed"], {"erased": {}, "kept": {}})
        for kind in ("erased", "kept"):
            of_seed[kind].update(row[kind])
    return merged


def line_of(name: str, group: list[dict[str, Any]], base: dict[int, dict[str, Any]]) -> str:
    def rate(judge: str, kind: str, was: bool = False) -> float:
        parts = [base[r["seed"]][kind][r["concept"]] if was else r[kind] for r in group]
        return float(np.mean(np.concatenate([p[judge] for p in parts])))

    shown = [f"{rate('judge', 'erased', was=True):.1%}"]
    for judge in JUDGES:
        kept = rate(judge, "kept") / rate(judge, "kept", was=True)
        shown += [f"{rate(judge, 'erased'):.1%}", f"{kept:.1%}"]
    shown.append(f"{np.median([r['seconds'] for r in group]):.1f}")
    shown.append(f"{np.median([r['unet_passes'] for r in group]):.0f}")
    return f"| {name} | " + " | ".join(shown) + " |"


METHODS = ("esd-x-strict", "esd-x", "esd-u")
SWEEP_CONCEPTS = ["cat", "cake", "flat", "pixel"]
# of each method: every pair of these, then the default recipe with one other value
SWEEP_RATES = {
    "esd-x-strict": (1e-3, 2e-3, 3e-3),
    "esd-x": (5e-4, 1e-3, 2e-3),
    "esd-u": (1e-4, 3e-4, 1e-3),
}
SWEEP_GUIDANCE = (2.0, 4.0)
SWEEP: list[dict[str, Any]] = [
    {"train_method": method, "learning_rate": rate, "negative_guidance": guidance}
    for method in METHODS
    for rate in SWEEP_RATES[method]
    for guidance in SWEEP_GUIDANCE
] + [
    {"train_method": method, name: value}
    for method in METHODS
    for name, value in (("iterations", 100), ("iterations", 400), ("num_inference_steps", 20))
]
# float32 first: the others are compared with it
PRECISION: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "optimizer": "adamw"},
    {"dtype": "bfloat16", "optimizer": "adam8bit"},
    {"dtype": "float32", "quantize": "int8"},
    {"dtype": "float32", "quantize": "nf4"},
]
PRECISION_KEPT = METHODS_KEPT = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--precision", action="store_true", help="needs the extra bitsandbytes")
    parser.add_argument("--concepts", nargs="*")
    parser.add_argument("--seeds", type=int, help="default: 3; --precision: 1")
    parser.add_argument("--kept", type=int, help="pictures of kept concepts a run")
    parser.add_argument("--erased", type=int, default=64, help="pictures of the erased one a run")
    parser.add_argument("--settings", type=json.loads, action="append", help="EraseConfig as JSON")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--show", type=Path, nargs="+", help="files of rows")
    arguments = parser.parse_args()
    if arguments.show:
        for file in arguments.show:
            print(f"### {file.stem}\n\n{study_of(arguments).table(read_rows(file))}\n")
        return
    keep_pages()
    quiet_libraries()
    study = study_of(arguments)
    sizes = Sizes(arguments.erased, arguments.kept or study.kept)
    rows = run_all(
        arguments.concepts or study.concepts,
        arguments.seeds or study.seeds,
        arguments.settings or study.settings,
        arguments.file or RESULTS / study.file,
        sizes,
    )
    print(study.table(rows))


@dataclass(frozen=True)
class Study:
    """What is run where the command line says no other."""

    file: str
    concepts: list[str]
    settings: list[dict[str, Any]]
    table: Callable[[list[dict[str, Any]]], str] = all_tables
    seeds: int = 3
    kept: int = 400


def study_of(arguments: argparse.Namespace) -> Study:
    if arguments.precision:
        table, kept = side_by_side, PRECISION_KEPT
        return Study("precision.jsonl", SWEEP_CONCEPTS, PRECISION, table, seeds=1, kept=kept)
    if arguments.sweep:
        return Study("sweep.jsonl", SWEEP_CONCEPTS, SWEEP, by_method, seeds=1, kept=METHODS_KEPT)
    if arguments.methods:
        concepts = [*world.OBJECTS, *(s for s in world.STYLES if s != world.NEUTRAL_STYLE)]
        settings = [{"train_method": method} for method in METHODS]
        return Study("methods.jsonl", concepts, settings, by_method, seeds=1, kept=METHODS_KEPT)
    return Study("erasure_table.jsonl", table_concepts(), [{}])


if __name__ == "__main__":
    main()
