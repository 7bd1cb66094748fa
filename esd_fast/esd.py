"""The whole of ESD on one page (named esd, since esd_fast.erase is the function): prompts, plan, collect, fit, Erasure."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .collect import (
    Teacher,
    TeacherSamples,
    chunked,
    collect_all,
    collect_last,
    collect_preserved,
    gathered,
)
from .config import CHOICES, EraseConfig, refuse
from .engine import Layout, engaged, layout_for
from .erasure import Erasure, erased_from, fingerprint, processor_of, versions
from .fit import FitStep, Fitter, shuffled
from .graphed_steps import RunGraphs
from .interrupts import sigterm_interrupts
from .live import onloading
from .models import Conditioning, Model, PromptSet, load_model
from .objective import Objective
from .optimizers import described, make_optimizer
from .parallel import PeerLost, Ranks, joined, together
from .parameters import TrainableSubset, canonical_method, only_trainable, trainable_names
from .plan import Plan, Rollout, check_room, plan_preserved, plan_rollouts, share_of
from .run_state import Checkpoints, Identity, Keeper, RunState, newest_state
from .schedules import scheduler_for
from .sick_numbers import check_collected
from .stepping_down import stepping_down
from .stored_samples import StoredSamples, read_samples
from .vocabulary import filters_for


@dataclass(frozen=True)
class Progress:
    """What is told while it happens: `done` of `total` UNet passes or optimizer steps."""

    # "collect" or "fit"; a student's rollouts are part of "fit"; hardening has "invert" between
    phase: str
    done: int
    total: int
    loss: float | None = None


class EraseInterrupted(KeyboardInterrupt):
    """Ctrl-C came; `erasure` is the work so far, the model holds its own weights again.
    `checkpoint`: the file that `resume` goes on from, where one was asked for and written."""

    def __init__(self, erasure: Erasure, checkpoint: Path | None = None) -> None:
        super().__init__("interrupted")
        self.erasure = erasure
        self.checkpoint = checkpoint


def erase(
    model: Any = None,
    concept: str | Sequence[str] = "",
    *,
    preset: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[FitStep], None] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    samples: str | os.PathLike[str] | StoredSamples | None = None,
    **settings: Any,
) -> Erasure:
    """Erase `concept`, or all of a list, from `model`; a live pipeline is left erased.

    `model`: a diffusers pipeline, a diffusers folder, a hub id, a single file in the original
    layout (.safetensors, .ckpt), or None for the embedded model.
    `settings`: any field of EraseConfig. `checkpoints`: a folder for the state of the unfinished
    run, kept on Ctrl-C and SIGTERM, and after every `checkpoint_every` steps; `resume`: such a
    folder, or a file of it, to go on from, with the same model and settings, to the same result
    as without a stop (further checkpoints go there too). `preset`: "fast", if not said. `samples`:
    a file of `collect_samples`, or what that gives: nothing is collected but what it lacks, and
    what is not said is as it was there (or "all" or "last", the setting of that name). Raises
    ValueError for a bad value before anything is loaded, or for samples of something else,
    EraseInterrupted on Ctrl-C in training, NonFiniteLoss where training went wrong,
    CheckpointError where the folder cannot be written to; in the last three the model is as it
    was. RuntimeError, at once, where another thread trains on the same pipeline.

    Where the caller has initialised torch.distributed with several processes, all of them call
    this alike and train one erasure: `batch_size` is of each, files are written by the first, and
    PeerFailed or PeerLost (parallel.py) say that another one failed or is gone.

    The caller's random state, default dtype, grad mode, deterministic settings, warnings filters
    and signal handlers are left alone; erasures on pipelines of their own may run in threads side
    by side. On the CPU the same seed gives the same bits on the same machine with the same versions
    and the same `torch.get_num_threads()` (what depends on that number: repeating.py).
    """
    given: dict[str, object] = {"checkpoints": checkpoints, "resume": resume}
    if not isinstance(samples, StoredSamples):
        given["samples"] = samples
    for name, value in given.items():
        if value is not None and not (isinstance(value, (str, os.PathLike)) and str(value)):
            refuse(name, value, "a file" if name == "samples" else "a folder")
    given = {"on_progress": on_progress, "on_step": on_step}
    for name, value in given.items():
        if value is not None and not callable(value):
            refuse(name, value, "a function")
    with joined() as ranks:
        stored, of_all = None, False
        if samples in CHOICES["samples"]:
            settings["samples"] = samples
        elif samples is not None:
            stored = samples if isinstance(samples, StoredSamples) else read_samples(samples)
            of_all = settings.get("batch_size") is None  # that of the samples is of all processes
            settings = stored.settings(preset=preset, concept=concept or None, **settings)
            preset, concept = settings.pop("preset"), settings.pop("concept")
        config = EraseConfig.from_preset(preset or "fast", concept, model, **settings)
        config = config if of_all else ranks.whole(config)
        if stored:
            stored.check_settings(config)
        state = None if resume is None else newest_state(resume)
        if resume is not None and checkpoints is None:
            checkpoints = resume if Path(resume).is_dir() else Path(resume).parent
        kept = Checkpoints.of(checkpoints, checkpoint_every, state) if ranks.first else None
        return run(
            load_model(model, config),
            config,
            checkpoints=kept,
            resume=state,
            stored=stored,
            on_progress=on_progress,
            on_step=on_step,
            ranks=ranks,
        )


def unwinding(function: Callable[..., Erasure]) -> Callable[..., Erasure]:
    """For functions with an argument `stack`, an ExitStack: what is entered there is left when they
    are over, whichever way, and hold nothing any more."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **settings: Any) -> Erasure:
        with ExitStack() as stack:
            return function(*arguments, stack=stack, **settings)

    return wrapper


