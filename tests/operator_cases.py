"""Cases for the operators in esd_fast/operators, and the rule for their error; conftest hands them out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def short(dtype: torch.dtype | torch.memory_format) -> str:
    return str(dtype).removeprefix("torch.")


def within(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of torch in the same dtypes, and four roundings of the largest number."""
    unit = torch.finfo(ours.dtype).eps * exact.abs().max()
    allowed = 2 * (plain - exact).abs().max() + 4 * unit
    assert (ours - exact).abs().max() <= allowed, name


def same_for_any_thread_count(run: Callable[[], Iterable[Tensor]]) -> None:
    """Bit for bit."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(list(run()))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor):
    """The result, and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


# --- group_norm_silu ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormCase:
    shape: tuple[int, ...] = (2, 6, 5, 7)
    groups: int = 2
    dtype: torch.dtype = F32
    of_parameters: torch.dtype = F32
    silu: bool = True
    mean: float = 0.5
    layout: torch.memory_format = torch.channels_last

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtypes = f"{short(self.dtype)}-{short(self.of_parameters)}"
        what = f"{'silu' if self.silu else 'plain'}-{self.mean:g}"
        return f"{shape}-{self.groups}-{dtypes}-{what}-{short(self.layout)}"

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
        """x in its layout, weight, bias; and a gradient of y"""
        g = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(self.shape, generator=g).to(self.dtype) for _ in range(2))
        weight, bias = (torch.randn(self.shape[1], generator=g) for _ in range(2))
        x = (x + self.mean).contiguous(memory_format=self.layout)
        inputs = [x, *(v.to(self.of_parameters) for v in (weight, bias))]
        return [v.to(device) for v in inputs], grad.to(device)

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The definition, in whatever dtype comes in."""
        y = F.group_norm(x, self.groups, weight, bias, 1e-5)
        return F.silu(y) if self.silu else y

    def ours(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs, self.groups, 1e-5, silu=self.silu)

    def check(self, function: Callable[..., Tensor], device: str = "cpu") -> None:
        inputs, grad = self.inputs(device)
        exact = with_gradients(self.exact, [v.double() for v in inputs], grad)
        plain = with_gradients(self.exact, [v.to(self.dtype) for v in inputs], grad)
        ours = with_gradients(self.ours(function), inputs, grad)
        assert [v.dtype for v in ours] == [self.dtype, *(v.dtype for v in inputs)]
        for name, *values in zip(("y", "x", "weight", "bias"), ours, plain, exact, strict=True):
            within(name, *values)


TAILS = (2, 66, 5, 13)  # two tiles each way, the second part full; a group of eleven on the edge
NORM_CASES = [
    *(NormCase(dtype=a, of_parameters=b) for a in (F32, BF16, F16) for b in (F32, a)),
    *(NormCase(dtype=a, of_parameters=a, silu=False) for a in (F32, BF16, F16)),
    NormCase(TAILS, 6),
    NormCase(TAILS, 6, F16, F16),
    NormCase((1, 3, 1, 1), 1),  # one number a channel
    NormCase((3, 4, 1, 2), 4, silu=False),  # one channel a group
    NormCase(mean=100.0),
    *(NormCase(layout=torch.contiguous_format, dtype=a, of_parameters=a) for a in (F32, BF16, F16)),
    NormCase(TAILS, 6, BF16, F32, layout=torch.contiguous_format),
    NormCase(
        (1, 4, 17, 31), 2, silu=False, mean=100.0, layout=torch.contiguous_format
    ),  # two blocks
    NormCase((2, 530, 3, 5), 53, BF16),  # more channels than are read at once
]


@pytest.fixture(params=list(dict.fromkeys(NORM_CASES)), ids=str)
def norm_case(request: pytest.FixtureRequest) -> NormCase:
    """Awkward shapes, a large mean, and the dtypes."""
    return request.param


@pytest.fixture
def make_norm_case() -> type[NormCase]:
    return NormCase


@pytest.fixture
def assert_any_thread_count() -> Callable[[Callable[[], Iterable[Tensor]]], None]:
    return same_for_any_thread_count


# --- geglu -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GegluCase:
    shape: tuple[int, ...]
    dtype: torch.dtype = F32

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{short(self.dtype)}"

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """x, and a gradient of y"""
        g = torch.Generator().manual_seed(0)
        x = (3 * torch.randn(self.shape, generator=g)).to(self.dtype)
        grad = torch.randn((*self.shape[:-1], self.shape[-1] // 2), generator=g).to(self.dtype)
        return x.to(device), grad.to(device)

    def exact(self, x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return hidden * F.gelu(gate)

    def check(self, function: Callable[..., Tensor], device: str = "cpu") -> None:
        x, grad = self.inputs(device)
        exact = with_gradients(self.exact, [x.double()], grad)
        plain = with_gradients(self.exact, [x], grad)
        ours = with_gradients(function, [x], grad)
        assert [v.dtype for v in ours] == [self.dtype] * 2
        for name, *values in zip(("y", "x"), ours, plain, exact, strict=True):
            within(name, *values)


GEGLU_CASES = [
    *(GegluCase((2, 3, 14), dtype) for dtype in (F32, BF16, F16)),
    GegluCase((1, 5, 518)),  # two tiles each way, the second part full
    GegluCase((2,)),
]


@pytest.fixture(params=GEGLU_CASES, ids=str)
def geglu_case(request: pytest.FixtureRequest) -> GegluCase:
    return request.param


@pytest.fixture
def make_geglu_case() -> type[GegluCase]:
    return GegluCase
