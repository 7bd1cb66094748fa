"""An SD 1.x-shaped UNet on the CPU at 256 px: what packing, kept pages and bfloat16 bring, each and together.

The allocator's setting is one of a whole process, so every contestant has a process of its own, and they take
turns: one works, the others wait. `floor`: the arithmetic of the packed step (floor.py), in its process, each
call with its operands in the cache if they fit. `profile`: where that step's time goes (torch.profiler).
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import floor
import torch
from measure import Settings, interleaved
from rows import Row

from esd_fast.commands.console import quiet_libraries
from esd_fast.pages import keep_pages
from suites import step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPEATS = 3
MEMORY = 19 * 2**30  # of all contestants at full size
MAKERS = {"guided step": step.guided_esd_fast, "fit step": step.fit_esd_fast}


@dataclass(frozen=True)
class Contestant:
    name: str
    kind: str  # "packed" or "eager"
    dtype: torch.dtype
    kept: bool  # pages

    @property
    def note(self) -> str:
        return "pages kept" if self.kept else "glibc's defaults"


CONTESTANTS = (
    Contestant("eager", "eager", torch.float32, False),
    Contestant("eager", "eager", torch.bfloat16, False),
    Contestant("eager, pages kept", "eager", torch.bfloat16, True),
    Contestant("packed, glibc's defaults", "packed", torch.bfloat16, False),
    Contestant("packed, pages kept", "packed", torch.bfloat16, True),
)
FLOOR = CONTESTANTS[4]


class Worker:
    """A contestant in a process of its own, that works when it is called."""

    def __init__(self, contestant: Contestant, job: step.Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        threads = torch.get_num_threads()
        self.process = context.Process(target=work, args=(far, contestant, job, threads))
        self.process.start()
        self.processor_seconds: list[float] = []  # of every answer

    def ask(self, what: str) -> Any:
        self.pipe.send(what)
        answer, seconds = self.pipe.recv()
        if what in step.STEPS:
            self.processor_seconds.append(seconds)
        return answer

    def close(self) -> None:
        self.pipe.send("")
        self.process.join()


def work(pipe: Connection, contestant: Contestant, job: step.Job, threads: int) -> None:
    """ "guided step" or "fit step": does one; with "floor of " before it, a round of the floor; with "bare "
    before it, the floor's seconds so far; with "profile of " before it, the seconds of each kind of work."""
    if contestant.kept:
        keep_pages()
    quiet_libraries()
    torch.set_num_threads(threads)
    made = step.work_on(step.built(job), job)
    steps: dict[str, Callable[[], object]] = {}
    floors: dict[str, floor.Replay] = {}
    while asked := pipe.recv():
        started = time.process_time()
        kind = next(k for k in step.STEPS if asked.endswith(k))
        if kind not in steps:
            plain = step.STEPS[kind]["eager"]
            fast = step.packed(MAKERS[kind], copied=False)
            steps[kind] = (fast if contestant.kind == "packed" else plain)(made)
        if asked == kind:
            steps[kind]()
        elif asked.startswith("floor of "):
            if kind not in floors:
                floors[kind] = floor.Replay(floor.record(steps[kind]), "cpu")
            floors[kind].round()
        answer: Any = None
        if asked.startswith("bare "):
            answer = floors[kind].floor()
        elif asked.startswith("profile of "):
            answer = profile_of(steps[kind])
        pipe.send((answer, time.process_time() - started))


# beginnings of the names that torch.profiler gives
WORK = {
    "convolutions": ("mkldnn::_convolution", "aten::mkldnn_conv", "aten::convolution"),
    "matrix products": ("mkldnn::_linear", "aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "norms and activations": (
        "Direct",  # the operators of esd_fast.ops
        *(f"aten::{op}" for op in ("native_layer_norm", "native_group_norm", "silu", "gelu")),
    ),
    "optimizer": ("aten::_fused_adam",),
    "copies, casts, joins": tuple(f"aten::{op}" for op in ("copy_", "_to_copy", "cat", "fill_")),
    "sums, products": tuple(f"aten::{op}" for op in ("add", "mul", "div", "sum", "sub")),
}


