"""Fixtures that several folders share. Test modules cannot import each other (--import-mode=importlib),
so what they share is handed out from here."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each; what they start inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from .operator_cases import (  # noqa: F401
    assert_any_thread_count,
    geglu_case,
    make_geglu_case,
    make_norm_case,
    norm_case,
)

ROOT = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """run_python(*arguments, VARIABLE=value or None, ...): a fresh interpreter's output."""

    def run(*arguments: str, **variables: str | None) -> str:
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("ESD_", "TRITON_", "PYTEST_"))
        }
        env |= {k: v for k, v in variables.items() if v is not None}
        # -P: without it the source folder in the working directory would hide an installed package
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.fail(f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run


@pytest.fixture
def needs_native() -> None:
    if importlib.util.find_spec("esd_fast._native") is None:
        pytest.skip("native module not built")


# --- guidance_loss: cases and the rule for its error ---------------------------------------------------

SHAPES = [
    (1, 1),
    (3,),
    (2, 4, 8, 8),
    (3, 5, 7, 11),
    (2, 4, 17, 31),  # three blocks a sample, the last one part full
    (19, 3),  # more samples than are summed up at once
    (1, 33 * 1024 + 1),  # more blocks than are summed up at once; more than one thread on the CPU
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]
Loss = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class GuidanceCase:
    shape: tuple[int, ...]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    def arguments(self, device: str = "cpu") -> list[torch.Tensor]:
        """student, anchor, concept, null, negative_guidance, weight; the last sample is a kept one."""
        g = torch.Generator().manual_seed(0)
        batch = self.shape[0]
        predictions = [torch.randn(self.shape, generator=g) for _ in range(4)]
        negative_guidance = torch.rand(batch, generator=g) * 3
        negative_guidance[-1] = 0
        weight = torch.rand(batch, generator=g) + 0.5
        dtypes = [self.student_dtype, *[self.teacher_dtype] * 3]
        predictions = [x.to(dtype) for x, dtype in zip(predictions, dtypes, strict=True)]
        return [x.to(device) for x in (*predictions, negative_guidance, weight)]

    def check(self, loss: Loss, device: str = "cpu") -> None:
        """Against the formula in float64: at most twice the error of torch in the dtypes given."""
        arguments = self.arguments(device)
        exact = results(formula, [x.double() for x in arguments])
        plain = results(formula, low_precision(arguments))
        ours = results(loss, arguments)
        assert [x.dtype for x in ours] == [torch.float32, torch.float32, self.student_dtype]
        assert [x.shape for x in ours] == [x.shape for x in exact]
        for name, x, p, e in zip(
            ("loss", "per_sample", "gradient"), ours, plain, exact, strict=True
        ):
            unit = torch.finfo(x.dtype).eps * e.abs().max()  # one rounding of the result
            allowed = 2 * (p - e).abs().max() + 4 * unit
            assert (x - e).abs().max() <= allowed, name


def formula(student, anchor, concept, null, negative_guidance, weight):
    """The definition, in whatever dtype comes in."""
    rows = (-1,) + (1,) * (student.dim() - 1)
    target = anchor - negative_guidance.view(rows) * (concept - null)
    per_sample = weight * (student - target).square().reshape(student.shape[0], -1).mean(1)
    return per_sample.mean(), per_sample


def low_precision(arguments):
    """The vectors in the teacher's dtype, so that the formula stays in low precision."""
    dtype = arguments[1].dtype
    return [*arguments[:4], *(x.to(dtype) for x in arguments[4:])]


def results(loss: Loss, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """loss, per-sample losses, gradient of the student"""
    student = arguments[0].detach().clone().requires_grad_()
    value, per_sample = loss(student, *arguments[1:])
    (gradient,) = torch.autograd.grad(value, student)
    return [value.detach(), per_sample.detach(), gradient]


def case_name(case: GuidanceCase) -> str:
    dtypes = [str(d).removeprefix("torch.") for d in (case.student_dtype, case.teacher_dtype)]
    return "-".join(["x".join(map(str, case.shape)), *dtypes])


@pytest.fixture(params=[GuidanceCase(s, *d) for s in SHAPES for d in DTYPES], ids=case_name)
def guidance_case(request: pytest.FixtureRequest) -> GuidanceCase:
    """Awkward shapes in every mixture of dtypes."""
    return request.param


@pytest.fixture
def guidance_case_of() -> type[GuidanceCase]:
    """guidance_case_of(shape, student_dtype, teacher_dtype)"""
    return GuidanceCase


@pytest.fixture
def guidance_arguments() -> Callable[..., list[torch.Tensor]]:
    """guidance_arguments(shape, student_dtype, teacher_dtype, device)"""

    def make(shape=(2, 4, 6, 10), student=torch.float32, teacher=torch.float32, device="cpu"):
        return GuidanceCase(shape, student, teacher).arguments(device)

    return make


@pytest.fixture
def guidance_results() -> Callable[[Loss, list[torch.Tensor]], list[torch.Tensor]]:
    """guidance_results(loss, arguments): loss, per-sample losses, gradient of the student"""
    return results


# --- guided_step: cases and the rule for its error -----------------------------------------------------

STEP_SHAPES = [
    (2, 1, 1),
    (1, 2, 3, 5),
    (2, 2, 4, 8, 8),
    (3, 3, 5, 7, 11),
    (3, 1, 4, 17, 31),
]  # (N, B, ...)
STEP_DTYPES = [  # of the predictions and of the UNet's inputs
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]
CALLS, SCALE = 11, 3.0  # more calls than rows are read at once


@dataclass
class StepCase:
    """Random arguments of one call; what is written starts as sevens."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    of_inputs: torch.dtype = torch.float32
    index: int = 8
    keep: bool = True
    device: str = "cpu"

    def arguments(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        (names, batch, *sample), calls = self.shape, CALLS
        made = {
            "predictions": torch.randn(self.shape, generator=g).to(self.dtype),
            "index": torch.tensor([self.index]),
            "table": torch.randn(calls + 3, calls + 3, generator=g).tril(),  # more than the history
            "input_scales": torch.rand(calls + 3, generator=g) + 0.5,
            "rolled": names - 1,
            "guidance_scale": SCALE,
            "history": torch.randn(calls + 1, batch, *sample, generator=g),
            "inputs": torch.full(self.shape, 7.0, dtype=self.of_inputs),
        }
        if self.keep:
            made["seen"] = torch.full((batch, calls, *sample), 7.0, dtype=self.of_inputs)
            made["said"] = torch.full((names, batch, calls, *sample), 7.0, dtype=self.dtype)
        return {k: v.to(self.device) if hasattr(v, "to") else v for k, v in made.items()}

    def check(self, step: Callable[..., None]) -> None:
        """Against the definition in float64, to the rounding of float32 sums and of each result."""
        before, given = self.arguments(), self.arguments()
        step(**given)
        exact, slack = exact_step(
            **{k: v.double() if k in FLOATS else v for k, v in before.items()}
        )
        for name, expected in exact.items():
            ours = given[name]
            unit = (
                torch.finfo(ours.dtype).eps * expected.abs()
            )  # a rounding, down or to the nearest
            error = (ours.double() - expected).abs()
            assert (error <= unit + 8 * torch.finfo(torch.float32).eps * slack[name]).all(), name


FLOATS = ("predictions", "table", "input_scales", "history", "inputs", "seen", "said")


def exact_step(predictions, index, table, input_scales, rolled, guidance_scale, history, **buffers):
    """The definition, element for element, and the size of the terms in each sum."""
    i, null = int(index), predictions[0]
    history = history.clone()
    history[i + 1] = null + guidance_scale * (predictions[rolled] - null)
    exact = {"history": history, **{k: v.clone() for k, v in buffers.items()}}
    slack = {k: torch.zeros_like(v) for k, v in exact.items()}
    slack["history"][i + 1] = null.abs() + guidance_scale * (predictions[rolled].abs() + null.abs())
    state, size = torch.zeros_like(null), torch.zeros_like(null)
    for k in range(i + 2):
        state += table[i + 1, k] * history[k]
        size += (table[i + 1, k] * history[k]).abs() + (table[i + 1, k] * slack["history"][k]).abs()
    exact["inputs"][:] = input_scales[i + 1] * state
    slack["inputs"][:] = input_scales[i + 1] * size
    if "said" in exact:
        exact["said"][:, :, i] = predictions
    if "seen" in exact and i + 1 < exact["seen"].shape[1]:
        exact["seen"][:, i + 1] = input_scales[i + 1] * state
        slack["seen"][:, i + 1] = input_scales[i + 1] * size
    return exact, slack


@pytest.fixture
def step_case() -> type[StepCase]:
    """step_case(shape, dtype, of_inputs, index, keep, device)"""
    return StepCase


def step_name(case: tuple[tuple[int, ...], tuple[torch.dtype, torch.dtype]]) -> str:
    dtypes = [str(d).removeprefix("torch.") for d in case[1]]
    return "-".join(["x".join(map(str, case[0])), *dtypes])


@pytest.fixture(params=[(s, d) for s in STEP_SHAPES for d in STEP_DTYPES], ids=step_name)
def some_step(request: pytest.FixtureRequest) -> StepCase:
    """Awkward shapes in every mixture of dtypes."""
    shape, dtypes = request.param
    return StepCase(shape, *dtypes)