@onloading
@stepping_down
@together
@unwinding
@torch.inference_mode(False)  # whatever the caller's mode, training needs gradients
@torch.enable_grad()
def run(
    model: Model,
    config: EraseConfig,
    *,
    extra: Sequence[Conditioning] = (),
    rollouts: list[Rollout] | None = None,
    words: list[str] | None = None,
    graphs: RunGraphs | None = None,
    checkpoints: Checkpoints | None = None,
    resume: RunState | None = None,
    stored: StoredSamples | None = None,
    ranks: Ranks,
    stack: ExitStack,
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[FitStep], None] | None = None,
) -> Erasure:
    """`erase` on a loaded model. `extra`: what is erased besides the texts of `config`, (1, ...)
    each on the model's device and in its dtype, treated like one more concept: numbered after
    them, and erased from the same prompt. `config.iterations` is for all together. `rollouts`
    replaces the plan drawn from the seed, `words` the tokenizer's own, which `keep_vocabulary`
    holds to, `graphs` what `cuda_graphs` chooses. `resume`: the state of such a run to go on
    from, `stored`: samples that need not be collected; ValueError where they are of another.
    `ranks`: the processes that do it together, if not this one alone; the batch of `config` is
    then of all of them."""
    started = time.perf_counter() - (resume.seconds["total"] if resume else 0.0)
    config = config.for_model(model)
    if stored:
        if extra or rollouts is not None:
            raise ValueError("stored samples are given, and so are extra or rollouts: collect anew")
        stored.check(model, config)
    checkpoints = checkpoints or Checkpoints()
    identity = Identity.of(model, config, extra, rollouts, words)
    if resume:
        resume.check(identity)
    ranks.check_batch(config)
    ranks.check_alike(identity.told)
    given = [
        name for name, value in (("rollouts", rollouts), ("words", words)) if value is not None
    ]
    graphs = graphs or RunGraphs.of(config.cuda_graphs, model.unet, config.optimizer)
    names = trainable_names(model.unet, config.train_method, model.family.name)
    if config.quantize is not None:  # before anything else takes memory
        from .quantized_layers import quantized

        quantizing = stack.enter_context(quantized(model.unet, names, config.quantize))
    prepared = prepare(model, config, names, graphs, ranks, extra, rollouts)
    prompts, teacher, plan = prepared.prompts, prepared.teacher, prepared.plan
    filters, held_to = filters_for(
        model,
        prepared.names,
        config.keep_vocabulary,
        prepared.resolution,
        words,
        erased=config.concepts,
    )
    subset = TrainableSubset.of(model.unet, prepared.names, filters)
    objective = Objective(config.target_anchor, config.negative_guidance)
    student = prompts["concept" if config.erase_from is None else "erase_from"]
    optimizer = make_optimizer(
        config.optimizer,
        subset.masters.values(),
        config.learning_rate,
        weight_decay=config.weight_decay,
        capturable=graphs.captures_optimizer,
    )
    clipped = config.max_grad_norm or None
    fitter = graphs.fitter(
        *(model.unet, subset, student, objective, optimizer, clipped),
        weights_of(config, prompts, model.device),
        ranks,
        watched=on_step is not None,
    )
    paths = {"scheduler": teacher.scheduler_path(plan.erased)}
    if config.quantize is not None:
        paths["quantize"] = str(quantizing)
    rest = plan.after(*stored.there_of(plan)) if stored else plan
    collecting = passes_of(config, len(teacher.asked), rest)
    spared = passes_of(config, len(teacher.asked), plan) - collecting
    samples_file = stored.noted(plan, spared) if stored else {}
    noted = Noted(
        *(
            started,
            torch.get_num_threads(),
            identity.base,
            len(extra),
            given,
            held_to,
            paths,
            graphs,
        ),
        collect_batch_size=prepared.layout.collect_batch_size,
        resumed_at=resume.stops if resume else [],
        samples_file=samples_file,
    )
    meter = Meter(on_progress or (lambda _: None), collecting, ranks)
    keeper = Keeper(
        checkpoints, identity, resume, subset, fitter, started, meter.seconds, samples_file
    )
    passes = collecting + 2 * config.iterations * config.samples_a_step  # forward and backward

    finished = False
    try:
        with (
            sigterm_interrupts(checkpoints.folder is not None),
            only_trainable(model.unet, subset),
            engaged(model, prepared.layout, prepared.shape[1:], passes) as engine_paths,
        ):
            noted.paths.update(engine_paths)
            if prompts.concepts > 1:
                noted.paths["prompt_projections"] += "; fit: anew, as batches mix concepts"
            samples = keeper.restored()
            taken = len(fitter.losses)
            if resume:
                done = plan if samples is not None else Plan(plan.erased[:taken])
                made = passes_of(config, len(teacher.asked), done)
                if samples is not None:
                    made -= samples_file.get("unet_passes_spared", 0)
                meter.resumed(made, taken, config)
            if samples is None and config.rollout == "frozen":
                there = stored.samples_of(plan, model.device) if stored else ()
                samples = collected(config, prepared, rest, meter, ranks, *there)
                check_collected(fitter, samples)
                keeper.collected(samples)
            for batch in training_batches(config, samples, prepared, subset, meter, ranks, taken):
                step = fitter.step(batch)
                meter.fitted(step, config)
                keeper.stepped()
                if on_step:
                    on_step(step)
        erasure = finish(model, config, subset, fitter, meter, noted, interrupted=False)
        finished = True
        return erasure
    except KeyboardInterrupt as stop:
        ranks.tell(stop)
        erasure = finish(model, config, subset, fitter, meter, noted, interrupted=True)
        raise EraseInterrupted(erasure, keeper.interrupted()) from None
    except PeerLost as lost:
        if kept := keeper.interrupted():
            lost.args = (f"{lost}; resume goes on from {kept}",)
        raise
    finally:
        graphs.release()
        if not finished:
            subset.restore()