def profile_of(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one step by kind of work, and "the rest": Python, allocation, whatever has no name here."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        run()
        rest = time.perf_counter() - started
    found = dict.fromkeys(WORK, 0.0)
    for event in profiler.key_averages():
        for kind, names in WORK.items():
            if event.key.startswith(names):
                found[kind] += event.self_cpu_time_total / 1e6
                break
    return found | {"the rest": rest - sum(found.values())}


def run(settings: Settings) -> Iterator[Row]:
    if step.on_cuda(settings.device):
        return
    free = step.available_memory()
    if free < MEMORY and not settings.quick:
        note = f"needs {MEMORY / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are available"
        yield Row("cpu", "SD 1.x 256 px", "all", device="cpu", note=note)
        return
    repeats = 1 if settings.quick else REPEATS
    pixels = 64 if settings.quick else 256
    for kind in step.STEPS:
        workers = {
            c: Worker(c, step.Job("sd1", pixels, "cpu", c.dtype, settings.quick))
            for c in CONTESTANTS
        }
        try:
            runs: dict[Any, Callable[[], object]] = {
                c: lambda w=w, kind=kind: w.ask(kind) for c, w in workers.items()
            }
            for run_once in runs.values():  # loads, and packs what it will hold
                run_once()
                run_once()
            runs["floor"] = lambda w=workers[FLOOR], kind=kind: w.ask(f"floor of {kind}")
            for worker in workers.values():
                worker.processor_seconds.clear()
            timings = interleaved(runs, "cpu", repeats)
            taken = {c: statistics.median(w.processor_seconds[1:]) for c, w in workers.items()}
            bare = workers[FLOOR].ask(f"bare {kind}")
            profile = workers[FLOOR].ask(f"profile of {kind}")
        finally:
            for worker in workers.values():
                worker.close()
        case = f"SD 1.x {pixels} px, {kind}"
        for c in CONTESTANTS:
            timing = timings[c]
            yield Row(
                "cpu",
                case,
                c.name,
                device="cpu",
                dtype=step.name_of(c.dtype),
                over_floor=timing.median / bare.seconds,
                samples_per_second=1 / timing.median,
                tflops=bare.flops / timing.median / 1e12,
                unet_passes=step.UNET_PASSES[kind],
                note=f"{c.note}; {taken[c]:.3f} s of processor time",
                **timing.columns(),
            )
        yield Row(
            "cpu",
            case,
            "floor",
            device="cpu",
            dtype=step.name_of(FLOOR.dtype),
            seconds=bare.seconds,
            repeats=bare.repeats,
            over_floor=1.0,
            tflops=bare.flops / bare.seconds / 1e12,
            note=f"{bare.calls} calls, {bare.distinct} distinct",
        )
        for what, seconds in profile.items():
            if seconds:  # a guided step has no optimizer
                yield Row(
                    "cpu",
                    case,
                    f"profile: {what}",
                    device="cpu",
                    dtype=step.name_of(FLOOR.dtype),
                    seconds=seconds,
                    over_floor=seconds / bare.seconds,
                    repeats=1,
                )


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """Seconds of a step, a panel a kind, the floor as a line."""
    cases = list(dict.fromkeys(r.case for r in rows))
    names_of_all = {c.name for c in CONTESTANTS}
    for axes, case in zip(
        figure.subplots(1, max(1, len(cases)), squeeze=False)[0], cases, strict=True
    ):
        mine = [r for r in rows if r.case == case and r.contestant in names_of_all]
        names = [f"{r.contestant}\n{r.dtype}" for r in mine]
        axes.barh(names, [r.seconds or 0.0 for r in mine])
        for r in rows:
            if r.case == case and r.contestant == "floor":
                axes.axvline(r.seconds or 0.0, color="black")
        axes.invert_yaxis()
        axes.set(xlabel="seconds", title=case)
