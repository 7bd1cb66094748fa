"""The whole job on the embedded model: what each contestant costs, and what it does.

Every run is a fresh process. Seconds and memory span a loaded pipeline to the finished erasure;
drawing and judging come after. Contestants take turns on every concept and seed, and every one
trains at the learning rate that was best for it in the committed sweep (`--sweep`); a row says so
where there is none yet.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import Settings, in_fresh_process, peak, reset_peak
from rows import Row, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a file a contestant: a change of ours moves no other
SWEEP_FILES = Path(__file__).parents[1] / "results" / "learning_rates"
SWEEP_RATES: dict[str, tuple[float, ...]] = {
    "esd_fast": (1e-3, 2e-3, 4e-3),
    "reference": (1e-4, 3e-4, 1e-3, 3e-3),
    "paper": (1e-4, 3e-4, 1e-3),
    "lora": (1e-4, 1e-3, 3e-3),
}
CONTESTANTS = ("esd_fast", "reference")
PRESERVED = "esd_fast, preserved"  # the default recipe with the default set of preserved prompts
OTHERS = (PRESERVED, "paper", "lora")  # on the first seed alone, to save time
ITERATIONS = 200  # everyone's
SNAPSHOTS = (10, 25, 50, 100, ITERATIONS)
DRAWING_STEPS = 15
# the targets, ours against the reference: fewer UNet passes, less time; worse by at most
TARGETS = {"esd_fast": (12.0, 10.0), PRESERVED: (5.0, 5.0)}
WORSE_BY_AT_MOST = 0.02


@dataclass(frozen=True)
class Job:
    """One erasure in a process of its own."""

    contestant: str
    concept: str
    seed: int
    learning_rate: float
    iterations: int
    erased: int  # pictures to judge
    kept: int
    device: str
    snapshots: tuple[int, ...] = ()

    @property
    def case(self) -> str:
        return f"learning_rate={self.learning_rate:g}"


def concepts() -> tuple[str, ...]:
    """Three objects and two styles: the first ones of erasure_table.py."""
    from erasure_table import table_concepts

    from esd_fast.demo import world

    table = table_concepts()
    objects = [c for c in table if c in world.OBJECTS]
    return (*objects[:3], *[c for c in table if c in world.STYLES][:2])


def run(settings: Settings) -> Iterator[Row]:
    yield from measured([*jobs(settings), *curve_jobs(settings)], settings)


def sweep(settings: Settings) -> Iterator[Row]:
    """Every contestant at its learning rates, on one object and one style."""
    fewer = dataclasses.replace(settings, kept=settings.kept // 2)
    plan = [
        job_of(fewer, contestant, concept, seed=100, learning_rate=rate)  # no seed of the suite's
        for concept in settings.concepts or (concepts()[0], concepts()[-1])
        for contestant in settings.contestants or SWEEP_RATES
        for rate in SWEEP_RATES[contestant]
    ]
    yield from measured(plan, settings)


def measured(plan: Sequence[Job], settings: Settings) -> Iterator[Row]:
    have = {(r.suite, r.contestant, r.concept, r.seed, r.case) for r in settings.done}
    swept = swept_rates()
    for job in plan:
        suite = "curve" if job.snapshots else "erase"
        cases = [f"{n} iterations" for n in job.snapshots] or [job.case]
        if not all((suite, job.contestant, job.concept, job.seed, c) in have for c in cases):
            note = "" if job.contestant in swept else "learning rate not swept"
            yield from (
                dataclasses.replace(row, note=note) for row in in_fresh_process(measure, job)
            )


def jobs(settings: Settings) -> Iterator[Job]:
    chosen = settings.concepts or (concepts()[:1] if settings.quick else concepts())
    contestants = settings.contestants or (CONTESTANTS if settings.quick else CONTESTANTS + OTHERS)
    rates = best_rates()
    for seed in range(1 if settings.quick else settings.seeds):
        for turn, concept in enumerate(chosen):
            for contestant in turns(contestants, seed + turn):
                if seed == 0 or contestant not in OTHERS:
                    yield job_of(settings, contestant, concept, seed, rates[contestant])


def curve_jobs(settings: Settings) -> Iterator[Job]:
    """Runs of their own: a snapshot holds memory that no contestant asks for."""
    if settings.quick:
        return
    fewer = dataclasses.replace(settings, kept=settings.kept // 2)
    rates = best_rates()
    for concept in settings.concepts[:2] or (concepts()[0], concepts()[-1]):
        for contestant in settings.contestants or CONTESTANTS:
            job = job_of(fewer, contestant, concept, 0, rates[contestant])
            yield dataclasses.replace(job, snapshots=SNAPSHOTS)


def job_of(
    settings: Settings, contestant: str, concept: str, seed: int, learning_rate: float
) -> Job:
    return Job(
        contestant,
        concept,
        seed,
        learning_rate=learning_rate,
        iterations=4 if settings.quick else ITERATIONS,
        erased=4 if settings.quick else settings.erased,
        kept=8 if settings.quick else settings.kept,
        device=settings.device,
    )


def turns(contestants: Sequence[str], turn: int) -> list[str]:
    """A B, then B A: whoever goes first goes last the next time."""
    return list(contestants) if turn % 2 == 0 else list(reversed(contestants))


def best_rates() -> dict[str, float]:
    """The swept rate of every contestant; its middle one, which rows then say, where there is none."""
    middle = {name: rates[len(rates) // 2] for name, rates in SWEEP_RATES.items()}
    rates = middle | swept_rates()
    return rates | {PRESERVED: rates["esd_fast"]}


def swept_rates(folder: Path = SWEEP_FILES) -> dict[str, float]:
    """By contestant: the rate with the best mean of UA, IRA and CRA in the committed sweep.

    Of equals the one in the middle of SWEEP_RATES, its own default, then the lower one.
    """
    scores: dict[str, dict[float, list[float]]] = {}
    for row in (row for file in sorted(folder.glob("*.json")) for row in read_json(file)):
        rate = float(row.case.removeprefix("learning_rate="))  # Job.case
        rates = scores.setdefault(row.contestant, {})
        rates.setdefault(rate, []).append(sum(getattr(row, n) for n in ("UA", "IRA", "CRA")))

    def rank(name: str, rate: float) -> tuple[float, bool, float]:
        tried = SWEEP_RATES[name]
        return statistics.mean(scores[name][rate]), rate == tried[len(tried) // 2], -rate

    return {n: max(rates, key=lambda rate: rank(n, rate)) for n, rates in scores.items()}


# --- one run ----------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a contestant is given: a loaded pipeline, the job, and a clock that it reports to."""

    pipeline: Any
    job: Job
    after_step: Callable[[int], None]

    @property
    def prompt(self) -> str:
        from erasure_table import concept_prompt

        return concept_prompt(self.job.concept)