@dataclass(frozen=True)
class Prepared:
    """A run before anything is collected or trained."""

    names: list[str]
    """Of the parameters that train."""
    shape: tuple[int, int, int]
    """(C, h, w) of one sample's latents."""
    resolution: int
    layout: Layout
    prompts: PromptSet
    teacher: Teacher
    plan: Plan


def prepare(
    model: Model,
    config: EraseConfig,
    names: list[str],
    graphs: RunGraphs,
    ranks: Ranks,
    extra: Sequence[Conditioning] = (),
    rollouts: list[Rollout] | None = None,
) -> Prepared:
    shape = model.latent_shape(config.resolution)
    scheduler = scheduler_for(model.pipeline.scheduler, config)
    resolution = shape[-1] * model.vae_scale_factor
    layout = layout_for(model, ranks.own(config), names, resolution)
    prompts = encode_prompts(model, config, resolution, extra)
    teacher = Teacher(
        unet=model.unet,
        scheduler=scheduler,
        prompts=prompts,
        rolled=rolled_prompt(config),
        asked=tuple(prompts.by_name),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        graphs=graphs.guided,
    )
    if rollouts is None:
        check_room(config, shape, len(teacher.asked), model.device)
        rollouts = plan_rollouts(config, scheduler.timesteps, shape, prompts.erased)
    preserved = range(prompts.erased, prompts.concepts)
    plan = Plan(rollouts, plan_preserved(config, scheduler.timesteps, shape, preserved))
    return Prepared(names, shape, resolution, layout, prompts, teacher, plan)


