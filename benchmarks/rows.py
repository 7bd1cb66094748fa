"""What a benchmark measured, one row a measurement, and where rows go: screen, CSV, JSON."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement. What a suite does not measure stays None (an empty cell, null in JSON)."""

    suite: str
    case: str  # what was run: a shape, a concept, a resolution
    contestant: str  # esd_fast, reference, paper, lora, eager, compiled, floor, ...
    device: str = ""
    dtype: str = ""
    seconds: float | None = None  # median over `repeats`
    seconds_p10: float | None = None
    seconds_p90: float | None = None
    repeats: int | None = None
    first_seconds: float | None = None  # of the first call, compilation and warm-up included
    over_floor: float | None = None  # seconds / the floor's, measured in the same run
    samples_per_second: float | None = None
    tflops: float | None = None  # per second
    gigabytes_per_second: float | None = None
    unet_passes: int | None = None
    peak_memory_bytes: int | None = None
    loaded_memory_bytes: int | None = None  # resident before the measured part began
    concept: str | None = None
    seed: int | None = None
    UA: float | None = None  # share of the erased concept's pictures no longer recognised
    IRA: float | None = None  # share recognised: other concepts of its domain
    CRA: float | None = None  # share recognised: concepts of the other domain
    note: str = ""  # which path ran, or why there is no number

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured; two rows with one key are two measurements of the same."""
        return (
            self.suite,
            self.case,
            self.contestant,
            self.device,
            self.dtype,
            self.concept,
            self.seed,
        )


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(r) for r in rows)


def write_json(rows: Sequence[Row], machine: dict[str, Any], path: Path) -> None:
    """`machine`: commit, versions, date and the like, the same for all rows; put into each."""
    table = [{**dataclasses.asdict(r), **machine} for r in rows]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"machine": machine, "rows": table}, indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    table = json.loads(path.read_text())["rows"]
    return [Row(**{c: r[c] for c in COLUMNS if c in r}) for r in table]


def read_machine(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["machine"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary`: written beside its place, then renamed."""
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def show(rows: Sequence[Row], title: str) -> None:
    """A table on the screen with the columns that hold anything."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = [
        c for c in COLUMNS if c != "suite" and any(getattr(r, c) not in (None, "") for r in rows)
    ]
    for column in columns:
        number = any(isinstance(getattr(r, column), (int, float)) for r in rows)
        table.add_column(HEADINGS.get(column, column), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(shown(column, getattr(row, column)) for column in columns))
    Console(width=None if Console().is_terminal else 200).print(table)


HEADINGS = {
    "seconds_p10": "p10",
    "seconds_p90": "p90",
    "first_seconds": "first",
    "over_floor": "x floor",
    "samples_per_second": "samples/s",
    "tflops": "TFLOP/s",
    "gigabytes_per_second": "GB/s",
    "unet_passes": "passes",
    "peak_memory_bytes": "peak MiB",
    "loaded_memory_bytes": "loaded MiB",
}


def shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("UA", "IRA", "CRA"):
        return f"{value:.1%}"
    if column.endswith("_bytes"):
        return f"{value / 2**20:,.0f}"
    if column.startswith("seconds") or column == "first_seconds":
        return duration(value)
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
