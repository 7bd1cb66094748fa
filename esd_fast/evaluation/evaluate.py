"""Before against after: every metric that is there on pictures that were drawn, as one table of
plain data (eval.json) and a page (eval.html)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esd_fast.erasure import versions
from esd_fast.generate import to_pil

from .drawn import DrawnFolder
from .eval_page import render_evaluation
from .interference import interference_picture
from .metrics import Metric, Subject
from .page import picture, plain_data, write_pair
from .pictures import ComparisonRow, comparison_grid, save_png

PROMPTS_SHOWN, PICTURES_SHOWN = 4, 4
Progress = Callable[[str], Callable[[int, int], None]]


def evaluate(
    subject: Subject, metrics: Mapping[str, Metric], lacking: Mapping[str, str], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What eval.json holds, and by metric the rows of an interference matrix."""
    seconds: dict[str, float] = {}
    measured: dict[str, Any] = {}
    interference = {}
    for name, metric in metrics.items():
        started = time.perf_counter()
        result = metric.measure(subject, progress(name))
        seconds[name] = time.perf_counter() - started
        measured[name] = {**result.told, "by_erasure": result.by_folder}
        if result.interference and any(row.seen for row in result.interference):
            interference[name] = result.interference
            measured[name]["interference"] = {
                row.name: {
                    "erased": row.erased,
                    "recognised_of": {c: seen for c, seen in row.seen.items() if seen[1]},
                }
                for row in result.interference
            }
    return (
        {
            "pictures": told_of(subject),
            "erasures": {f.name: erasure_told(f, subject) for f in subject.drawn.erased},
            "concepts": dict(subject.questions.concepts),
            "metrics": measured,
            "not_measured": dict(lacking),
            "seconds": seconds,
            "versions": versions(),
        },
        interference,
    )


def told_of(subject: Subject) -> dict[str, Any]:
    told = subject.drawn.base.told
    keys = ("model", "model_fingerprint", "scheduler", "num_inference_steps", "guidance_scale")
    return {
        "folder": str(subject.drawn.base.path.parent),
        "images": len(subject.drawn.pictures),
        "prompts": len({p.prompt for p in subject.drawn.pictures}),
        **{key: told[key] for key in (*keys, "size", "dtype") if key in told},
    }


def erasure_told(folder: DrawnFolder, subject: Subject) -> dict[str, Any]:
    groups = {name: len(pictures) for name, pictures in subject.groups(folder).items()}
    return {
        "concept": folder.told.get("erased_concept"),
        "erased": list(subject.erased[folder.name]),
        "file": folder.told.get("erasure"),
        "sha256": folder.told.get("erasure_sha256"),
        "base_fingerprint": folder.told.get("base_fingerprint"),
        "strength": folder.told.get("strength"),
        "images": groups,
    }


def write_evaluation(
    output: Path, subject: Subject, told: Mapping[str, Any], interference: Mapping[str, Any]
) -> Path:
    """eval.json, eval.html, and the pictures that it shows; returns the path of eval.html."""
    output.mkdir(parents=True, exist_ok=True)
    sample = save_png(sample_grid(subject), output / "eval.png")
    shown = {}
    for name, rows in interference.items():
        file = save_png(
            interference_picture(rows, f"Recognised by {name}"),
            output / f"interference-{name}.png",
        )
        shown[name] = picture(output, file.name)
    plain = plain_data(told)
    html = render_evaluation(plain, picture(output, sample.name), shown)
    return write_pair(output, "eval", plain, html)


def sample_grid(subject: Subject) -> Any:
    """A few prompts of what each erasure is of, then a few of what all keep."""
    chosen: dict[str, str] = {}
    gone: set[str] = set()
    for folder in subject.drawn.erased:
        prompts = dict.fromkeys(p.prompt for p in subject.groups(folder).get("erased", []))
        gone |= prompts.keys()
        chosen |= dict.fromkeys(list(prompts)[:PROMPTS_SHOWN], "erased")
    kept = dict.fromkeys(p.prompt for p in subject.drawn.pictures if p.prompt not in gone)
    chosen |= dict.fromkeys(list(kept)[:PROMPTS_SHOWN], "kept")
    rows = []
    for prompt, kind in chosen.items():
        same = [p for p in subject.drawn.pictures if p.prompt == prompt][:PICTURES_SHOWN]
        blocks = [[to_pil(a) for a in folder.read(same)] for folder in subject.drawn.folders]
        rows.append(ComparisonRow(prompt, kind, blocks))
    return comparison_grid(rows, [folder.name for folder in subject.drawn.folders])
