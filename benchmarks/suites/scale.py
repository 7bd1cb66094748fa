"""How time and memory of an erasure grow: with iterations, batch, resolution and concepts.

On the embedded model; the iterations are for each concept. Every cell is a fresh process, and the cells of one
question are measured in turn, `REPEATS` times. Samples are iterations x batch x concepts: seconds
should grow in proportion to them, memory not at all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from measure import Settings, Timing, in_fresh_process, peak, reset_peak
from rows import Row

from esd_fast.demo import world

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPEATS = 3
USUAL: dict[str, Any] = {"iterations": 100, "batch_size": 1, "resolution": 64, "concepts": 1}
QUESTIONS: dict[str, tuple[int, ...]] = {
    "iterations": (50, 100, 200, 400, 800),
    "batch_size": (1, 2, 4, 8),
    "resolution": (64, 96, 128, 192, 256),
    "concepts": (1, 2, 4, 8),
}
QUICK = {"iterations": (5, 10), "batch_size": (1, 2), "resolution": (64, 96), "concepts": (1, 2)}


@dataclass(frozen=True)
class Cell:
    question: str
    value: int
    device: str

    @property
    def asked(self) -> dict[str, Any]:
        return {**USUAL, self.question: self.value}

    @property
    def settings(self) -> dict[str, Any]:
        """Of EraseConfig."""
        count = self.asked["concepts"]
        concepts = ["cat", *(name for name in world.OBJECTS if name != "cat")][:count]
        settings = {k: v for k, v in self.asked.items() if k != "concepts"}
        return settings | {"concept": concepts, "iterations": count * settings["iterations"]}

    @property
    def samples(self) -> int:
        return int(self.settings["iterations"] * self.settings["batch_size"])


def run(settings: Settings) -> Iterator[Row]:
    repeats = 1 if settings.quick else REPEATS
    for question, values in (QUICK if settings.quick else QUESTIONS).items():
        cells = [Cell(question, value, settings.device) for value in values]
        found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
        for _ in range(repeats):
            for cell in cells:
                found[cell].append(in_fresh_process(measure, cell))
        for cell, measured in found.items():
            yield row_of(cell, measured)


def measure(cell: Cell) -> dict[str, Any]:
    """One erasure from a loaded pipeline, in a process of its own."""
    from diffusers import StableDiffusionPipeline

    import esd_fast
    from esd_fast.commands.console import quiet_libraries
    from esd_fast.demo import model_path
    from esd_fast.pages import keep_pages

    keep_pages()
    quiet_libraries()
    cuda = torch.device(cell.device).type == "cuda"
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_path(), dtype=torch.bfloat16 if cuda else torch.float32, safety_checker=None
    ).to(cell.device)
    loaded = reset_peak(cell.device)
    started = time.perf_counter()
    erasure = esd_fast.erase(pipeline, **cell.settings)
    if cuda:
        torch.cuda.synchronize(cell.device)
    return {
        "seconds": time.perf_counter() - started,
        "unet_passes": erasure.manifest["unet_passes"]["total"],
        "peak_memory_bytes": peak(cell.device),
        "loaded_memory_bytes": loaded,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
    }


def row_of(cell: Cell, measured: Sequence[dict[str, Any]]) -> Row:
    timing = Timing(tuple(m["seconds"] for m in measured), measured[0]["seconds"])
    columns = timing.columns() | {"first_seconds": None}
    return Row(
        suite="scale",
        case=f"{cell.question}={cell.value}",
        contestant="esd_fast",
        device=cell.device,
        dtype=measured[0]["dtype"],
        samples_per_second=cell.samples / timing.median,
        unet_passes=measured[0]["unet_passes"],
        peak_memory_bytes=max(m["peak_memory_bytes"] for m in measured),
        loaded_memory_bytes=int(statistics.median(m["loaded_memory_bytes"] for m in measured)),
        **columns,
    )


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """Seconds (left axis) and memory above the loaded model (right) against each question."""
    for axes, question in zip(figure.subplots(1, len(QUESTIONS)), QUESTIONS, strict=True):
        mine = [r for r in rows if r.case.startswith(question + "=") and r.seconds]
        values = [int(r.case.partition("=")[2]) for r in mine]
        draw(axes, values, [r.seconds or 0.0 for r in mine], "seconds", "C0")
        axes.set(xlabel=question, xlim=(0, 1.1 * max(values, default=1)))
        extra = [((r.peak_memory_bytes or 0) - (r.loaded_memory_bytes or 0)) / 2**20 for r in mine]
        draw(axes.twinx(), values, extra, "MiB above the loaded model", "C1")
        axes.grid(alpha=0.3)


def draw(
    axes: Axes, values: Sequence[int], heights: Sequence[float], name: str, colour: str
) -> None:
    """From zero, so that growth in proportion is a line through the corner."""
    axes.plot(values, heights, marker="o", color=colour)
    axes.set_ylabel(name, color=colour)
    axes.set_ylim(0, 1.1 * max(heights, default=1.0))
