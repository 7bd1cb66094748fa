"""What several operators need: the kernels' modules, and the two halves of a differentiable one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

Implementation = Callable[..., tuple[Tensor, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # csrc/tensor_view.h


@functools.cache
def native() -> Any:
    """The C++ module. Raises ImportError where it was not built or does not load."""
    return importlib.import_module("esd_fast._native")


def kernels(name: str) -> Any:
    """The module esd_fast.kernels.<name>; in a checkout that is not installed, kernels/<name>.py."""
    package = "esd_fast.kernels"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        folder = Path(__file__).resolve().parents[2] / "kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{package} is not installed and {folder} is not there")
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


@dataclass(frozen=True)
class Pair:
    """One way of running an operator and its gradient. A call runs both on an example (what the operator
    takes, the gradient of its first result): so a way whose gradient is wrong is not taken either."""

    forward: Implementation
    backward: Implementation
    gradient_arguments: Callable[..., tuple[Any, ...]]  # (grad, arguments, results) -> backward's

    def __call__(self, arguments: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, ...]:
        results = self.forward(*arguments)
        return *results, *self.backward(*self.gradient_arguments(grad, arguments, results))


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether an operator on these may be called past torch's dispatcher, whose way through Python costs more
    than a small kernel: nothing traces, transforms or records it, and no tensor is more than a tensor."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, Parameter) or x.is_meta for x in tensors)
    )


def plain(name: str) -> Implementation:
    """The torch formula kernels/reference.py:<name>."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(getattr(kernels("reference"), name)(*arguments))

    return run


def triton(module: str, name: str) -> Implementation:
    """The launcher kernels/<module>.py:<name>, on the device of its first argument."""

    def run(first: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        launch = getattr(kernels(module), name)
        if first.device.type != "cuda":  # the interpreter
            return tuple(launch(first, *arguments))
        with torch.cuda.device(first.device):
            return tuple(launch(first, *arguments))

    return run


def address(
    name: str,
    x: Tensor,
    memory_format: torch.memory_format | None = torch.contiguous_format,
    device: str = "cpu",
) -> tuple[int, int]:
    """What the native module is told of a tensor: where it lies, and its dtype's code (-1: none). `memory_format`: the
    one it has to have; None where the caller knows its strides.

    Raises ValueError where there are no such numbers: another device, a meta or fake tensor, gaps.
    """
    there = x.is_cpu if device == "cpu" else x.is_cuda  # a quarter of what x.device.type takes
    if not there or type(x) is FakeTensor:
        raise ValueError(
            f"{name}: on {x.device}, {type(x).__name__}: use a real tensor on {device}"
        )
    if memory_format is not None and not x.is_contiguous(memory_format=memory_format):
        raise ValueError(f"{name}: strides {x.stride()}: use a {memory_format} tensor")
    return x.data_ptr(), DTYPE_CODES.get(x.dtype, -1)


def cuda_address(
    name: str, x: Tensor, memory_format: torch.memory_format | None = torch.contiguous_format
) -> tuple[int, int]:
    """`address`, for the kernels on a GPU."""
    return address(name, x, memory_format, "cuda")


@contextmanager
def on_device_of(x: Tensor) -> Iterator[tuple[int, int]]:
    """Within: x's CUDA device is the current one. Its number, and the address of its current stream."""
    with torch.cuda.device(x.device):
        yield x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {value.dtype}: use float32, bfloat16 or float16")


def refuse_second_derivative(op: str) -> None:
    """For backward: gradients are on in there with create_graph=True alone."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: do without create_graph=True")
