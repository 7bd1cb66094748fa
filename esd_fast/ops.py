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
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operators import common
from .operators import geglu as _geglu
from .operators import group_norm_silu as _group_norm_silu
from .operators import guidance_loss as _guidance_loss
from .operators import guided_step as _guided_step

__all__ = [
    "OpPath",
    "Way",
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


def _why_no_native(device: torch.device) -> str:
    try:
        native = common.native()
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
        reasons = [f"{name}: {why}" for name, why in self.skipped.items()]
        if self.name.startswith("native-cpu"):
            reasons += filter(None, [_OPS[self.op].where])
        return f"{self.name} ({'; '.join(reasons)})" if reasons else self.name


@dataclass(frozen=True)
class _Op:
    plain: Implementation  # in torch
    triton: Implementation
    example: Callable[[torch.device], tuple[Any, ...]]  # small arguments to try a candidate with
    native_cpu: Implementation | None = None  # None: not written
    native_cuda: Implementation | None = None
    more_examples: tuple[Callable[[torch.device], tuple[Any, ...]], ...] = ()
    torch_is_faster: Callable[[Tensor], bool] = lambda _: False  # than the CPU's native kernels
    where: str = ""  # it is, in words


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
        return f"native-cpu-{common.native().cpu_isa()}" if not why else "native", native, why
    return f"native-{device.type}", native, why


def _why_wrong(op: str, run: Implementation, device: torch.device) -> str:
    """Runs a candidate for the first time, on examples, and compares it with torch."""
    entry = _OPS[op]
    try:
        right = all(
            torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5)
            for example in (entry.example, *entry.more_examples)
            # an example each: an operator may write to its arguments
            for x, y in zip(run(*example(device)), entry.plain(*example(device)), strict=True)
        )
    except Exception as error:  # noqa: BLE001 -- whatever it is, another way does the work
        return f"failed when tried: {type(error).__name__}: {str(error).strip()[:200]}"
    return "" if right else "gave wrong results when tried"


# Operator: {compute capability: "triton" or "native"}, whichever took less time for forward and gradient in
# `benchmarks/run.py kernels` on such a card, by the rows in benchmarks/results. On the H200 (9.0) those are of
# launches one by one, which the host bounds: native took 0.4 to 0.9 times as long at every shape, and its first
# call milliseconds where Triton compiles for a second.
_MEASURED_FASTER: dict[str, dict[tuple[int, int], str]] = {
    "group_norm_silu": {(9, 0): "native"},
    "guidance_loss": {(9, 0): "native"},
}


def _preferred(op: str, device: torch.device) -> list[str]:
    """The ways to try, in this order. On CUDA Triton comes first, a compiler for the very card, unless the
    native kernels were measured to be faster on such a card."""
    if device.type != "cuda":
        return ["native", "torch"]
    measured = _MEASURED_FASTER.get(op)
    if measured and measured.get(torch.cuda.get_device_capability(device)) == "native":
        return ["native", "triton", "torch"]
    return ["triton", "native", "torch"]


@functools.cache
def _choose(op: str, device: torch.device, forced: str) -> OpPath:
    ways = [forced] if forced else _preferred(op, device)
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


@dataclass(frozen=True)
class Way:
    """One way to run an operator on a device."""

    name: str  # as OpPath.name
    missing: str  # why it is not there, "" where it is
    wrong: str  # why it failed or disagreed with torch when tried, "" where it did neither

    @property
    def why(self) -> str:
        """Why it does not work, "" where it does."""
        return self.missing or self.wrong


def ways(op: str, device: torch.device | str = "cpu") -> dict[str, Way]:
    """Every way to run `op` on `device`, for comparing them."""
    device, found = torch.device(device), {}
    for way in ("torch", "native", *(("triton",) if device.type == "cuda" else ())):
        name, run, missing = _implementation(op, way, device)
        tried = way != "torch" and not missing
        found[way] = Way(name, missing, _why_wrong(op, run, device) if tried else "")
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


