"""`esd-fast fleet`: the jobs of a file over the workers of a cluster, an erasure each."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from esd_fast.config import EraseConfig, check_count, refuse
from esd_fast.demo import is_embedded, model_path
from esd_fast.files import check_outside, output_folder
from esd_fast.fleet.jobs import BadJobs, Job, read_jobs
from esd_fast.fleet.outcomes import Failed, Made
from esd_fast.fleet.results import (
    Row,
    kept,
    label,
    manifest_there,
    screen_table,
    write_tables,
)
from esd_fast.interrupts import sigterm_interrupts
from esd_fast.prompt_list import read_prompts
from esd_fast.terminal import tell

from .console import quiet_libraries

LINES = 20  # of problems on a screen


def fleet(arguments: argparse.Namespace) -> int:
    """Exit code 0; 1 where a job failed; 130 after Ctrl-C or SIGTERM, with what is done kept."""
    if arguments.workers is not None:
        check_count("--workers", arguments.workers, 10_000)
    if arguments.device not in (None, "auto", "cpu", "cuda"):
        refuse("--device", arguments.device, "auto, cpu or cuda: Ray says which of them")
    model = absolute(arguments.model)
    folder = Path(arguments.output)
    check_outside(folder, model)
    try:
        jobs = read_jobs(Path(arguments.jobs), model, defaults_of(arguments))
    except BadJobs as error:
        list_problems(error.problems)
        raise
    work = Work.of(jobs, folder, model, arguments)
    if not work.rows and arguments.address is None:  # elsewhere, workers find out
        quiet_libraries()
        from esd_fast.models import look_at

        look_at(str(model_path() if model is None else model), jobs[0].config.loading)
    with output_folder(folder):
        return worked_off(work, arguments)


def absolute(source: str | None) -> str | None:
    """Workers have working directories of their own."""
    if source is None or not Path(source).exists():
        return source
    return str(Path(source).absolute())


def defaults_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(EraseConfig)} - {"concept"}
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    given["model_config"] = absolute(arguments.model_config)
    if arguments.preserve_file is not None:
        listed = [case.prompt for case in read_prompts(arguments.preserve_file)]
        given["preserve"] = [*(given["preserve"] or ()), *listed]
    return given


def list_problems(problems: list[str]) -> None:
    for problem in problems[:LINES]:
        tell(problem, sys.stderr)
    if len(problems) > LINES:
        tell(f"... and {len(problems) - LINES} more", sys.stderr)


@dataclass
class Work:
    """`rows`: by file name, what is known of a job so far. `base`: the digest of the model that
    the erasures which are there came from; None where none is."""

    jobs: list[Job]
    folder: Path
    model: str | None
    rows: dict[str, Row]
    base: str | None

    @classmethod
    def of(
        cls, jobs: list[Job], folder: Path, model: str | None, arguments: argparse.Namespace
    ) -> Work:
        """Raises FileExistsError where other files are in the way."""
        name = "embedded" if is_embedded(model) else str(model)
        rows, problems, bases = {}, [], set()
        for job in jobs:
            try:
                manifest = manifest_there(job, folder, name)
            except FileExistsError as error:
                problems.append(f"{arguments.jobs}, line {job.line}: {error}")
                continue
            if manifest is not None:
                rows[job.file_name] = Row.of(job, "there", manifest)
                bases.add(manifest.get("base_digest"))
        if problems and not arguments.overwrite:
            list_problems(problems)
            raise FileExistsError(
                f"{folder}: files in the way: {len(problems)}; nothing was started"
            )
        if len(bases) > 1:
            raise ValueError(f"{folder} holds erasures of several models; name another --output")
        return cls(jobs, folder, model, rows, next(iter(bases), None))

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.file_name not in self.rows]

    def keep(self, job: Job, outcome: Made | Failed) -> None:
        if isinstance(outcome, Made):
            digest = outcome.manifest["base_digest"]
            self.base = self.base or digest
            if digest != self.base:
                outcome = Failed(
                    f"its worker's model has the digest {digest}, that of the others {self.base}: "
                    "another model, dtype or scheduler"
                )
        self.rows[job.file_name] = kept(job, outcome, self.folder)

    def table(self) -> list[Row]:
        return [self.rows.get(job.file_name) or Row(label(job), "not run") for job in self.jobs]


def worked_off(work: Work, arguments: argparse.Namespace) -> int:
    started, interrupted = time.time(), False
    if work.waiting:
        try:
            with sigterm_interrupts():
                erase_all(work, arguments)
        except KeyboardInterrupt:
            interrupted = True
    rows = work.table()
    counts = {s: sum(row.status == s for row in rows) for s in ("done", "there", "failed")}
    told = {"model": work.model or "embedded", "seconds": time.time() - started, **counts}
    write_tables(work.folder, rows, told)
    tell(screen_table(rows))
    tell(
        f"{len(rows)} jobs: {counts['done']} done, {counts['there']} were there, "
        f"{counts['failed']} failed; all of them: {work.folder / 'fleet.csv'}"
    )
    if interrupted:
        tell("interrupted: what is done is kept, and the same command goes on", sys.stderr)
        return 130
    return 1 if counts["failed"] else 0


def erase_all(work: Work, arguments: argparse.Namespace) -> None:
    from esd_fast.fleet.cluster import RayPool, Share, cluster
    from esd_fast.fleet.dispatch import dispatched
    from esd_fast.fleet.worker import Worker

    with cluster(arguments.address) as nodes:
        share = Share.of(nodes, arguments.workers, arguments.device or "auto")
        each = "a GPU" if share.gpus else f"{share.cpus} of the CPU's cores"
        tell(f"{len(work.waiting)} jobs for {share.workers} workers with {each} each", sys.stderr)
        threads = None if share.gpus else share.cpus
        pool = RayPool(share, Worker, (work.model, work.jobs[0].config, threads, work.base))
        failed = 0
        with tqdm(total=len(work.jobs), initial=len(work.rows), desc="erase", unit="job") as bar:
            bar.set_postfix(failed=failed)
            for job, outcome in dispatched(work.waiting, pool):
                work.keep(job, outcome)
                failed += work.rows[job.file_name].status == "failed"
                bar.set_postfix(failed=failed, refresh=False)
                bar.update()