def esd_fast_contestant(work: Work, **settings: Any) -> int:
    """The default recipe with other `settings`; returns its UNet passes."""
    import esd_fast

    erasure = esd_fast.erase(
        work.pipeline,
        work.prompt,
        seed=work.job.seed,
        learning_rate=work.job.learning_rate,
        iterations=work.job.iterations,
        on_step=lambda step: work.after_step(step.iteration + 1),
        **settings,
    )
    return int(erasure.manifest["unet_passes"]["total"])


def loop_contestant(work: Work, name: str) -> int:
    """A loop of reference_loop.py or lora_loop.py as its original sets it, but for the number of
    iterations, which is everyone's, and the swept learning rate."""
    from lora_loop import lora
    from reference_loop import OWN_DEFAULTS, LoopSettings, paper, reference

    swept = {"learning_rate": work.job.learning_rate, "iterations": work.job.iterations}
    settings = LoopSettings(
        concept=work.prompt, seed=work.job.seed, **{**OWN_DEFAULTS[name], **swept}
    )
    loop = {"reference": reference, "paper": paper, "lora": lora}[name]
    return loop(work.pipeline, settings, on_step=lambda i, _: work.after_step(i + 1)).unet_passes


ENTRIES: dict[str, Callable[[Work], int]] = {
    "esd_fast": esd_fast_contestant,
    PRESERVED: functools.partial(esd_fast_contestant, preserve="default"),
    **{n: functools.partial(loop_contestant, name=n) for n in ("reference", "paper", "lora")},
}


