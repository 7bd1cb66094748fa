"""The operators, and the only place that chooses what runs them: Triton, the native module or torch.

Each operator is registered once with torch (``torch.ops.esd_fast.*``: a real and a fake implementation,
and a gradient where it has one). The real one asks ``path_of`` for the fastest implementation that works on the tensors'
device. The first use on a device runs a few numbers through each candidate and compares them with torch;
one that is missing, fails or disagrees is passed over, and ``path_of`` says why.

``ESD_OPS=torch``, ``native`` or ``triton`` forces one (for tests); it then raises where that one does not work.
An operator that was never written that way takes torch, and says so.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operators import geglu as _geglu
from .operators import group_norm_silu as _group_norm_silu
from .operators.common import kernels as _kernels

__all__ = [
    "OpPath",
    "forced",
    "geglu",
    "group_norm_silu",
    "guidance_loss",
    "guided_step",
    "path_of",
    "paths",
    "ways",
]

WAYS = ("torch", "native", "triton")
_FORCED = os.environ.get("ESD_OPS", "")
if _FORCED and _FORCED not in WAYS:
    raise ValueError(f"ESD_OPS={_FORCED!r}: use torch, native or triton, or leave it unset")


# --- what there is -----------------------------------------------------------------------------------


@functools.cache
def _native() -> Any:
    return importlib.import_module("esd_fast._native")


def _why_no_native(device: torch.device) -> str:
    try:
        native = _native()
    except ModuleNotFoundError:
        return "native module not built"
    except ImportError as error:
        return f"native module does not load: {error}"
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no native kernels for {device.type}"
    if not hasattr(native, "cuda_unavailable"):
        return "native module built without CUDA"
    return str(native.cuda_unavailable())


def _why_no_triton(device: torch.device) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"no Triton for {device.type}"
    try:
        import triton  # noqa: F401 -- a fifth of a second, and only needed on CUDA
    except ModuleNotFoundError:
        return "triton not installed"
    except ImportError as error:
        return f"triton does not import: {error}"
    return ""


_NOT_WRITTEN = "no native version of this operator"


# --- choosing ----------------------------------------------------------------------------------------

Implementation = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpPath:
    """What runs an operator on a device: its name, and why each faster way does not."""

    op: str
    name: str  # "triton", "native-cuda", "native-cpu-avx512" (-avx2, -baseline) or "torch"
    skipped: dict[str, str]
    run: Implementation = field(repr=False, compare=False)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {why}" for name, why in self.skipped.items())
        return f"{self.name} ({reasons})" if reasons else self.name


@dataclass(frozen=True)
class _Op:
    plain: Implementation  # in torch
    triton: Implementation
    example: Callable[[torch.device], tuple[Any, ...]]  # small arguments to try a candidate with
    native_cpu: Implementation | None = None  # None: not written
    native_cuda: Implementation | None = None


def _implementation(op: str, way: str, device: torch.device) -> tuple[str, Implementation, str]:
    """(its full name, the function, why it cannot be used)"""
    entry = _OPS[op]
    if way == "torch":
        return "torch", entry.plain, ""
    if way == "triton":
        return "triton", entry.triton, _why_no_triton(device)
    native = entry.native_cpu if device.type == "cpu" else entry.native_cuda
    if native is None:
        return "native", entry.plain, _NOT_WRITTEN
    why = _why_no_native(device)
    if device.type == "cpu":
        return f"native-cpu-{_native().cpu_isa()}" if not why else "native", native, why
    return f"native-{device.type}", native, why


def _why_wrong(op: str, run: Implementation, device: torch.device) -> str:
    """Runs a candidate for the first time, on an example, and compares it with torch."""
    example = _OPS[op].example
    try:
        results = run(*example(device))  # an example each: an operator may write to its arguments
        expected = _OPS[op].plain(*example(device))
        right = all(
            torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5)
            for x, y in zip(results, expected, strict=True)
        )
    except Exception as error:  # noqa: BLE001 -- whatever it is, another way does the work
        return f"failed when tried: {type(error).__name__}: {str(error).strip()[:200]}"
    return "" if right else "gave wrong results when tried"


@functools.cache
def _choose(op: str, device: torch.device, forced: str) -> OpPath:
    # On CUDA Triton first: a compiler for the very card. The native kernels are for where it is missing.
    ways = [forced] if forced else ["triton"] * (device.type == "cuda") + ["native", "torch"]
    if forced == "native" and _implementation(op, forced, device)[2] == _NOT_WRITTEN:
        ways.append("torch")  # forced for the operators that have one
    skipped: dict[str, str] = {}
    for way in ways:
        name, run, why = _implementation(op, way, device)
        if not why and way != "torch":
            why = _why_wrong(op, run, device)
        if not why:
            return OpPath(op, name, skipped, run)
        skipped[name] = why
    raise RuntimeError(f"ESD_OPS={forced}, but for {op} on {device}: {skipped[name]}")


def path_of(op: str, device: torch.device | str = "cpu") -> OpPath:
    """What runs `op` on `device`, and why nothing faster does."""
    if op not in _OPS:
        raise ValueError(f"op={op!r}: use one of {', '.join(_OPS)}")
    device = torch.device(device)
    if device == torch.device("cuda"):  # the current one
        device = torch.device("cuda", torch.cuda.current_device())
    return _choose(op, device, _FORCED)


def ways(op: str, device: torch.device | str = "cpu") -> dict[str, tuple[str, str]]:
    """Every way to run `op` on `device`, for comparing them: its full name, and why it does not work,
    '' where it does."""
    device, found = torch.device(device), {}
    for way in ("torch", "native", *(("triton",) if device.type == "cuda" else ())):
        name, run, why = _implementation(op, way, device)
        found[way] = name, why or ("" if way == "torch" else _why_wrong(op, run, device))
    return found


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Within: `way` runs every operator, in all threads, as ESD_OPS does for a whole process.

    For tests and benchmarks. A plain global, since autograd's own threads have to see it.
    """
    global _FORCED
    if way not in WAYS:
        raise ValueError(f"way={way!r}: use {', '.join(WAYS)}")
    before, _FORCED = _FORCED, way
    try:
        yield
    finally:
        _FORCED = before


