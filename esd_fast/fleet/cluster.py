"""Ray: the only file that imports it. A cluster joined or started, and workers on it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from esd_fast.config import refuse
from esd_fast.terminal import one_line

from .jobs import Job
from .outcomes import Lost, Outcome

MISSING = "a fleet runs on Ray: pip install 'esd-fast[fleet]'"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# of a process that starts a cluster: without several machines (Ray has the switch for other
# systems) it listens on 127.0.0.1 alone; and its workers, who do all the work, are as nice as it is
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}


@dataclass(frozen=True)
class Share:
    """What each of `workers` gets of the cluster."""

    workers: int
    cpus: int
    gpus: int = 0

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, float]], workers: int | None, device: str) -> Share:
        """A GPU each where there are some, unless `device` is "cpu"; as many cores as all of them
        can have. `workers` None: one a GPU, or one a node. `nodes`: Ray's "CPU" and "GPU" of each.
        Raises ValueError where there is not enough.
        """
        cores = [int(node.get("CPU", 0)) for node in nodes]
        cards = [int(node.get("GPU", 0)) for node in nodes]
        gpus = sum(cards)
        if device == "cuda" and gpus == 0:
            refuse("--device", device, "cpu or auto: the cluster has no GPU")
        if device != "cpu" and gpus:
            workers = workers or gpus
            if workers > gpus:
                refuse("--workers", workers, f"at most {gpus}, the cluster's GPUs")
            fitting = [
                cpus
                for cpus in range(1, max(cores) + 1)
                if sum(min(g, c // cpus) for g, c in zip(cards, cores, strict=True)) >= workers
            ]
            return cls(workers, max(fitting, default=0), 1)
        workers = workers or len([c for c in cores if c > 0])
        if workers > sum(cores) or not workers:
            refuse("--workers", workers, f"at most {sum(cores)}, the cluster's CPUs")
        counts = range(1, max(cores) + 1)
        return cls(workers, max(n for n in counts if sum(c // n for c in cores) >= workers))


class RayPool:
    """A dispatch.Pool of actors, each a `kind(*arguments)`, with a method `erase`."""

    def __init__(self, share: Share, kind: type, arguments: Sequence[Any]) -> None:
        import ray

        actor = ray.remote(kind)
        resources = {"num_cpus": share.cpus, "num_gpus": share.gpus}
        self.size = share.workers
        self.start = lambda: actor.options(**resources).remote(*arguments)
        self.actors = [self.start() for _ in range(self.size)]
        self.running: dict[Any, int] = {}

    def give(self, worker: int, job: Job) -> None:
        self.running[self.actors[worker].erase.remote(job.config)] = worker

    def wait(self) -> tuple[int, Outcome]:
        import ray

        done, _ = ray.wait(list(self.running), num_returns=1)
        worker = self.running.pop(done[0])
        try:
            return worker, ray.get(done[0])
        except Exception as error:  # noqa: BLE001 -- whatever it is, the job did not end
            return worker, Lost(reason_of(error))

    def renew(self, worker: int) -> None:
        import ray

        ray.kill(self.actors[worker])
        self.actors[worker] = self.start()


def reason_of(error: Exception) -> str:
    """Of Ray's many lines those that say what happened."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {one_line(str(cause))}"
    lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
    return one_line(" ".join(lines))[:300]


def check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise RuntimeError(MISSING)


@contextmanager
def cluster(
    address: str | None = None, cores: int | None = None
) -> Iterator[list[dict[str, float]]]:
    """Within: Ray runs; what each of its nodes has. One that runs in this process already is
    taken, and left running; without an address one is started on this machine, for this process,
    with so many cores (None: all).

    Raises RuntimeError where Ray is missing, ConnectionError where nothing is at the address.
    """
    check_installed()
    with environment({**QUIET, **({} if address else LOCAL)}):
        import ray

        if ray.is_initialized():
            yield nodes_there()
            return
        own = {} if address else {"num_cpus": cores or len(os.sched_getaffinity(0))}
        try:
            # workers look for packages where it starts: not in a checkout that someone stands in
            with same_handlers(), contextlib.chdir(os.sep):
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    **own,
                )
            yield nodes_there()
        finally:  # of a start that was interrupted as well
            ray.shutdown()


def nodes_there() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within: these variables, where they are not set already. Ray's processes inherit them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def same_handlers() -> Iterator[None]:
    """After: SIGTERM as it was handled before. Ray's own handler would end the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGTERM, before)
