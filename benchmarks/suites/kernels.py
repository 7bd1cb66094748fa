"""Every operator of esd_fast.ops, forward and gradient, against plain torch and a plain copy.

`esd_fast` is the operator as it is called, by the path that it chose (the note says which); the other paths that
exist on the device run through the same public function. `eager` is what one writes without the package, `compiled`
the same under torch.compile. `copy` moves as many bytes as forward and gradient must at least, and is the floor of
what is bound by memory; a SiLU or a GELU on the CPU is bound by its exponentials.

On CUDA each contestant is captured as a CUDA graph and its replays are timed, as a run replays its steps:
launched one by one, operators of these sizes take what the host needs to launch them. The first call is then warm-up
and capture.

The numbers are small enough to stay in a cache, for the copy as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from measure import Settings, Timing, inner_calls, interleaved
from rows import Row
from torch import Tensor
from torch.nn import functional as F

from esd_fast import ops
from esd_fast.graphs import Capture, CudaCapture
from esd_fast.scheduler_table import SchedulerTable, probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SD1, SDXL = (4, 64, 64), (4, 128, 128)  # one sample's latents at 512 and at 1024 pixels
LATENTS = ((1, *SD1), (4, *SD1), (1, *SDXL), (8, *SDXL))
DTYPES = (torch.float32, torch.bfloat16)
REPEATS, LEAST = 15, 1e-2  # measurements, and the seconds that each takes about


@dataclass(frozen=True)
class Operator:
    """How one operator is measured. `ours` and `eager` take what `arguments` makes and return the output;
    the gradients of those arguments that require one are asked for besides."""

    shapes: tuple[tuple[int, ...], ...]
    arguments: Callable[[tuple[int, ...], torch.dtype, str], tuple[Any, ...]]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    op: str = ""  # of esd_fast.ops, where it is not the name in OPERATORS


# --- guidance_loss ------------------------------------------------------------------------------------

NEGATIVE_GUIDANCE = 2.0


def guidance_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """student, concept, null: the anchor is the concept, as in the default recipe."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    student, concept, null = made
    return student.requires_grad_(), concept, null


def guidance_ours(student: Tensor, concept: Tensor, null: Tensor) -> Tensor:
    return ops.guidance_loss(student, concept, concept, null, NEGATIVE_GUIDANCE)[0]


def guidance_eager(student: Tensor, concept: Tensor, null: Tensor) -> Tensor:
    """In float32, as the operator and the public scripts compute it."""
    concept = concept.float()
    target = concept - NEGATIVE_GUIDANCE * (concept - null.float())
    return F.mse_loss(student.float(), target)


# --- guided_step --------------------------------------------------------------------------------------

GUIDANCE_SCALE = 3.0
INFERENCE_STEPS, CALL = 50, 25  # half way: as long a history as the average of a trajectory


@dataclass(frozen=True)
class Stepper:
    """What both sides step with; the floor does not count it."""

    scheduler: Any
    table: SchedulerTable
    number: Tensor
    history: Tensor  # (CALL + 2, B, C, h, w)
    inputs: Tensor  # (2, B, C, h, w)


def step_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """predictions (2, B, C, h, w) in the UNet's dtype, float32 latents, and a scheduler."""
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(2, *shape, generator=generator).to(device, dtype)
    history = torch.randn(CALL + 2, *shape, generator=generator).to(device)
    scheduler = DDIMScheduler(clip_sample=False)
    table = probe(scheduler, INFERENCE_STEPS)
    assert isinstance(table, SchedulerTable), table
    table = table.to(torch.device(device))
    scheduler.set_timesteps(INFERENCE_STEPS, device=device)
    latents = torch.tensordot(table.coefficients[CALL, : CALL + 1], history[:-1], dims=1)
    number = torch.tensor(CALL, device=device)
    inputs = torch.empty_like(predictions)
    return predictions, latents, Stepper(scheduler, table, number, history, inputs)


def step_ours(predictions: Tensor, _: Tensor, by: Stepper) -> Tensor:
    ops.guided_step(
        predictions,
        by.number,
        by.table.coefficients,
        by.table.input_scales,
        1,
        GUIDANCE_SCALE,
        by.history,
        by.inputs,
    )
    return by.inputs


def step_eager(predictions: Tensor, latents: Tensor, by: Stepper) -> Tensor:
    """With DDIM, the shortest of diffusers' steps."""
    null, concept = predictions.float()
    guided = null + GUIDANCE_SCALE * (concept - null)
    timestep = by.scheduler.timesteps[CALL]
    latents = by.scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return torch.stack([latents] * 2).to(predictions.dtype)