def paths(device: torch.device | str = "cpu") -> dict[str, str]:
    """For reports: each operator's path on `device`, reasons included."""
    return {op: str(path_of(op, device)) for op in _OPS}


# --- guidance_loss -----------------------------------------------------------------------------------

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/tensor_view.h


def guidance_loss(
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor | float,
    weight: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean over the batch of `weight * mean((student - target)^2)`, and that for each sample.

    The target is `anchor - negative_guidance * (concept - null)`, computed in float32 on the way and never
    stored. The four predictions have one shape, (B, ...), and may differ in dtype (float32, bfloat16,
    float16) and memory layout; `anchor` may be `concept` or `null` itself. `negative_guidance` and `weight`
    are float32 vectors (B,) on the same device, or one number for all samples; a row with
    `negative_guidance` 0 keeps its sample as the anchor is.

    Returns the loss, a float32 scalar with a gradient for `student` alone (first derivatives only), and the
    per-sample losses (B,), detached.
    """
    if torch.is_grad_enabled():
        constants = (anchor, concept, null, negative_guidance, weight)
        for name, value in zip(_ARGUMENTS[1:], constants, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, but only student gets a gradient: pass {name}.detach()"
                )
    _check_predictions(student, anchor, concept, null)
    loss, per_sample, _ = torch.ops.esd_fast.guidance_loss(
        student,
        anchor,
        concept,
        null,
        _vector("negative_guidance", negative_guidance, student),
        _vector("weight", weight, student),
        # About B M / 2, so that float16 holds the gradient before the loss scale reaches it (d loss is
        # 2 / (B M) of an error), and a power of two, so that taking it out again rounds nothing.
        2.0 ** (student.numel().bit_length() - 2),
    )
    return loss, per_sample


_ARGUMENTS = ("student", "anchor", "concept", "null", "negative_guidance", "weight")


def _check_predictions(student: Tensor, *teachers: Tensor) -> None:
    if student.dim() == 0 or student.numel() == 0:
        raise ValueError(
            f"student: shape {tuple(student.shape)}: give at least one sample, as (B, ...)"
        )
    for name, value in zip(_ARGUMENTS, (student, *teachers), strict=False):
        if value.dtype not in _DTYPE_CODES:
            raise ValueError(f"{name}: dtype {value.dtype}: use float32, bfloat16 or float16")
        if value.shape != student.shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}: use that of student, {tuple(student.shape)}"
            )
        if value.device != student.device:
            raise ValueError(
                f"{name}: on {value.device}: move it to student's device, {student.device}"
            )


def _vector(name: str, value: Tensor | float, student: Tensor) -> Tensor:
    """A number for all samples, or one for each, as a (B,) float32 vector beside `student`."""
    batch = student.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((batch,), float(value), dtype=torch.float32, device=student.device)
    if value.dim() == 0:
        value = value.expand(batch)
    _check_vector(name, value, student)
    return value


def _check_vector(name: str, value: Tensor, student: Tensor) -> None:
    if value.dtype != torch.float32:
        raise ValueError(f"{name}: dtype {value.dtype}: use float32")
    if value.shape != student.shape[:1]:
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}: use ({student.shape[0]},), one for each sample, or a number"
        )
    if value.device != student.device:
        raise ValueError(
            f"{name}: on {value.device}: move it to student's device, {student.device}"
        )


def _check(student: Tensor, *others: Tensor) -> None:
    """What the kernels take on trust, also when torch.ops is called directly."""
    *teachers, negative_guidance, weight = others
    _check_predictions(student, *teachers)
    _check_vector("negative_guidance", negative_guidance, student)
    _check_vector("weight", weight, student)


def _samples_dense(x: Tensor) -> bool:
    """Whether each sample is one block of memory without gaps, and they follow each other."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return x.shape[0] == 1 or x.stride(0) == expected


def _like(student: Tensor, teacher: Tensor) -> Tensor:
    """`teacher` in the memory layout of `student`."""
    if teacher.stride() == student.stride() or (
        teacher.is_contiguous() and student.is_contiguous()
    ):
        return teacher
    return torch.empty_like(student, dtype=teacher.dtype).copy_(teacher)


def _guidance_loss_real(
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor,
    weight: Tensor,
    gradient_scale: float,
) -> tuple[Tensor, ...]:
    _check(student, anchor, concept, null, negative_guidance, weight)
    if not _samples_dense(student):
        student = student.contiguous()
    return path_of("guidance_loss", student.device).run(
        student,
        _like(student, anchor),
        _like(student, concept),
        _like(student, null),
        negative_guidance.contiguous(),
        weight.contiguous(),
        gradient_scale,
    )


def _guidance_loss_fake(
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor,
    weight: Tensor,
    gradient_scale: float,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    _check(student, anchor, concept, null, negative_guidance, weight)
    per_sample = torch.empty_like(weight, memory_format=torch.contiguous_format)
    gradient = torch.empty_like(student if _samples_dense(student) else student.contiguous())
    return per_sample.new_empty(()), per_sample, gradient


def _guidance_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, per_sample, gradient = output
    ctx.mark_non_differentiable(per_sample, gradient)
    ctx.save_for_backward(gradient)
    ctx.gradient_scale = inputs[-1]


def _guidance_loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # The saved gradient is a constant to autograd. Gradients are on in here with create_graph=True alone.
    if torch.is_grad_enabled():
        raise RuntimeError("guidance_loss has no second derivative: do without create_graph=True")
    (gradient,) = ctx.saved_tensors
    factor = grad_loss / ctx.gradient_scale
    if gradient.dtype == torch.float32 or gradient.device.type == "cpu":
        return gradient * factor, *(None,) * 6
    # On a GPU the product would round the factor to the gradient's dtype first.
    return (gradient.float() * factor).to(gradient.dtype), *(None,) * 6


def _guidance_loss_torch(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_kernels("reference").guidance_loss(*args))


def _guidance_loss_triton(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    launch = _kernels("guidance_loss").guidance_loss
    if student.device.type != "cuda":  # the interpreter
        return tuple(launch(student, *args))
    with torch.cuda.device(student.device):
        return tuple(launch(student, *args))


def _guidance_loss_pointers(
    student: Tensor,
    anchor: Tensor,
    concept: Tensor,
    null: Tensor,
    negative_guidance: Tensor,
    weight: Tensor,
    gradient_scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """Fresh results, and the arguments both native kernels share."""
    batch = student.shape[0]
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    per_sample = torch.empty(batch, dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student)
    arguments = (
        *((x.data_ptr(), _DTYPE_CODES[x.dtype]) for x in (student, anchor, concept, null)),
        *(x.data_ptr() for x in (negative_guidance, weight, loss, per_sample, gradient)),
        batch,
        student.numel() // batch,
        gradient_scale,
    )
    return (loss, per_sample, gradient), arguments


def _guidance_loss_native_cpu(*args: Any) -> tuple[Tensor, ...]:
    results, arguments = _guidance_loss_pointers(*args)
    _native().guidance_loss_cpu(*arguments, torch.get_num_threads())
    return results


def _guidance_loss_native_cuda(
    student: Tensor, anchor: Tensor, concept: Tensor, null: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    if not anchor.dtype == concept.dtype == null.dtype:  # compiled for one dtype of the three
        anchor, concept, null = anchor.float(), concept.float(), null.float()
    results, arguments = _guidance_loss_pointers(student, anchor, concept, null, *others)
    batch = student.shape[0]
    scratch = torch.empty(
        _native().guidance_loss_scratch(batch, student.numel() // batch),
        dtype=torch.float32,
        device=student.device,
    )
    stream = torch.cuda.current_stream(student.device).cuda_stream
    _native().guidance_loss_cuda(*arguments, scratch.data_ptr(), student.device.index, stream)
    return results


def _guidance_loss_example(device: torch.device) -> tuple[Any, ...]:
    return tuple(_kernels("reference").guidance_loss_example(device))


# --- guided_step -------------------------------------------------------------------------------------


def guided_step(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    guidance_scale: float,
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None = None,
    said: Tensor | None = None,
) -> None:
    """Guidance, a scheduler's step from its table, the next UNet input, and the sample written out.

    `predictions` (N, B, ...) is the UNet's answer to N prompts, "null" first, for B trajectories side by
    side; `rolled` is the one they follow. `index` () or (1,) int64 on the device is the number of the call,
    so nothing waits for the host and a captured graph serves every call. `table` (rows, columns) and
    `input_scales` (rows,) are those of scheduler_table.SchedulerTable.

    Written: `history` (calls + 1, B, ...) float32, whose first row is the start, gets the guided prediction
    as row index + 1; `inputs` (N, B, ...) gets the next state, scaled, N times over. Where they are given,
    `said` (N, B, calls, ...) gets the predictions at `[:, :, index]`, and `seen` (B, calls, ...) the next
    state, scaled, at `[:, index + 1]` (the caller writes the first). Rows of the history that are yet to
    come have to be finite.

    Maths in float32; predictions (with `said`) and inputs (with `seen`) are float32, bfloat16 or float16.
    What is written has to be contiguous. There is no gradient.
    """
    if torch.is_grad_enabled():
        values = (predictions, index, table, input_scales, history, inputs, seen, said)
        for name, value in zip(_STEP_ARGUMENTS, values, strict=True):
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, but guided_step has no gradient: call it under torch.no_grad()"
                )
    torch.ops.esd_fast.guided_step(
        predictions,
        index,
        table,
        input_scales,
        rolled,
        guidance_scale,
        history,
        inputs,
        seen,
        said,
    )


_STEP_ARGUMENTS = (
    *("predictions", "index", "table", "input_scales"),
    *("history", "inputs", "seen", "said"),
)


def _check_step(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None,
    said: Tensor | None,
) -> None:
    """What the kernels take on trust."""
    if predictions.dim() < 2 or predictions.numel() == 0:
        raise ValueError(
            f"predictions: shape {tuple(predictions.shape)}: give them as (prompts, trajectories, ...)"
        )
    names, batch, *sample = predictions.shape
    if not 0 < rolled < names:
        raise ValueError(f"rolled: {rolled}: use the number of a prompt, 1 to {names - 1}")
    rows, calls = table.shape[0] if table.dim() == 2 else 0, history.shape[0] - 1
    if calls < 1 or not calls < rows <= table.shape[1]:
        raise ValueError(
            f"table: shape {tuple(table.shape)}: use (rows, columns), a row for each of history, "
            f"{history.shape[0]} (two or more), and no fewer columns than rows"
        )
    given = (predictions, index, table, input_scales, history, inputs, seen, said)
    shapes: tuple[tuple[int, ...], ...] = (
        predictions.shape,
        (1,) * index.dim() if index.dim() < 2 else (1,),
        table.shape,
        (rows,),
        (calls + 1, batch, *sample),
        predictions.shape,
        (batch, calls, *sample),
        (names, batch, calls, *sample),
    )
    low = tuple(_DTYPE_CODES)
    single = (torch.float32,)
    dtypes = (low, (torch.int64,), single, single, single, low, (inputs.dtype,))
    for name, value, shape, allowed in zip(
        _STEP_ARGUMENTS, given, shapes, (*dtypes, (predictions.dtype,)), strict=True
    ):
        if value is None:
            continue
        if value.dtype not in allowed:
            would_do = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{name}: dtype {value.dtype}: use {would_do}")
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: shape {tuple(value.shape)}: use {tuple(shape)}")
        if value.device != predictions.device:
            raise ValueError(
                f"{name}: on {value.device}: move it to predictions' device, {predictions.device}"
            )
        if name in _STEP_ARGUMENTS[4:] and not value.is_contiguous():
            raise ValueError(f"{name}: strides {value.stride()}: use a contiguous tensor")


def _guided_step_real(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    guidance_scale: float,
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None = None,
    said: Tensor | None = None,
) -> None:
    _check_step(predictions, index, table, input_scales, rolled, history, inputs, seen, said)
    written = path_of("guided_step", predictions.device).run(
        predictions.contiguous(),
        index,
        table if table.stride(1) == 1 else table.contiguous(),
        input_scales.contiguous(),
        rolled,
        guidance_scale,
        history,
        inputs,
        seen,
        said,
    )
    torch.autograd.graph.increment_version(
        written
    )  # a kernel's writes are not counted by themselves


def _guided_step_fake(
    predictions: Tensor,
    index: Tensor,
    table: Tensor,
    input_scales: Tensor,
    rolled: int,
    guidance_scale: float,  # noqa: ARG001
    history: Tensor,
    inputs: Tensor,
    seen: Tensor | None = None,
    said: Tensor | None = None,
) -> None:
    _check_step(predictions, index, table, input_scales, rolled, history, inputs, seen, said)


def _guided_step_torch(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_kernels("reference").guided_step(*args))


def _guided_step_triton(predictions: Tensor, *args: Any) -> tuple[Tensor, ...]:
    launch = _kernels("guided_step").guided_step
    if predictions.device.type != "cuda":  # the interpreter
        return tuple(launch(predictions, *args))
    with torch.cuda.device(predictions.device):
        return tuple(launch(predictions, *args))


def _guided_step_example(device: torch.device) -> tuple[Any, ...]:
    return tuple(_kernels("reference").guided_step_example(device))


# --- group_norm_silu and geglu, defined in operators/ --------------------------------------------------


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, silu: bool = True
) -> Tensor:
    """GroupNorm, and SiLU behind it unless `silu` is False, in one go. Maths in float32.

    `x` is (N, C, H, W), `weight` and `bias` (C,), each float32, bfloat16 or float16. The result has x's dtype
    and is channels_last; an x of another layout is copied first. All three have gradients (first
    derivatives). Where torch runs it, it is torch's own functions, and the layout is theirs.
    """
    _group_norm_silu.check(x, weight, bias, groups)
    if _torch_runs("group_norm_silu", x):
        return _group_norm_silu.as_torch(x, weight, bias, groups, eps, silu)
    return torch.ops.esd_fast.group_norm_silu(x, weight, bias, groups, eps, silu)[0]


def geglu(x: Tensor) -> Tensor:
    """`hidden * gelu(gate)`, the halves of `x` (..., 2 D), with the exact GELU; maths in float32.

    `x` is float32, bfloat16 or float16; the result (..., D) has its dtype. First derivatives only, except
    where torch runs it: there it is torch's own functions.
    """
    _geglu.check(x)
    if _torch_runs("geglu", x):
        return _geglu.as_torch(x)
    return torch.ops.esd_fast.geglu(x)


def _torch_runs(op: str, x: Tensor) -> bool:
    """Whether torch's own functions do it, which then need none of our wrapping. torch.compile gets the
    operator, which it cannot look into, so that it traces no choosing."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return path_of(op, x.device).name == "torch"


# --- registration ------------------------------------------------------------------------------------

_OPS = {
    "guidance_loss": _Op(
        plain=_guidance_loss_torch,
        triton=_guidance_loss_triton,
        example=_guidance_loss_example,
        native_cpu=_guidance_loss_native_cpu,
        native_cuda=_guidance_loss_native_cuda,
    ),
    "guided_step": _Op(  # nothing native: a handful of torch's own calls beside a whole UNet
        plain=_guided_step_torch,
        triton=_guided_step_triton,
        example=_guided_step_example,
    ),
    "group_norm_silu": _Op(
        plain=_group_norm_silu.PLAIN,
        triton=_group_norm_silu.TRITON,
        example=_group_norm_silu.example,
    ),
    "geglu": _Op(plain=_geglu.PLAIN, triton=_geglu.TRITON, example=_geglu.example),
}

# Library.define and impl rather than torch.library.custom_op: a sixth of its cost a call.
_LIBRARY = torch.library.Library("esd_fast", "DEF")
_LIBRARY.define(
    "guidance_loss(Tensor student, Tensor anchor, Tensor concept, Tensor null, Tensor negative_guidance, "
    "Tensor weight, float gradient_scale) -> (Tensor loss, Tensor per_sample, Tensor gradient)"
)
_LIBRARY.impl("guidance_loss", _guidance_loss_real, "CompositeExplicitAutograd")
torch.library.register_fake("esd_fast::guidance_loss", _guidance_loss_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "esd_fast::guidance_loss",
    _guidance_loss_backward,
    setup_context=_guidance_loss_setup,
    lib=_LIBRARY,
)
_LIBRARY.define(
    "guided_step(Tensor predictions, Tensor index, Tensor table, Tensor input_scales, int rolled, "
    "float guidance_scale, Tensor(a!) history, Tensor(b!) inputs, Tensor(c!)? seen=None, "
    "Tensor(d!)? said=None) -> ()"
)
_LIBRARY.impl("guided_step", _guided_step_real, "CompositeExplicitAutograd")
torch.library.register_fake("esd_fast::guided_step", _guided_step_fake, lib=_LIBRARY)
_group_norm_silu.register(_LIBRARY, lambda device: path_of("group_norm_silu", device).run)
_geglu.register(_LIBRARY, lambda device: path_of("geglu", device).run)