def collected(
    config: EraseConfig,
    prepared: Prepared,
    plan: Plan,
    meter: Meter,
    ranks: Ranks,
    *there: TeacherSamples,
) -> TeacherSamples:
    """What a frozen UNet's trajectories give, all of it before the first step; what is preserved
    comes last. Each of `ranks` runs its share of them, and gets what all have collected. `there`:
    of both kinds, what there is before those of `plan`."""
    teacher, size = prepared.teacher, prepared.layout.collect_batch_size
    own, kept = (share_of(r, ranks.rank, ranks.size) for r in (plan.erased, plan.preserved))
    if config.samples == "all":
        erased = [collect_all(teacher, r, meter.collected) for r in chunked(own, size)]
    else:
        erased = [collect_last(teacher, r, meter.collected) for r in own]
    # asked with one prompt each: more of them side by side make a forward as large
    side_by_side = chunked(kept, size * len(teacher.asked))
    preserved = [collect_preserved(teacher, r, meter.collected) for r in side_by_side]
    teacher.finished_collecting()
    meter.wait_for_others()
    device = next(teacher.unet.parameters()).device
    erased = gathered(ranks, erased, plan.erased, device)
    preserved = gathered(ranks, preserved, plan.preserved, device)
    parts = [*there[:1], *erased, *there[1:], *preserved]
    return TeacherSamples.join(parts).map(torch.Tensor.contiguous)


def training_batches(
    config: EraseConfig,
    samples: TeacherSamples | None,
    prepared: Prepared,
    subset: TrainableSubset,
    meter: Meter,
    ranks: Ranks,
    taken: int,
) -> Iterator[TeacherSamples]:
    """This process's share of one batch for every optimizer step but the first `taken`, as the
    policies want them."""
    if samples is None:  # the student as it is now rolls out; its teacher answers
        for step in prepared.plan.erased[taken:]:
            (rollout,) = share_of([step], ranks.rank, ranks.size)
            yield collect_last(prepared.teacher, rollout, meter.collected, frozen=subset.teacher)
        return
    orders = orders_of(config, samples, prepared.prompts.erased)
    size = config.batch_size
    for first in range(taken * size, config.iterations * size, size):
        rows = torch.cat([order[first : first + size] for order in orders])
        yield samples[rows[ranks.rows]]


def orders_of(config: EraseConfig, samples: TeacherSamples, erased: int) -> list[torch.Tensor]:
    """In which order samples are taken, (n,) row numbers: of concepts below `erased`, and of those
    that are preserved where there are some. Every state of a trajectory in shuffled order; last
    ones as they were drawn."""
    if config.samples == "last":
        return [torch.arange(len(samples))]
    if not config.preserve:
        return [shuffled(len(samples), config.seed)]
    assert samples.concepts is not None
    kept = samples.concepts.cpu() >= erased
    groups = [torch.nonzero(mask).flatten() for mask in (~kept, kept)]
    return [rows[shuffled(len(rows), config.seed)] for rows in groups]