# --- group_norm_silu and geglu ------------------------------------------------------------------------

NORMS = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 8, 8), (1, 2560, 16, 16), (1, 320, 128, 128))
GEGLUS = (
    (2, 4096, 2560),
    (2, 1024, 5120),
    (2, 256, 10240),
)  # SD 1.x at 512 pixels: two halves each


def norm_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool = False
) -> tuple[Any, ...]:
    """x as an accelerated UNet hands it on (contiguous on the CPU), or channels_last in any case; and weight
    and bias of a frozen norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if channels_last or on_cuda(device):
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), weight, bias, math.gcd(32, shape[1] // 2)


def norm_eager(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def geglu_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return (x.requires_grad_(),)


def geglu_eager(x: Tensor) -> Tensor:
    """As diffusers writes it."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


OPERATORS: dict[str, Operator] = {
    "guidance_loss": Operator(LATENTS, guidance_arguments, guidance_ours, guidance_eager),
    "guided_step": Operator(LATENTS, step_arguments, step_ours, step_eager),
    "group_norm_silu": Operator(NORMS, norm_arguments, ops.group_norm_silu, norm_eager),
    "group_norm_silu channels_last": Operator(
        NORMS,
        partial(norm_arguments, channels_last=True),
        ops.group_norm_silu,
        norm_eager,
        "group_norm_silu",
    ),
    "geglu": Operator(GEGLUS, geglu_arguments, ops.geglu, geglu_eager),
}


# --- measuring ----------------------------------------------------------------------------------------


def run(settings: Settings) -> Iterator[Row]:
    """Compiling takes its time, so it comes last: a run that is stopped then has all the rest."""
    for name in ops.paths(settings.device):
        if name not in OPERATORS:
            yield Row("kernels", name, "esd_fast", settings.device, note="not in OPERATORS yet")
    cases = [
        Case(name, shape, dtype, settings.device)
        for name, operator in OPERATORS.items()
        if not (name.endswith("channels_last") and on_cuda(settings.device))  # all are, there
        for shape in (operator.shapes[:1] if settings.quick else operator.shapes)
        for dtype in DTYPES
    ]
    for case in cases:
        yield from measure_case(case, settings.quick)
    if on_cuda(settings.device):
        for case in cases:
            yield from measure_compiled(case, settings.quick)