class Clock:
    """Seconds of work, with pauses while a snapshot is taken."""

    def __init__(self, unet: torch.nn.Module, wanted: Sequence[int]) -> None:
        self.unet, self.wanted = unet, set(wanted)
        self.start = {n: p.detach().clone() for n, p in unet.named_parameters()} if wanted else {}
        self.snapshots: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self.paused = 0.0
        self.started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def after_step(self, done: int) -> None:
        if done in self.wanted:
            seconds = self.seconds()
            moved = {
                n: p.detach().clone()
                for n, p in self.unet.named_parameters()
                if not torch.equal(p, self.start[n])
            }
            self.snapshots.append((done, seconds, moved))
            self.paused = time.perf_counter() - self.started - seconds


def measure(job: Job) -> list[Row]:
    """Erase, then draw and judge; in a process of its own."""
    from diffusers import StableDiffusionPipeline

    from esd_fast.commands.console import quiet_libraries
    from esd_fast.demo import model_path
    from esd_fast.pages import keep_pages

    keep_pages()  # whoever erases: the allocator's pages are nobody's merit
    quiet_libraries()
    cuda = torch.device(job.device).type == "cuda"
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_path(), dtype=torch.bfloat16 if cuda else torch.float32, safety_checker=None
    ).to(job.device)
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock(pipeline.unet, job.snapshots)
    loaded = reset_peak(job.device)
    clock.started = time.perf_counter()
    passes = ENTRIES[job.contestant](Work(pipeline, job, clock.after_step))
    if cuda:
        torch.cuda.synchronize(job.device)
    seconds, highest = clock.seconds(), peak(job.device)
    pipeline.to(job.device)  # a contestant may have put parts of it away

    def row(suite: str, case: str, **columns: Any) -> Row:
        return Row(
            suite=suite,
            case=case,
            contestant=job.contestant,
            device=job.device,
            dtype=str(pipeline.unet.dtype).removeprefix("torch."),
            concept=job.concept,
            seed=job.seed,
            **columns,
            **judged(pipeline, job),
        )

    if not job.snapshots:
        return [
            row(
                "erase",
                job.case,
                seconds=seconds,
                repeats=1,
                samples_per_second=job.iterations / seconds,
                unet_passes=passes,
                peak_memory_bytes=highest,
                loaded_memory_bytes=loaded,
            )
        ]
    rows = []
    parameters = dict(pipeline.unet.named_parameters())
    for done, after, moved in clock.snapshots:
        with torch.no_grad():
            for name, tensor in {**clock.start, **moved}.items():
                parameters[name].copy_(tensor)
        rows.append(row("curve", f"{done} iterations", seconds=after))
    return rows


def judged(pipeline: Any, job: Job) -> dict[str, float]:
    """UA, IRA, CRA on captions and seeds that all contestants share."""
    from erasure_table import drawing_dtype

    from esd_fast.demo import world
    from esd_fast.evaluation.recognition import answer, erased_questions, kept_questions

    erased = erased_questions(job.concept, job.erased, job.seed)
    kept = kept_questions(job.concept, job.kept, job.seed)
    cuda = torch.device(job.device).type == "cuda"
    dtype = torch.bfloat16 if cuda else drawing_dtype()
    with torch.autocast(job.device.partition(":")[0], dtype, enabled=dtype != torch.float32):
        answers = answer(
            pipeline, [*erased, *kept], num_inference_steps=DRAWING_STEPS, batch_size=100
        )
    seen = answers.seen["judge"]

    def share(wanted: Sequence[bool]) -> float:
        return sum(wanted) / max(1, len(wanted))

    def domain(concept: str) -> bool:
        return concept in world.STYLES

    of_kept = list(zip(seen[len(erased) :], kept, strict=True))
    same = [s for s, q in of_kept if domain(q.concept) == domain(job.concept)]
    other = [s for s, q in of_kept if domain(q.concept) != domain(job.concept)]
    return {"UA": 1 - share(seen[: len(erased)]), "IRA": share(same), "CRA": share(other)}


