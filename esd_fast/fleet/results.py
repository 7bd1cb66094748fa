"""A fleet's folder: the erasure of each job, what is there already, and the table of all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd_fast.files import replacing
from esd_fast.repeating import mapping
from esd_fast.terminal import quoted

from .jobs import Job
from .outcomes import Failed, Made

# speed and memory alone, or what they came from; of a device the manifest says which it was
FREE = {
    *("given", "preset", "device", "vram", "checkpointing", "cuda_graphs", "collect_batch_size"),
    "allow_pickle",
}
SHOWN = 50  # rows on a screen


@dataclass(frozen=True)
class Row:
    """`status`: "done", "there" (of an earlier run), "failed" or "not run". `passes`: of the UNet.
    `reason`: why it failed, or what was warned of."""

    job: str
    status: str
    seconds: float | None = None
    passes: int | None = None
    final_loss: float | None = None
    file: str = ""
    reason: str = ""

    @classmethod
    def of(cls, job: Job, status: str, manifest: Mapping[str, Any], reason: str = "") -> Row:
        losses = manifest.get("losses")
        return cls(
            label(job),
            status,
            number_in(mapping(manifest.get("seconds")).get("total")),
            number_in(mapping(manifest.get("unet_passes")).get("total")),
            number_in(losses[-1] if isinstance(losses, list) and losses else None),
            job.file_name,
            reason,
        )


def number_in(value: Any) -> Any:
    """None for what is no number: the manifest may be of any file."""
    return value if isinstance(value, (int, float)) else None


def label(job: Job) -> str:
    return job.file_name.removesuffix(".safetensors")


def kept(job: Job, outcome: Made | Failed, folder: Path) -> Row:
    """Writes what was made."""
    if isinstance(outcome, Failed):
        return Row(label(job), "failed", reason=outcome.reason)
    with replacing(folder / job.file_name) as temporary:
        temporary.write_bytes(outcome.file)
    return Row.of(job, "done", outcome.manifest, "; ".join(outcome.notes))


def manifest_there(job: Job, folder: Path, model: str) -> dict[str, Any] | None:
    """Of the finished erasure of this very job; None where no file is in its place. Raises
    FileExistsError where something else is there."""
    from esd_fast.repeating import manifest_in

    file = folder / job.file_name
    if not file.exists():
        return None
    try:
        manifest = manifest_in(file)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"{error}; --overwrite replaces it") from None
    other = difference(job, manifest, model)
    if other:
        raise FileExistsError(f"{file} is another erasure: {other}; --overwrite replaces it")
    return manifest


def difference(job: Job, manifest: Mapping[str, Any], model: str) -> str:
    """What `manifest` has other than an erasure of `job` would; empty for nothing."""
    from esd_fast.models.base import general_prompts_of
    from esd_fast.models.families import FAMILIES

    if manifest.get("model") != model:
        return f"model {quoted(manifest.get('model'))}, not {quoted(model)}"
    families = {family.name: family for family in FAMILIES}
    family, was = families.get(str(manifest.get("family"))), manifest.get("config")
    if family is None or not isinstance(was, dict):
        return "it does not say how it was made"
    for name in ("interrupted", "hardening", "extra_concepts", "given"):
        if manifest.get(name):
            return f"its manifest says {name!r}"
    config = job.config.completed(family, general_prompts_of(model))
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    names = [n for n in now if n not in FREE and was.get(n) != now[n]]
    return ", ".join(f"{n} {quoted(was.get(n))}, not {quoted(now[n])}" for n in names[:3])


def write_tables(folder: Path, rows: Sequence[Row], told: Mapping[str, Any]) -> None:
    """fleet.csv and fleet.json; `told`: what the latter says of all."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    jobs = [dataclasses.asdict(row) for row in rows]
    table.writerows(jobs)
    for name, content in (
        ("fleet.csv", text.getvalue()),
        ("fleet.json", json.dumps({**told, "jobs": jobs}, indent=1)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(content)


def screen_table(rows: Sequence[Row]) -> str:
    """For a terminal: all jobs, or of many those that came to nothing."""
    shown = rows if len(rows) <= SHOWN else [r for r in rows if r.status in ("failed", "not run")]
    if not shown:
        return ""
    lines = [("job", "status", "seconds", "passes", "final loss", "")]
    lines += [
        (
            row.job if len(row.job) <= 48 else row.job[:45] + "...",
            row.status,
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.passes is None else str(row.passes),
            "" if row.final_loss is None else f"{row.final_loss:.4g}",
            row.reason,
        )
        for row in shown[:SHOWN]
    ]
    wide = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [
        "  ".join(
            [line[0].ljust(wide[0]), line[1].ljust(wide[1])]
            + [line[column].rjust(wide[column]) for column in (2, 3, 4)]
            + [line[5]]
        ).rstrip()
        for line in lines
    ]
    return "\n".join(text + (["..."] if len(shown) > SHOWN else []))
