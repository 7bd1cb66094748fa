"""One process against several, on the same batches: seconds of collect and fit.

    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py --json FILE

On the embedded model, one thread each (OMP_NUM_THREADS, which torchrun sets). The processes are started once; in turn
the first erases alone, the others waiting, and all erase together. Loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where esd_fast is not installed

import torch.distributed as dist
from measure import machine

from esd_fast.config import EraseConfig
from esd_fast.esd import run
from esd_fast.models import Model, load_model
from esd_fast.pages import keep_pages
from esd_fast.parallel import Ranks, joined


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, required=True)
    arguments.add_argument("--iterations", type=int, default=100)
    arguments.add_argument("--batch-size", type=int, default=1, help="of each process")
    arguments.add_argument("--repeats", type=int, default=5)
    said = arguments.parse_args()
    keep_pages()
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    size, first = dist.get_world_size(), dist.get_rank() == 0
    config = EraseConfig.from_preset(
        "fast", "cat", batch_size=said.batch_size * size, iterations=said.iterations, device="cpu"
    )
    model = load_model(None, config)
    found: dict[int, list[dict[str, float]]] = {1: [], size: []}
    for _ in range(said.repeats):
        if first:
            found[1].append(seconds(model, config, Ranks()))
        dist.barrier()
        with joined() as ranks:
            found[size].append(seconds(model, config, ranks))
    if first:
        rows = [row(number, config, measured) for number, measured in found.items()]
        said.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")
        for each in rows:
            print(each)
    dist.destroy_process_group()


def seconds(model: Model, config: EraseConfig, ranks: Ranks) -> dict[str, float]:
    erasure = run(model, config, ranks=ranks)
    erasure.revert(model.unet)
    return {phase: erasure.manifest["seconds"][phase] for phase in ("collect", "fit")}


def row(number: int, config: EraseConfig, measured: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the fastest, which other work on the machine disturbs least."""
    told: dict[str, Any] = {
        "processes": number,
        "global_batch_size": config.batch_size,
        "iterations": config.iterations,
        "repeats": len(measured),
    }
    for phase in ("collect", "fit"):
        values = [each[phase] for each in measured]
        told[f"{phase}_seconds"] = round(statistics.median(values), 3)
        told[f"{phase}_seconds_fastest"] = round(min(values), 3)
    return told


if __name__ == "__main__":
    main()
