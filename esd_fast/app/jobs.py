"""One job at a time, the others in a queue; each belongs to the browser that asked for it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from esd_fast.pages import give_back_pages

State = Literal["waiting", "running", "finished", "stopped", "failed"]
UNDONE = ("waiting", "running")
REMEMBERED = 20  # ended jobs of a browser


class QueueFullError(RuntimeError):
    """Too many jobs wait already."""


class Cancelled(Exception):
    """Raised by a job that ends early since it was asked to; what it says is shown."""


@dataclass(eq=False)
class Job:
    """`work` is called with the job itself; it looks at `cancelled`, and may put anything into
    `progress`, and what came of it into `result`."""

    owner: str
    title: str
    work: Callable[[Job], None] = field(repr=False)
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "waiting"
    message: str = ""
    progress: Any = None
    result: Any = None
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def cancelled(self) -> bool:
        return self.stop.is_set()

    @property
    def undone(self) -> bool:
        return self.state in UNDONE


class JobQueue:
    """A thread that does the jobs in their order. `told`: an error in words that may be shown."""

    def __init__(
        self,
        each: int = 3,
        all_together: int = 20,
        told: Callable[[Exception], str] = str,
    ) -> None:
        self.each, self.all_together, self.told = each, all_together, told
        self.jobs: list[Job] = []
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="esd-fast jobs", daemon=True)
        self.thread.start()

    def submit(self, owner: str, title: str, work: Callable[[Job], None]) -> Job:
        """Raises QueueFullError where the browser, or all of them, have too many undone."""
        job = Job(owner, title, work)
        with self.changed:
            undone = [j for j in self.jobs if j.undone]
            mine = sum(j.owner == owner for j in undone)
            if mine >= self.each:
                raise QueueFullError(f"you have {mine} jobs that are not done; wait, or cancel one")
            if len(undone) >= self.all_together or self.closed:
                raise QueueFullError(f"{len(undone)} jobs wait already; try again later")
            self.jobs.append(job)
            self.forget_old(owner)
            self.changed.notify_all()
        return job

    def forget_old(self, owner: str) -> None:
        ended = [j for j in self.jobs if j.owner == owner and not j.undone]
        for job in ended[:-REMEMBERED]:
            self.jobs.remove(job)

    def of(self, owner: str) -> list[Job]:
        """A browser's own, the newest first."""
        with self.changed:
            return [j for j in reversed(self.jobs) if j.owner == owner]

    def ahead(self, job: Job) -> int:
        """How many, of whomever, come before it."""
        with self.changed:
            undone = [j for j in self.jobs if j.undone]
        return undone.index(job) if job in undone else 0

    def cancel(self, owner: str, key: str) -> bool:
        """A waiting job is gone at once, a running one stops at its next step. False where there
        is no such job of this browser, or it is done."""
        with self.changed:
            for job in self.jobs:
                if job.owner == owner and job.key == key and job.undone:
                    job.stop.set()
                    if job.state == "waiting":
                        job.state, job.message = "stopped", "Cancelled before it began."
                    self.changed.notify_all()
                    return True
        return False

    def close(self, timeout: float | None = None) -> None:
        """Cancel everything and wait until the running job has put its work away."""
        with self.changed:
            self.closed = True
            undone = [(j.owner, j.key) for j in self.jobs if j.undone]
        for owner, key in undone:
            self.cancel(owner, key)
        with self.changed:
            self.changed.notify_all()
        self.thread.join(timeout)

    def run(self) -> None:
        while (job := self.next()) is not None:
            state: State = "finished"
            try:
                job.work(job)
            except Cancelled as why:
                state, job.message = "stopped", str(why)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the next job runs
                state, job.message = "failed", self.told(error)
            give_back_pages()  # the process keeps them otherwise (commands/app.py)
            with self.changed:
                job.state = state
                self.changed.notify_all()

    def next(self) -> Job | None:
        """Waits for one; None where the queue is closed."""
        with self.changed:
            while True:
                for job in self.jobs:
                    if job.state == "waiting":
                        job.state = "running"
                        return job
                if self.closed:
                    return None
                self.changed.wait()