# --- what it comes to ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Ours against the reference, over runs that both made."""

    ours: str
    runs: int
    passes: float  # the reference's over ours
    faster: float  # likewise, of seconds; median of the pairs
    memory: float | None  # ours over the reference's; median of the pairs
    differences: dict[str, tuple[float, float]]  # UA, IRA, CRA: mean of ours - theirs, lower bound

    def lines(self) -> list[str]:
        yes = {True: "met", False: "MISSED"}
        fewer, faster = TARGETS[self.ours]
        found = [
            f"{self.passes:.1f}x fewer UNet passes (target {fewer:g}x: {yes[self.passes >= fewer]})",
            f"{self.faster:.1f}x less time (target {faster:g}x: {yes[self.faster >= faster]})",
        ]
        if self.memory is not None:
            found.append(
                f"{self.memory:.3f} of its peak memory (target 1: {yes[self.memory <= 1]})"
            )
        for name, (mean, low) in self.differences.items():
            met = yes[low >= -WORSE_BY_AT_MOST]
            found.append(
                f"{name} {mean * 100:+.1f} points, 95% lower bound {low * 100:+.1f} "
                f"(target -{WORSE_BY_AT_MOST * 100:g}: {met})"
            )
        return found


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    return [found for ours in TARGETS if (found := verdict(rows, ours))]


def verdict(
    rows: Sequence[Row], ours: str = "esd_fast", rival: str = "reference"
) -> Verdict | None:
    """None where fewer than two runs were made by both."""
    whole = [r for r in rows if r.suite == "erase"]
    made = {(r.concept, r.seed): r for r in whole if r.contestant == ours}
    theirs = {(r.concept, r.seed): r for r in whole if r.contestant == rival}
    pairs = [(made[k], theirs[k]) for k in made if k in theirs]
    if len(pairs) < 2:
        return None
    memory = [
        a.peak_memory_bytes / b.peak_memory_bytes
        for a, b in pairs
        if a.peak_memory_bytes and b.peak_memory_bytes
    ]
    return Verdict(
        ours=ours,
        runs=len(pairs),
        passes=statistics.median(b.unet_passes / a.unet_passes for a, b in pairs),
        faster=statistics.median(b.seconds / a.seconds for a, b in pairs),
        memory=statistics.median(memory) if memory else None,
        differences={
            name: mean_and_lower_bound([getattr(a, name) - getattr(b, name) for a, b in pairs])
            for name in ("UA", "IRA", "CRA")
        },
    )


def mean_and_lower_bound(differences: Sequence[float]) -> tuple[float, float]:
    """The mean, and the lower end of its two-sided 95% interval (Student's t)."""
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / count**0.5
    return mean, mean - float(t.ppf(0.975, count - 1)) * error


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """Erasure and preservation against seconds; a line a contestant, means over its concepts."""
    left, right = figure.subplots(1, 2, sharex=True)
    curve = [r for r in rows if r.suite == "curve"] or rows
    for contestant in dict.fromkeys(r.contestant for r in curve):
        by_case: dict[str, list[Row]] = {}
        for row in curve:
            if row.contestant == contestant:
                by_case.setdefault(row.case, []).append(row)
        points = sorted(
            (
                statistics.mean(r.seconds or 0.0 for r in group),
                statistics.mean(r.UA or 0.0 for r in group),
                statistics.mean(((r.IRA or 0.0) + (r.CRA or 0.0)) / 2 for r in group),
            )
            for group in by_case.values()
        )
        seconds, erased, kept = zip(*points, strict=True)
        left.plot(seconds, erased, marker="o", label=contestant)
        right.plot(seconds, kept, marker="o", label=contestant)
    for axes, title in ((left, "erased: UA"), (right, "kept: mean of IRA and CRA")):
        axes.set(title=title, xlabel="seconds of erasing", xscale="log", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    left.legend()
