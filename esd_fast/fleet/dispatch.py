"""Which worker does which job, and what is done about a worker that dies."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from .jobs import Job
from .outcomes import Failed, Lost, Made, Outcome, Unusable

TRIES = 2  # of a job whose worker dies
DEATHS = 4  # in a row, of one worker, after which it is not started again


class Pool(Protocol):
    """Workers by number, from 0. None of these calls but `wait` takes long."""

    size: int

    def give(self, worker: int, job: Job) -> None:
        """To one that is idle."""

    def wait(self) -> tuple[int, Outcome]:
        """Which ended its job first, and how."""

    def renew(self, worker: int) -> None:
        """Start another process in place of one that is lost."""


def dispatched(jobs: Sequence[Job], pool: Pool) -> Iterator[tuple[Job, Made | Failed]]:
    """Each job once, as they end. One whose worker dies is tried again, once: whatever took the
    worker may have been another's doing."""
    waiting, idle = deque(jobs), deque(range(pool.size))
    busy: dict[int, Job] = {}
    tries, deaths = Counter[str](), Counter[int]()
    why = ""
    while busy or (waiting and idle):
        while waiting and idle:
            worker = idle.popleft()
            busy[worker] = waiting.popleft()
            pool.give(worker, busy[worker])
        worker, outcome = pool.wait()
        job = busy.pop(worker)
        if isinstance(outcome, Unusable):
            why = outcome.reason
            waiting.appendleft(job)
            continue
        idle.append(worker)
        if not isinstance(outcome, Lost):
            deaths[worker] = 0
            yield job, outcome
            continue
        tries[job.file_name] += 1
        deaths[worker] += 1
        if tries[job.file_name] < TRIES:
            waiting.appendleft(job)
        else:
            yield job, Failed(f"its worker died, twice: {outcome.reason}")
        if deaths[worker] < DEATHS:
            pool.renew(worker)
        else:
            idle.remove(worker)
            why = outcome.reason
    for job in waiting:
        yield job, Failed(f"no worker is left: {why}")