def rolled_prompt(config: EraseConfig) -> str:
    """What trajectories follow: in the frozen-rollout scripts the prompt that is erased from."""
    if config.erase_from is not None and config.rollout == "frozen":
        return "erase_from"
    return "concept"


def encode_prompts(
    model: Model, config: EraseConfig, resolution: int, extra: Sequence[Conditioning] = ()
) -> PromptSet:
    """Raises ValueError where it is not said what `extra` is to be erased from."""

    @functools.cache
    def encoded(text: str) -> Conditioning:
        states = model.family.encode(model.pipeline, text, resolution)
        if not states.encoder_hidden_states.isfinite().all():
            raise ValueError(
                f"the text encoder's answer to {text!r} is not finite in {model.dtype}: its "
                "weights are damaged, or dtype float32 would do"
            )
        return states

    if extra and len(set(config.sources)) > 1:
        raise ValueError(f"erase_from is {config.erase_from!r}; with extra it must be one for all")
    null, concepts = encoded(""), [*map(encoded, config.concepts), *extra]
    concepts += [encoded(text) for text in config.preserve]
    prompts = {"null": null, "concept": Conditioning.joined(concepts)}
    if config.erase_from is not None:
        sources = [*config.sources, *(config.sources[0] for _ in extra)]
        sources += [None] * len(config.preserve)
        # a concept without one is its own: the same target as with anchor "concept"
        anchors = [c if s is None else encoded(s) for c, s in zip(concepts, sources, strict=True)]
        prompts["erase_from"] = Conditioning.joined(anchors)
    return PromptSet(prompts, len(config.preserve))


def weights_of(
    config: EraseConfig, prompts: PromptSet, device: torch.device
) -> torch.Tensor | None:
    """(K,) float32: of each concept in the loss, of what is no text 1; None: alike."""
    if config.concept_weights is None and not config.preserve:
        return None
    said = [*(config.concept_weights or ())]
    said += [1.0] * (prompts.erased - len(said))
    if config.preserve:  # the mean over a batch of both is half of the sum of their means
        said = [2 * w for w in said + [config.preserve_weight] * prompts.preserved]
    return torch.tensor(said, dtype=torch.float32, device=device)


def passes_of(config: EraseConfig, asked: int, plan: Plan) -> int:
    """UNet passes that collecting will take, with `asked` prompts at each of a sample's states."""
    if config.samples == "all":
        preserved = sum(len(r.noise) * r.steps for r in plan.preserved)
        return preserved + sum(len(r.noise) * r.steps * asked for r in plan.erased)
    return sum(len(r.noise) * (r.steps * 2 + asked) for r in plan.erased)


@dataclass(frozen=True)
class Noted:
    """What the manifest tells of a run besides its numbers."""

    started: float  # time.perf_counter()
    threads: int  # of torch's, in this thread
    base: str  # bases.base_digest
    extra: int  # concepts that are no texts
    given: list[str]  # what replaced the plan or the words, which no manifest holds
    words: int  # that updates were held to
    paths: dict[str, str]  # how the UNet and the scheduler were run
    graphs: RunGraphs
    collect_batch_size: int  # that really was
    resumed_at: list[int]  # the steps that it was stopped after, and gone on from
    samples_file: dict[str, Any]  # what was taken from one; empty for none