@dataclass(frozen=True)
class Case:
    operator: str  # of OPERATORS
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def row(self, contestant: str, **columns: Any) -> Row:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.operator} {shape}"
        return Row("kernels", name, contestant, self.device, dtype, **columns)

    def call(self, function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and gradient by `function`, on the same numbers for everyone."""
        operator = OPERATORS[self.operator]
        arguments = operator.arguments(self.shape, self.dtype, self.device)
        output = operator.eager(*arguments)
        upstream = None
        if output.dim():
            numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            upstream = torch.empty_like(output).copy_(numbers)  # in its memory layout
        return partial(forward_and_gradient, function, arguments, upstream)

    def least_bytes(self) -> int:
        """Every argument read once, every output and gradient written once; and where the gradient needs
        that of the output, that one and the arguments read for it."""
        operator = OPERATORS[self.operator]
        arguments = operator.arguments(self.shape, self.dtype, self.device)
        results = self.call(operator.eager)()
        forward = bytes_of(arguments, results)
        again = len(results) > 1 and results[0].dim() > 0
        return forward + (bytes_of(arguments, results[:1]) if again else 0)


def forward_and_gradient(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], upstream: Tensor | None
) -> tuple[Tensor, ...]:
    output = function(*arguments)
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(output, inputs, upstream) if inputs else ()
    return output.detach(), *gradients


def measure_case(case: Case, quick: bool) -> Iterator[Row]:
    operator = OPERATORS[case.operator]
    moved = case.least_bytes()
    chosen, others, missing = paths_of(operator.op or case.operator, case.device)
    contestants: dict[str, Callable[[], object]] = {
        "copy": copy_of(moved, case.device),
        "eager": case.call(operator.eager),
        "esd_fast": case.call(operator.ours),
    }
    for way in others:
        contestants[way] = partial(through, way, case.call(operator.ours))
    timings = timed(replayed(contestants, case.device), case.device, quick)
    for name, timing in timings.items():
        note = {"esd_fast": chosen, **others}.get(name, "")
        yield case.row(name, note=note, **columns(timing, timings["copy"], moved))
    for way, why in missing.items():
        yield case.row(way, note=why)


def measure_compiled(case: Case, quick: bool) -> Iterator[Row]:
    torch.compiler.reset()  # else a second shape is compiled as one that varies
    moved = case.least_bytes()
    compiled = torch.compile(OPERATORS[case.operator].eager)
    contestants = {"copy": copy_of(moved, case.device), "compiled": case.call(compiled)}
    timings = timed(replayed(contestants, case.device), case.device, quick)
    yield case.row("compiled", **columns(timings["compiled"], timings["copy"], moved))


def columns(timing: Timing, copy: Timing, moved: int) -> dict[str, Any]:
    return {
        **timing.columns(),
        "over_floor": timing.median / copy.median,
        "gigabytes_per_second": moved / timing.median / 1e9,
    }


def replayed(
    contestants: dict[str, Callable[[], object]], device: str, capture: Capture | None = None
) -> dict[str, Callable[[], object]]:
    """Each as a CUDA graph that its first call captures; as it is where there are none."""
    if capture is None and on_cuda(device):
        capture = CudaCapture(torch.empty(0, device=device).device)
    if capture is None:
        return contestants
    return {name: Replayed(call, capture) for name, call in contestants.items()}


@dataclass
class Replayed:
    call: Callable[[], object]
    capture: Capture
    replay: Callable[[], object] | None = None

    def __call__(self) -> None:
        if self.replay is None:
            self.capture.warm_up(self.run)
            self.replay = self.capture.record(self.run)
        self.replay()

    def run(self) -> None:
        self.call()


def timed(
    contestants: dict[str, Callable[[], object]], device: str, quick: bool
) -> dict[str, Timing]:
    """The first call of all is timed before it is known how many calls make a measurement."""
    repeats, least = (2, 1e-3) if quick else (REPEATS, LEAST)
    first = interleaved(contestants, device, repeats=0)
    inner = min(inner_calls(call, device, least) for call in contestants.values())
    timings = interleaved(contestants, device, repeats, inner)
    return {name: Timing(timing.seconds, first[name].first) for name, timing in timings.items()}


def paths_of(name: str, device: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The chosen path's full name; the others that work (way: full name); and why the rest does not."""
    chosen = ops.path_of(name, device)
    working, missing = {}, {}
    for way, found in ops.ways(name, device).items():
        if found.why:
            missing[way] = found.why
        elif found.name != chosen.name:
            working[way] = found.name
    return chosen.name, working, missing


def through(way: str, call: Callable[[], object]) -> object:
    with ops.forced(way):
        return call()


def bytes_of(*tensors: Sequence[Any]) -> int:
    """Each tensor once."""
    distinct = {id(t): t for group in tensors for t in group if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def copy_of(moved: int, device: str) -> Callable[[], object]:
    """A copy that reads half of `moved` bytes and writes the other half."""
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


# --- the chart ----------------------------------------------------------------------------------------

COLOURS = {
    "esd_fast": "#d55e00",
    "eager": "#56b4e9",
    "compiled": "#009e73",
    "torch": "#bbbbbb",
    "native": "#e69f00",
    "triton": "#cc79a7",
}


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """How many times as long as a copy each contestant takes; a panel a dtype, a group a shape."""
    shown = [r for r in rows if r.seconds and r.contestant != "copy"]
    dtypes = list(dict.fromkeys(r.dtype for r in shown))
    if not dtypes:
        return
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        bars(axes, [r for r in shown if r.dtype == dtype])
        axes.set_title(dtype)
    figure.set_figheight(max(4.0, 0.3 * len(shown) / len(dtypes)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"forward and gradient on {shown[0].device}: 1 = a copy of the same bytes")


def bars(axes: Axes, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(r.case for r in rows))
    contestants = [c for c in COLOURS if any(r.contestant == c for r in rows)]
    height = 0.8 / len(contestants)
    for i, contestant in enumerate(contestants):
        mine = [r for r in rows if r.contestant == contestant]
        places = [cases.index(r.case) + (i - (len(contestants) - 1) / 2) * height for r in mine]
        drawn = axes.barh(
            places,
            [(r.over_floor or 1.0) - 1 for r in mine],
            height * 0.92,
            left=1,
            color=COLOURS[contestant],
            label=contestant,
        )
        axes.bar_label(drawn, [f"{r.over_floor:.1f}" for r in mine], padding=2, fontsize="x-small")
    axes.set_yticks(range(len(cases)), [c.replace(" ", "\n", 1) for c in cases])
    axes.set(xscale="log", xlabel="times a copy")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.15)
    if not axes.yaxis_inverted():  # the axis is shared
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