# --- the operators: what a caller sees; operators/ has the rest -----------------------------------------


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
        _guidance_loss.refuse_gradients(anchor, concept, null, negative_guidance, weight)
    _guidance_loss.check_student(student)
    arguments = (
        student,
        anchor,
        concept,
        null,
        _guidance_loss.vector("negative_guidance", negative_guidance, student),
        _guidance_loss.vector("weight", weight, student),
        _guidance_loss.gradient_scale(student),
    )
    if common.nobody_watches(*arguments[:6]):
        return _DIRECT["guidance_loss"](student, arguments[1:])
    loss, per_sample, _ = torch.ops.esd_fast.guidance_loss(*arguments)
    return loss, per_sample


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
    side; `rolled` is the one they follow (the only one, 0, is followed without guidance). `index` () or (1,) int64 on the device is the number of the call,
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
        _guided_step.refuse_gradients(
            predictions, index, table, input_scales, history, inputs, seen, said
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


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, silu: bool = True
) -> Tensor:
    """GroupNorm, and SiLU behind it unless `silu` is False, in one go. Maths in float32.

    `x` is (N, C, H, W), `weight` and `bias` (C,), each float32, bfloat16 or float16. The result has x's dtype
    and is channels_last; on the CPU it is so where x is, and contiguous else. An x of another layout is copied
    first. All three have gradients (first derivatives), for which x alone is kept. Where torch runs it (on the CPU
    also small pictures, unless a gradient is to come through the SiLU or they are channels_last in low
    precision), it is torch's own functions, which keep more, and the layout is theirs.
    """
    # there for 3% of the embedded model's fit step half as much is kept
    keeps_less = silu and torch.is_grad_enabled() and x.requires_grad
    if _torch_runs("group_norm_silu", x, small_too=not keeps_less):
        _group_norm_silu.check(x, weight, bias, groups)
        return _group_norm_silu.as_torch(x, weight, bias, groups, eps, silu)
    if common.nobody_watches(x, weight, bias):
        return _DIRECT["group_norm_silu"](x, weight, bias, groups, eps, silu)
    return torch.ops.esd_fast.group_norm_silu(x, weight, bias, groups, eps, silu)[0]


def geglu(x: Tensor) -> Tensor:
    """`hidden * gelu(gate)`, the halves of `x` (..., 2 D), with the exact GELU; maths in float32.

    `x` is float32, bfloat16 or float16; the result (..., D) has its dtype. First derivatives only, except
    where torch runs it: there it is torch's own functions.
    """
    if _torch_runs("geglu", x):
        _geglu.check(x)
        return _geglu.as_torch(x)
    if common.nobody_watches(x):
        return _DIRECT["geglu"](x)
    return torch.ops.esd_fast.geglu(x)


def _torch_runs(op: str, x: Tensor, small_too: bool = True) -> bool:
    """Whether torch's own functions do it, which then need none of our wrapping; `small_too`: also where they
    are but faster. torch.compile gets the operator, which it cannot look into, so that it traces no choosing."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    if small_too and not _FORCED and _OPS[op].torch_is_faster(x):
        return True
    return path_of(op, x.device).name == "torch"


# --- registration ------------------------------------------------------------------------------------

_OPS = {
    "guidance_loss": _Op(
        plain=_guidance_loss.PLAIN,
        triton=_guidance_loss.TRITON,
        example=_guidance_loss.example,
        native_cpu=_guidance_loss.native_cpu,
        native_cuda=_guidance_loss.native_cuda,
    ),
    "guided_step": _Op(
        plain=_guided_step.PLAIN,
        triton=_guided_step.TRITON,
        example=_guided_step.example,
        native_cpu=_guided_step.native,
    ),
    "group_norm_silu": _Op(
        plain=_group_norm_silu.PLAIN,
        triton=_group_norm_silu.TRITON,
        example=_group_norm_silu.example,
        native_cpu=_group_norm_silu.NATIVE_CPU,
        native_cuda=_group_norm_silu.NATIVE_CUDA,
        more_examples=(_group_norm_silu.even_example,),
        torch_is_faster=_group_norm_silu.torch_is_faster,
        where=f"torch for pictures of fewer than {_group_norm_silu.FEWEST} numbers "
        "without a gradient but channels_last ones in low precision",
    ),
    "geglu": _Op(
        plain=_geglu.PLAIN,
        triton=_geglu.TRITON,
        example=_geglu.example,
        native_cpu=_geglu.NATIVE_CPU,
    ),
}


def _chosen(op: str) -> Callable[[torch.device], Any]:
    return lambda device: path_of(op, device).run


# Library.define and impl rather than torch.library.custom_op: a sixth of its cost a call.
_LIBRARY = torch.library.Library("esd_fast", "DEF")
_DIRECT: dict[str, Callable[..., Any]] = {  # the differentiable ones, past torch's dispatcher
    _name: _module.register(_LIBRARY, _chosen(_name))
    for _name, _module in (
        ("guidance_loss", _guidance_loss),
        ("group_norm_silu", _group_norm_silu),
        ("geglu", _geglu),
    )
}
_guided_step.register(_LIBRARY, _chosen("guided_step"))