class Meter:
    """Counts UNet passes, of all processes, and seconds of each phase, and tells the watcher."""

    def __init__(self, tell: Callable[[Progress], None], collect_total: int, ranks: Ranks) -> None:
        self.tell, self.collect_total, self.ranks = tell, collect_total, ranks
        self.passes = {"collect": 0, "fit": 0}
        self.seconds = {"collect": 0.0, "fit": 0.0}
        self.last = time.perf_counter()

    def resumed(self, collected: int, taken: int, config: EraseConfig) -> None:
        """An earlier run collected by so many passes, and took so many steps."""
        self.passes = {"collect": collected, "fit": 2 * taken * config.samples_a_step}
        self.last = time.perf_counter()

    def collected(self, passes: int, done: bool = False) -> bool:
        """Whether all are done. So often do processes look after each other in this phase."""
        (passed,), all_done = self.ranks.agree(passes, done=done)
        self.count("collect", int(passed))
        self.told(Progress("collect", self.passes["collect"], self.collect_total))
        return all_done

    def wait_for_others(self) -> None:
        while self.ranks.size > 1 and not self.collected(0, done=True):
            pass

    def fitted(self, step: FitStep, config: EraseConfig) -> None:
        self.count("fit", 2 * step.batch)  # forward and backward
        self.told(Progress("fit", step.iteration + 1, config.iterations, step.loss))

    def told(self, progress: Progress) -> None:
        self.tell(progress)
        self.last = time.perf_counter()  # the watcher's time is not the run's: it may draw

    def count(self, phase: str, passes: int) -> None:
        now = time.perf_counter()
        self.passes[phase] += passes
        self.seconds[phase] += now - self.last
        self.last = now


def finish(
    model: Model,
    config: EraseConfig,
    subset: TrainableSubset,
    fitter: Fitter,
    meter: Meter,
    noted: Noted,
    interrupted: bool,
) -> Erasure:
    """The result, with a manifest that says how it came about.

    Raises NonFiniteLoss where the last step, whose loss nobody saw, left weights that are no
    numbers.
    """
    from . import ops

    trained, ranks = subset.trained(), fitter.ranks
    fitter.check_finite(trained)
    result = fingerprint(trained)
    ranks.check_alike({"result": result})
    device = str(model.device)
    manifest = {
        "concept": ", ".join(config.concepts),
        **({"concepts": list(config.concepts)} if len(config.concepts) > 1 else {}),
        **({"extra_concepts": noted.extra} if noted.extra else {}),
        **({"given": noted.given} if noted.given else {}),
        **({"preserved": list(config.preserve)} if config.preserve else {}),
        **({"samples_file": noted.samples_file} if noted.samples_file else {}),
        "erase_from": erased_from(config.sources),
        "method": canonical_method(config.train_method),
        "preset": config.preset,
        "model": model.source,
        "family": model.family.name,
        "base_fingerprint": fingerprint(subset.frozen),
        "base_digest": noted.base,
        "result_fingerprint": result,
        "config": dataclasses.asdict(config),
        "target": {"anchor": config.target_anchor, "eta": config.eta},
        "kept_vocabulary": {"words": noted.words, "tensors": len(subset.filters)},
        "resolution": config.resolution or model.native_resolution,
        "seed": config.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "collect_batch_size": noted.collect_batch_size,
        "world_size": ranks.size,  # processes; the batch is of all of them
        "global_batch_size": config.batch_size,
        "threads": noted.threads,
        "processor": processor_of(model.device),
        "interrupted": interrupted,
        **({"resumed_at": noted.resumed_at} if noted.resumed_at else {}),
        "losses": list(fitter.losses),
        "skipped_steps": fitter.skipped,
        "seconds": {"total": time.perf_counter() - noted.started, **meter.seconds},
        "unet_passes": {**meter.passes, "total": sum(meter.passes.values())},
        "paths_taken": {
            "device": device,
            "dtype": f"{str(model.dtype).removeprefix('torch.')}, trainables float32",
            "optimizer": described(fitter.optimizer),
            "cuda_graphs": noted.graphs.path(noted.paths["scheduler"]),
            **{op: str(ops.path_of(op, device)) for op in ("guidance_loss", "guided_step")},
            **noted.paths,
        },
        "versions": versions(),
    }
    erasure = Erasure(trained, manifest)
    erasure.remember_original(model.unet, subset.frozen)
    return erasure
