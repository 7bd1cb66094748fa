"""One guided step and one fit step of full-size UNets: ours, plain diffusers, and the bare cost.

`guided step`: a batch of two (null and concept) through the UNet, guidance, the scheduler's step.
`fit step`: the student's forward, loss, backward to the cross-attention weights (esd-x), Adam.

`esd_fast` is the package's own code (Teacher, Fitter), launched step by step, `packed` the same on a UNet of its
own with weights packed by oneDNN and the prompt's keys and values kept, as long runs on the CPU have it, `graphs`
the first one captured as CUDA graphs and replayed (CUDA; the first step is then warm-up, capture and replay),
`fused graphs` that on a UNet of its own with fused operators, channels_last and the prompt's keys and values kept,
as a run on CUDA has it (its memory would count two UNets and is not given), `eager`
what the diffusers pipeline and the public scripts
do (trainable weights in the UNet's dtype, loss in float32), `compiled` the same with the UNet under torch.compile
(CUDA), `floor` the sum of the convolutions, matrix products and attention calls of the eager step, or of the
packed one on the CPU, timed alone (floor.py). All else of them work on one UNet with random weights, and under one allocator setting.

Peak memory and `first_seconds` (from the loaded UNet to the end of the first step, its preparation included) are
those of one contestant alone: in a process of its own on the CPU, one after another on a GPU, where the CUDA
allocator tells them apart. With --quick the UNets are tiny, memory is not measured, and `first_seconds` is the
first step in a common process.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import floor
import torch
from measure import (
    Settings,
    in_fresh_process,
    interleaved,
    peak,
    reset_peak,
    synchronize,
)
from rows import Row
from torch.nn import functional as F

from esd_fast.accelerate import accelerate
from esd_fast.collect import Teacher, TeacherSamples
from esd_fast.commands.console import quiet_libraries
from esd_fast.frozen_conv import frozen_convolutions
from esd_fast.graphed_steps import GuidedGraphs, RunGraphs, path_of
from esd_fast.graphs import Capture, CudaCapture, Graphed
from esd_fast.kept_projections import kept_projections
from esd_fast.models import Conditioning, PromptSet
from esd_fast.objective import Objective
from esd_fast.optimizers import make_optimizer
from esd_fast.packed_weights import packed_weights, why_not_dtype
from esd_fast.pages import give_back_pages, keep_pages
from esd_fast.parameters import TrainableSubset, trainable_names
from esd_fast.plan import Rollout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INFERENCE_STEPS, GUIDANCE_SCALE = 50, 3.0
NEGATIVE_GUIDANCE, LEARNING_RATE = 2.0, 1e-5
TOKENS = 77


# --- the models: diffusers' own configurations --------------------------------------------------------

SD_BLOCKS: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
}
NOISE_LEVELS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Family:
    name: str
    unet: dict[str, Any]  # of UNet2DConditionModel; `attention_head_dim` is the number of heads
    scheduler: str
    scheduler_settings: dict[str, Any]

    def noise_schedule(self) -> Any:
        import diffusers

        return getattr(diffusers, self.scheduler)(**NOISE_LEVELS, **self.scheduler_settings)


FAMILIES = {
    "sd1": Family(
        "SD 1.x",
        {**SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
        "PNDMScheduler",
        {"skip_prk_steps": True, "set_alpha_to_one": False},
    ),
    "sd2": Family(
        "SD 2.x",
        {
            **SD_BLOCKS,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    "sdxl": Family(
        "SDXL",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading"},
    ),
}


def tiny(unet: dict[str, Any]) -> dict[str, Any]:
    """The same classes, small."""
    levels = len(unet["block_out_channels"])
    small = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64, 64)[:levels],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 4, 4)[:levels],
    }
    if "transformer_layers_per_block" in unet:
        small["transformer_layers_per_block"] = (1, 1, 2)
    if "addition_embed_type" in unet:
        small |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    return {**unet, **small}


@dataclass(frozen=True)
class Job:
    """One UNet at one size; says everything, so that a fresh process can build the same."""

    family: str  # of FAMILIES
    pixels: int
    device: str
    dtype: torch.dtype
    quick: bool

    @property
    def unet_config(self) -> dict[str, Any]:
        config = FAMILIES[self.family].unet
        return tiny(config) if self.quick else config

    def case(self, kind: str) -> str:
        return f"{FAMILIES[self.family].name} {self.pixels} px, {kind}"


def jobs(settings: Settings) -> Iterator[Job]:
    sizes = (512, 1024) if on_cuda(settings.device) else (256,)
    for family in FAMILIES:
        dtype = dtype_for(family, settings.device)
        for pixels in (64,) if settings.quick else sizes:
            yield Job(family, pixels, settings.device, dtype, settings.quick)


def dtype_for(family: str, device: str) -> torch.dtype:
    """bfloat16 where the device is fast in it. SDXL always: with float32 weights and Adam it would not fit."""
    if on_cuda(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if family == "sdxl" or bfloat16_is_faster() else torch.float32


@functools.cache
def bfloat16_is_faster() -> bool:
    """Asked of the processor itself: many take bfloat16 and are slow in it."""
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    low, down = a.bfloat16(), b.bfloat16()
    timings = interleaved({"float32": lambda: a @ b, "bfloat16": lambda: low @ down}, "cpu", 7)
    return timings["bfloat16"].median < timings["float32"].median


def on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def built(job: Job) -> torch.nn.Module:
    """The UNet with random weights, made where it will be; gradients for what esd-x trains."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**job.unet_config)
    unet = unet.to(job.dtype).to_empty(device=job.device).requires_grad_(False).eval()
    parameters = dict(unet.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            floor.fill_normal(parameter, std=0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for name in trainable_names(unet, "esd-x"):
        parameters[name].requires_grad_(True)
    return unet


# --- what a step works on -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One UNet and inputs for it."""

    unet: Any
    family: Family
    noise: torch.Tensor  # (1, 4, h, w), float32, on the CPU
    prompts: PromptSet  # "null" and "concept"
    samples: TeacherSamples  # one

    @property
    def device(self) -> torch.device:
        return self.samples.latents.device

    @property
    def dtype(self) -> torch.dtype:
        return self.samples.latents.dtype

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.unet.named_parameters() if p.requires_grad}


def work_on(unet: torch.nn.Module, job: Job) -> Work:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(job.device, job.dtype)

    def conditioning() -> Conditioning:
        config = unet.config
        added = None
        if config.addition_embed_type == "text_time":
            pooled = (
                config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
            size = [job.pixels, job.pixels, 0, 0, job.pixels, job.pixels]
            time_ids = torch.tensor([size], device=job.device, dtype=job.dtype)
            added = {"text_embeds": random(1, pooled), "time_ids": time_ids}
        return Conditioning(random(1, TOKENS, config.cross_attention_dim), added)

    shape = (1, unet.config.in_channels, job.pixels // 8, job.pixels // 8)
    return Work(
        unet=unet,
        family=FAMILIES[job.family],
        noise=torch.randn(shape, generator=generator),
        prompts=PromptSet({"null": conditioning(), "concept": conditioning()}),
        samples=TeacherSamples(
            latents=random(*shape),
            timesteps=torch.tensor([500], device=job.device),
            noise_pred_null=random(*shape),
            noise_pred_concept=random(*shape),
        ),
    )


# --- contestants: each makes a function that does one step when called -------------------------------

Step = Callable[[], object]


def guided_esd_fast(work: Work, graphs: GuidedGraphs | None = None) -> Step:
    names = ("null", "concept")
    teacher = Teacher(
        work.unet,
        work.family.noise_schedule(),
        work.prompts,
        "concept",
        names,
        INFERENCE_STEPS,
        GUIDANCE_SCALE,
        graphs,
    )

    @torch.no_grad()
    def endless() -> Iterator[torch.Tensor]:
        while True:
            trajectory = teacher.trajectory(Rollout(work.noise, INFERENCE_STEPS), names, keep=True)
            for call, timestep in enumerate(trajectory.timesteps):
                trajectory.step(timestep)
                yield trajectory.said[:, :, call].flatten(0, 1)

    return endless().__next__


def guided_eager(work: Work) -> Step:
    unet, scheduler = work.unet, work.family.noise_schedule()
    conditioning = work.prompts.stacked(("null", "concept"), (0,))

    @torch.no_grad()
    def endless() -> Iterator[torch.Tensor]:
        while True:
            scheduler.set_timesteps(INFERENCE_STEPS, device=work.device)
            latents = work.noise.to(work.device, work.dtype) * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                inputs = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                noise_pred = asked_plainly(unet, inputs, timestep, conditioning)
                null, concept = noise_pred.chunk(2)
                guided = null + GUIDANCE_SCALE * (concept - null)
                latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
                yield noise_pred

    return endless().__next__


def fit_esd_fast(work: Work, graphs: RunGraphs | None = None) -> Step:
    subset = TrainableSubset.of(work.unet, list(work.trained()))
    objective = Objective("concept", NEGATIVE_GUIDANCE)
    graphs = graphs or RunGraphs.of("off", work.unet)
    optimizer = make_optimizer(
        "adam", subset.masters.values(), LEARNING_RATE, capturable=graphs.captures_optimizer
    )
    student = work.prompts["concept"]
    fitter = graphs.fitter(work.unet, subset, student, objective, optimizer, watched=False)
    return lambda: fitter.step(work.samples)


@dataclass(frozen=True)
class Captured:
    """A step of the package with CUDA graphs, and in words whether they were really replayed."""

    step: Step
    graphs: Callable[[], list[Graphed]]

    def __call__(self) -> object:
        return self.step()

    @property
    def note(self) -> str:
        return f"CUDA graphs: {path_of(self.graphs())}"


def guided_graphs(work: Work, capture: Capture | None = None) -> Captured:
    guided = GuidedGraphs(capture or CudaCapture(work.device))
    return Captured(guided_esd_fast(work, guided), lambda: guided.graphs)


def fit_graphs(work: Work, capture: Capture | None = None) -> Captured:
    graphs = RunGraphs("not measured here", capture or CudaCapture(work.device))
    step = fit_esd_fast(work, graphs)
    return Captured(step, lambda: [g for fitter in graphs.fitters for g in fitter.graphs])


def fit_eager(work: Work) -> Step:
    unet, samples, conditioning = work.unet, work.samples, work.prompts["concept"]
    optimizer = torch.optim.Adam(work.trained().values(), lr=LEARNING_RATE)

    def step() -> float:
        noise_pred = asked_plainly(unet, samples.latents, samples.timesteps, conditioning)
        concept, null = samples.noise_pred_concept, samples.noise_pred_null
        target = concept - NEGATIVE_GUIDANCE * (concept - null)
        loss = F.mse_loss(noise_pred.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def asked_plainly(
    unet: Any, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """As diffusers' pipelines do it."""
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        added_cond_kwargs=conditioning.added_cond_kwargs,
        return_dict=False,
    )[0]


def compiled(make: Callable[[Work], Step]) -> Callable[[Work], Step]:
    return lambda work: make(dataclasses.replace(work, unet=torch.compile(work.unet)))


def packed(make: Callable[[Work], Step], copied: bool = True) -> Callable[[Work], Step]:
    """On a copy, where others work on the UNet too: packed weights are not there for them to read."""

    def made(work: Work) -> Step:
        unet, contexts = copy.deepcopy(work.unet) if copied else work.unet, ExitStack()
        contexts.enter_context(accelerate(unet))
        contexts.enter_context(frozen_convolutions(unet))
        contexts.enter_context(kept_projections(unet))
        contexts.enter_context(packed_weights(unet))
        return Within(contexts, make(dataclasses.replace(work, unet=unet)))

    return made


@dataclass(frozen=True)
class Within:
    """A step in contexts, which are left at once where nobody holds them."""

    contexts: ExitStack
    step: Step

    def __call__(self) -> object:
        return self.step()

    @property
    def note(self) -> str:
        return getattr(self.step, "note", "")


STEPS: dict[str, dict[str, Callable[[Work], Step]]] = {
    "guided step": {
        "esd_fast": guided_esd_fast,
        "packed": packed(guided_esd_fast),
        "graphs": guided_graphs,
        "fused graphs": packed(guided_graphs),
        "eager": guided_eager,
        "compiled": compiled(guided_eager),
    },
    "fit step": {
        "esd_fast": fit_esd_fast,
        "packed": packed(fit_esd_fast),
        "graphs": fit_graphs,
        "fused graphs": packed(fit_graphs),
        "eager": fit_eager,
        "compiled": compiled(fit_eager),
    },
}
UNET_PASSES = {"guided step": 2, "fit step": 2}  # a batch of two; a forward and a backward


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """What one contestant needs when there is no other."""

    first_seconds: float
    peak_memory_bytes: int
    loaded_memory_bytes: int  # held before: the UNet, and on the CPU the libraries


def run(settings: Settings) -> Iterator[Row]:
    """Compiling takes minutes, so it comes last: a run that is stopped then has all the rest."""
    keep_pages()
    quiet_libraries()
    everything = list(jobs(settings))
    graphs = ("graphs", "fused graphs") if on_cuda(settings.device) else ()
    for job in everything:
        if not measured_before(job, "floor", settings):  # the last row of each
            yield from measure_job(job, ("esd_fast", *graphs, *packed_on(job), "eager"))
            if not graphs:
                yield from no_graphs(job)
    if on_cuda(settings.device):
        with fresh_compiler_cache():
            for job in everything[:1] if settings.quick else everything:
                if not measured_before(job, "compiled", settings):
                    yield from measure_job(job, ("compiled",))


def packed_on(job: Job) -> tuple[str, ...]:
    return () if on_cuda(job.device) or why_not_dtype(job.dtype) else ("packed",)


def measured_before(job: Job, contestant: str, settings: Settings) -> bool:
    done = {r.case for r in settings.done if r.contestant == contestant and r.seconds}
    return all(job.case(kind) in done for kind in STEPS)


def measure_job(job: Job, contestants: tuple[str, ...]) -> Iterator[Row]:
    """Rows of both kinds of step; where memory is short, rows that say so."""
    short = "" if job.quick else short_of_memory(job)
    there: set[str] = set()
    try:
        for row in () if short else measured(job, contestants):
            there.add(row.case)
            yield row
    except torch.OutOfMemoryError as error:
        short = f"out of memory: {str(error).splitlines()[0]}"
    finally:
        release(job.device)
    for case in (job.case(kind) for kind in STEPS):
        if short and case not in there:
            for contestant in contestants:
                yield Row("step", case, contestant, job.device, name_of(job.dtype), note=short)


def no_graphs(job: Job) -> Iterator[Row]:
    note = f"n/a: CUDA graphs on {job.device}"
    for case in map(job.case, STEPS):
        yield Row("step", case, "graphs", job.device, name_of(job.dtype), note=note)


def measured(job: Job, contestants: tuple[str, ...]) -> Iterator[Row]:
    apart: dict[str, dict[str, Alone]] = {}
    if not (job.quick or on_cuda(job.device)):
        for contestant in contestants:
            apart[contestant] = in_fresh_process(
                all_alone, job, contestant, torch.get_num_threads()
            )
    work = work_on(built(job), job)
    for kind in STEPS:
        # else another batch size or mode is taken for one that varies, and is compiled as such
        torch.compiler.reset()
        if on_cuda(job.device) and not job.quick:
            with_warm_libraries(work, kind)
            for contestant in contestants:
                if contestant != "fused graphs":
                    apart.setdefault(contestant, {})[kind] = alone(work, kind, contestant)
        yield from measure_kind(job, work, kind, contestants, apart)
        release(job.device)


def measure_kind(
    job: Job,
    work: Work,
    kind: str,
    contestants: tuple[str, ...],
    apart: dict[str, dict[str, Alone]],
) -> Iterator[Row]:
    """`eager` runs along even where its row is there already: the others are timed against it."""
    repeats = 1 if job.quick else 10 if on_cuda(job.device) else 3
    steps = {name: STEPS[kind][name](work) for name in dict.fromkeys((*contestants, "eager"))}
    bare_of = "packed" if "packed" in steps else "eager"
    steps[bare_of]()  # packs its weights
    replay = floor.Replay(floor.record(steps[bare_of]), job.device)
    timings = interleaved(steps | {"floor": replay.round}, job.device, repeats)
    bare = replay.floor()
    common: dict[str, Any] = {"device": job.device, "dtype": name_of(job.dtype)}
    for contestant in contestants:
        timing = timings[contestant]
        columns: dict[str, Any] = timing.columns()
        if contestant in apart:
            columns |= dataclasses.asdict(apart[contestant][kind])
        yield Row(
            "step",
            job.case(kind),
            contestant,
            over_floor=timing.median / bare.seconds,
            samples_per_second=1 / timing.median,
            tflops=bare.flops / timing.median / 1e12,
            unet_passes=UNET_PASSES[kind],
            note=getattr(steps[contestant], "note", ""),
            **columns,
            **common,
        )
    if "esd_fast" in contestants:
        yield Row(
            "step",
            job.case(kind),
            "floor",
            seconds=bare.seconds,
            repeats=bare.repeats,
            over_floor=1.0,
            tflops=bare.flops / bare.seconds / 1e12,
            note=f"{bare.calls} calls, {bare.distinct} distinct",
            **common,
        )


def all_alone(job: Job, contestant: str, threads: int) -> dict[str, Alone]:
    """In a fresh process: first a guided step, then a fit step, as in a run."""
    keep_pages()
    quiet_libraries()
    torch.set_num_threads(threads)
    work = work_on(built(job), job)
    return {kind: alone(work, kind, contestant) for kind in STEPS}


def alone(work: Work, kind: str, contestant: str) -> Alone:
    release(work.device)
    loaded = reset_peak(work.device)
    started = time.perf_counter()
    step = STEPS[kind][contestant](work)
    step()
    synchronize(work.device)
    first = time.perf_counter() - started
    step()  # Adam's state is there only after the first step
    return Alone(first, peak(work.device), loaded)


def with_warm_libraries(work: Work, kind: str) -> None:
    """cuDNN, cuBLAS and the kernels loaded, so that the first contestant does not pay for all."""
    STEPS[kind]["eager"](work)()
    release(work.device)


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """Time to the first step as on a machine that has not compiled this model before."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


# --- memory -------------------------------------------------------------------------------------------

# A trained weight of a bfloat16 UNet while both contestants are there. Ours: frozen copy, float32 master,
# two Adam moments and gradient; eager's moments. With float32 weights it is a few bytes more.
TRAINED_BYTES = 2 + 4 + 8 + 4 + 4
OTHER_BYTES = 2 * 2**30  # interpreter and libraries, activations


def short_of_memory(job: Job) -> str:
    """On the CPU running out ends the process, so it is asked before; why not, or nothing."""
    from diffusers import UNet2DConditionModel

    if on_cuda(job.device):
        return ""  # CUDA says so, and the process lives
    with torch.device("meta"):
        unet = UNet2DConditionModel(**job.unet_config)
    parameters = dict(unet.named_parameters())
    trained = sum(parameters[n].numel() for n in trainable_names(unet, "esd-x"))
    weights = sum(p.numel() for p in parameters.values()) * job.dtype.itemsize
    weights *= 3  # a second UNet for `packed`, whose convolutions the backward holds twice
    needed = weights + trained * TRAINED_BYTES + OTHER_BYTES
    free = available_memory()
    if needed <= free:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are available"


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def release(device: str | torch.device) -> None:
    """What nobody holds goes back to the system."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    give_back_pages()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the chart ----------------------------------------------------------------------------------------

COLOURS = {
    "packed": "#e69f00",
    "fused graphs": "#7b3294",
    "esd_fast": "#d55e00",
    "graphs": "#cc79a7",
    "eager": "#56b4e9",
    "compiled": "#009e73",
}


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """Seconds of a step, a panel a kind, a group a model; the dark part of a bar is the floor."""
    timed = [r for r in rows if r.seconds]
    if not timed:
        return
    panels = figure.subplots(1, len(STEPS), sharey=True)
    for axes, kind in zip(panels, STEPS, strict=True):
        bars(axes, [r for r in timed if r.case.endswith(kind)])
        axes.set_title(kind)
    figure.set_figheight(max(4.0, 0.2 * len(timed)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"one step on {timed[0].device}; x: times the floor; GiB: peak memory")


def bars(axes: Axes, rows: Sequence[Row]) -> None:
    models = list(dict.fromkeys(model_of(r) for r in rows))
    floors = {r.case: r.seconds or 0.0 for r in rows if r.contestant == "floor"}
    contestants = [c for c in COLOURS if any(r.contestant == c for r in rows)]
    height = 0.8 / max(1, len(contestants))
    for i, contestant in enumerate(contestants):
        mine = [r for r in rows if r.contestant == contestant]
        offset = (i - (len(contestants) - 1) / 2) * height
        places = [models.index(model_of(r)) + offset for r in mine]
        drawn = axes.barh(
            places,
            [r.seconds or 0.0 for r in mine],
            height * 0.92,
            color=COLOURS[contestant],
            label=contestant,
        )
        axes.bar_label(drawn, [label(r) for r in mine], padding=3, fontsize="small")
        axes.barh(
            places,
            [floors.get(r.case, 0.0) for r in mine],
            height * 0.92,
            color="black",
            alpha=0.35,
            label="floor" if contestant == contestants[-1] else None,
        )
    axes.set_yticks(range(len(models)), models)
    axes.set(xlabel="seconds")
    axes.margins(x=0.28)
    if not axes.yaxis_inverted():  # the axis is shared
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def model_of(row: Row) -> str:
    return row.case.partition(",")[0] + "\n" + row.dtype


def label(row: Row) -> str:
    text = f"{row.over_floor:.2f}x"
    if row.peak_memory_bytes:
        text += f", {row.peak_memory_bytes / 2**30:.1f} GiB"
    return text
