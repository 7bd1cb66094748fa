"""The work of one job: erase, let it be watched, and leave a run's folder as `esd-fast train` does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jobs import Cancelled, Job
from .library import Library
from .models_offered import EMBEDDED, OfferedModels
from .planning import proof_of
from .studio import Studio
from .wishes import Wish

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.erasure import Erasure
    from esd_fast.esd import Progress
    from esd_fast.evaluation.markup import Html
    from esd_fast.evaluation.pictures import GridRow
    from esd_fast.evaluation.proof import Proof
    from esd_fast.models import Model
    from esd_fast.run_state import Checkpoints, RunState

FIRST_LOOK = 0.2  # of the steps, before pictures are drawn for the first time
SHARE = 0.2  # of the time that pictures on the way may take


@dataclass(frozen=True, eq=False)
class Look:
    """One picture of each prompt, before and as it is after `step` steps."""

    rows: tuple[GridRow, ...]
    step: int

    @cached_property
    def html(self) -> Html:
        """Made once: it is sent every second."""
        from .shown import before_and_now

        return before_and_now(self)


@dataclass(frozen=True)
class Seen:
    """What a watcher is shown of a job."""

    phase: str
    """"load", "draw before", "prepare", "collect", "fit", "draw after"."""
    done: int = 0
    total: int = 0
    losses: tuple[float, ...] = ()
    look: Look | None = None
    steps: int = 0
    """Of the whole training."""
    began: float = 0.0
    """time.monotonic(), of the phase."""


@dataclass
class Erasing:
    """A job's work on a fresh model; `resume`: the folder of a stopped run to go on with."""

    wish: Wish
    owner: str
    offered: OfferedModels
    library: Library
    studio: Studio
    resume: Path | None = None
    losses: list[float] = field(default_factory=list)
    next_look: float = 0.0  # time.monotonic()

    def __call__(self, job: Job) -> None:
        from esd_fast.esd import EraseInterrupted
        from esd_fast.run_state import Checkpoints, forget_checkpoints

        started = time.time()
        with self.studio.turns.turn():
            if self.wish.model != EMBEDDED:
                self.studio.forget()  # two big models at once may be one too many
            job.progress = Seen("load", began=time.monotonic())
            state, config = self.configured()
            model = self.studio.loaded(self.wish.model)
            config = config.with_recipe(model.family)
            loaded = time.time()
            proof = proof_of(model, config, self.wish.proof)
            before = self.drawn(job, model, proof, "draw before")
            drawn = time.time()
            self.tell(job, Seen("prepare", began=time.monotonic()))
            folder = self.resume or self.library.new_folder(
                config.concepts, self.owner, proof=self.wish.proof
            )
            erasure, why = None, None
            try:
                watch = self.watcher(job, model, proof, before, config.iterations)
                erasure = erased(model, config, Checkpoints(folder), state, watch)
            except EraseInterrupted as caught:
                if caught.erasure.manifest["losses"]:
                    erasure, why = caught.erasure, caught
            finally:
                if erasure is None and self.resume is None:
                    self.library.discard(folder)
            if erasure is None:
                raise self.came_to_nothing()
            save(erasure, folder)
            self.library.forget_exports(folder)
            job.result = folder.name
            if why is None:
                forget_checkpoints(folder)
            report = self.report(erasure, model)
            report["seconds"] |= {"load": loaded - started, "draw_before": drawn - loaded}
            after: list[Any] = []
            if why is None:
                trained = time.time()
                with contextlib.suppress(Cancelled):  # the erasure is there all the same
                    after = self.drawn(job, model, proof, "draw after")
                report["seconds"]["draw_after"] = time.time() - trained
                if after:
                    look = Look(tuple(proof.rows(before, after)), len(self.losses))
                    self.tell(job, Seen("draw after", losses=tuple(self.losses), look=look))
            write(folder, report, proof, before, after, erasure, started)
            if why is not None:
                taken = len(erasure.manifest["losses"])
                raise Cancelled(f"Stopped after {taken} of {config.iterations} steps, and kept.")

    def configured(self) -> tuple[RunState | None, EraseConfig]:
        if self.resume is None:
            return None, self.wish.config(self.offered, self.library.limits, self.studio.device)
        from esd_fast.run_state import config_in, newest_state

        state = newest_state(self.resume)
        self.losses[:] = state.losses
        return state, config_in(state)

    def report(self, erasure: Erasure, model: Model) -> dict[str, Any]:
        from esd_fast.commands.train import report_of

        return report_of(erasure, model)

    def came_to_nothing(self) -> Cancelled:
        why = "it is as it was." if self.resume else "there is nothing to keep."
        return Cancelled(f"Stopped before a step was taken: {why}")

    def drawn(self, job: Job, model: Model, proof: Proof, phase: str) -> list[Any]:
        """Raises Cancelled between two batches."""
        if not proof.shots:
            return []
        began = time.monotonic()

        def tell(done: int, total: int) -> None:
            self.tell(job, Seen(phase, done, total, tuple(self.losses), began=began))
            if job.cancelled:
                raise self.came_to_nothing()
            self.studio.turns.give_way()

        tell(0, len(proof.shots))
        return proof.draw(model.pipeline, tell)

    def watcher(
        self, job: Job, model: Model, proof: Proof, before: list[Any], steps: int
    ) -> Callable[[Progress], None]:
        """Shows each step; now and then pictures. Raises KeyboardInterrupt, as Ctrl-C would, where
        the job is cancelled: the work so far is handed out, and a checkpoint kept."""
        look = replace(proof, columns=min(1, proof.columns), erased=(), kept=())
        firsts = [before[i * proof.columns] for i in range(len(look.shots))]
        began: dict[str, float] = {}

        def tell(progress: Progress) -> None:
            if progress.loss is not None:
                self.losses.append(progress.loss)
            start = began.setdefault(progress.phase, time.monotonic())
            seen = Seen(
                *(progress.phase, progress.done, progress.total),
                losses=tuple(self.losses),
                steps=steps,
                began=start,
            )
            self.tell(job, seen)
            if job.cancelled:
                raise KeyboardInterrupt
            if progress.phase == "fit" and look.shots and self.time_to_look(progress):
                now = time.monotonic()
                rows = look.rows(firsts, look.draw(model.pipeline, lambda *_: None))
                self.tell(job, replace(seen, look=Look(tuple(rows), progress.done)))
                self.next_look = time.monotonic() + (time.monotonic() - now) * (1 / SHARE - 1)
            self.studio.turns.give_way()

        return tell

    def time_to_look(self, progress: Progress) -> bool:
        early = progress.done < FIRST_LOOK * progress.total
        return not early and progress.done < progress.total and time.monotonic() >= self.next_look

    def tell(self, job: Job, seen: Seen) -> None:
        """Pictures stay until there are newer ones."""
        if seen.look is None and isinstance(job.progress, Seen):
            seen = replace(seen, look=job.progress.look)
        job.progress = seen


def erased(
    model: Model,
    config: EraseConfig,
    checkpoints: Checkpoints,
    state: RunState | None,
    watch: Callable[[Progress], None],
) -> Erasure:
    from esd_fast.esd import run

    return run(model, config, checkpoints=checkpoints, resume=state, on_progress=watch)


def save(erasure: Erasure, folder: Path) -> None:
    from esd_fast.commands.train import save as written

    written(erasure, folder)


def write(
    folder: Path,
    report: dict[str, Any],
    proof: Proof,
    before: list[Any],
    after: list[Any],
    erasure: Erasure,
    started: float,
) -> None:
    """Report and pictures; without the latter where none were drawn after."""
    from esd_fast.commands.train import write_pictures
    from esd_fast.evaluation.report import write_report

    rows = []
    if after:
        report |= proof.results(before, after)
        rows = proof.rows(before, after)
    write_pictures(folder, rows, erasure.manifest["concept"], erasure.manifest["losses"])
    report["seconds"]["total"] = time.time() - started
    write_report(folder, report)
