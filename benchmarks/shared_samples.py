"""A sweep that collects once: three train methods by two learning rates from one file of samples.

    python benchmarks/shared_samples.py                       # counts to the screen and results/
    python benchmarks/shared_samples.py --output FOLDER       # the erasures too, for `esd-fast eval`

Each run ends with the bits of one that collects its own samples, which the first run of each method
is compared with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import replacing

import esd_fast
from esd_fast.commands.console import quiet_libraries
from esd_fast.pages import keep_pages

FILE = Path(__file__).parent / "results" / "shared_samples.json"
RATES = {"esd-x-strict": (1e-3, 2e-3), "esd-x": (5e-4, 1e-3), "esd-u": (5e-5, 1e-4)}


def sweep(concept: str, output: Path) -> dict[str, Any]:
    started = time.process_time()
    stored = esd_fast.collect_samples(None, concept)
    file = stored.save(output)
    collected = {"unet_passes": stored.unet_passes, "bytes": file.stat().st_size}
    collected["cpu_seconds"] = round(time.process_time() - started, 1)
    rows = []
    for method, rates in RATES.items():
        for rate in rates:
            started = time.process_time()
            erasure = esd_fast.erase(None, samples=file, train_method=method, learning_rate=rate)
            seconds = time.process_time() - started
            erasure.save(output / f"{method}-{rate:g}")
            own = alone(concept, method, rate) if rate == rates[0] else None
            rows.append(
                {
                    "train_method": method,
                    "learning_rate": rate,
                    "unet_passes": erasure.manifest["unet_passes"]["total"],
                    "cpu_seconds": round(seconds, 1),
                    "alone": None if own is None else told_of(own, erasure),
                }
            )
    return {"concept": concept, "collect": collected, "runs": rows}


def alone(concept: str, method: str, rate: float) -> tuple[esd_fast.Erasure, float]:
    """The same run, collecting for itself, and its CPU seconds."""
    started = time.process_time()
    erasure = esd_fast.erase(None, concept, train_method=method, learning_rate=rate)
    return erasure, time.process_time() - started


def told_of(own: tuple[esd_fast.Erasure, float], ours: esd_fast.Erasure) -> dict[str, Any]:
    erasure, seconds = own
    return {
        "unet_passes": erasure.manifest["unet_passes"]["total"],
        "cpu_seconds": round(seconds, 1),
        "same_bits": all(torch.equal(t, ours.tensors[n]) for n, t in erasure.tensors.items()),
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| method | learning rate | passes | CPU s | collecting itself | same bits |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["runs"]:
        own = row["alone"] or {}
        told = f"{own['unet_passes']} passes, {own['cpu_seconds']} s" if own else ""
        lines.append(
            f"| {row['train_method']} | {row['learning_rate']:g} | {row['unet_passes']} | "
            f"{row['cpu_seconds']} | {told} | {own.get('same_bits', '')} |"
        )
    passes = found["collect"]["unet_passes"] + sum(r["unet_passes"] for r in found["runs"])
    return "\n".join([*lines, f"\ncollect: {found['collect']}; all passes: {passes}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--output", type=Path, help="a folder (default: none is kept)")
    parser.add_argument("--file", type=Path, default=FILE)
    arguments = parser.parse_args()
    keep_pages()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        found = sweep(arguments.concept, arguments.output or Path(temporary))
    with replacing(arguments.file) as target:
        target.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
