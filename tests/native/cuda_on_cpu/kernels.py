"""The CUDA kernels, their launchers, bindings and wrappers, on the CPU: see cuda_runtime.h beside this.

tests/native/test_cuda_on_cpu.py runs this file in a process of its own, with the sanitizers loaded: every tensor
ends where its memory ends, and fresh memory is full of NaNs. Each launch takes blocks and threads in another order.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import random
import sys

import pytest
import torch

from esd_fast import ops
from esd_fast.operators import common

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """The module built by the outer test stands for the installed one, and CPU tensors for CUDA's."""
    spec = importlib.util.spec_from_file_location("_native", os.environ["ESD_CUDA_ON_CPU"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "esd_fast._native", module)
    monkeypatch.setattr(common, "cuda_address", common.address)
    monkeypatch.setattr(common, "on_device_of", lambda _: contextlib.nullcontext((0, 0)))
    # the only layout that a card's operator hands to a kernel
    monkeypatch.setattr(ops._group_norm_silu, "memory_format", lambda _: torch.channels_last)
    for op, entry in ops._OPS.items():
        swapped = dataclasses.replace(entry, native_cpu=entry.native_cuda)
        if op == "group_norm_silu":  # tried on the layout that a card would get
            examples = (common.kernels("reference").group_norm_silu_even_example,)
            swapped = dataclasses.replace(swapped, more_examples=examples)
        monkeypatch.setitem(ops._OPS, op, swapped)
    common.native.cache_clear()
    ops._choose.cache_clear()
    with ops.forced("native"):
        yield module


def test_what_runs_is_native():
    for op in ("group_norm_silu", "guidance_loss"):
        assert ops.path_of(op).name.startswith("native")


def misaligned(x):
    """The same tensor, beginning one element behind a multiple of 16 bytes."""
    flat = torch.as_strided(x, (x.numel(),), (1,))
    moved = torch.cat((flat.new_zeros(1), flat))[1:]
    return torch.as_strided(moved, x.shape, x.stride(), moved.storage_offset())


# --- group_norm_silu ---------------------------------------------------------------------------------


def test_norm_matches_float64(norm_case):
    norm_case.check(ops.group_norm_silu)


# (N, C, H, W), groups: what each adds
NORM_SHAPES = {
    "320 channels, groups of ten, two row tiles": ((2, 320, 8, 27), 32),
    "one row tile with a tail": ((2, 320, 5, 9), 32),
    "960 channels": ((1, 960, 3, 5), 32),
    "a group wider than a tile": ((2, 1040, 2, 3), 2),
    "a group wider than a tile, several row tiles": ((1, 1048, 6, 9), 1),
    "tiles that end within groups": ((1, 1203, 3, 3), 3),
    "a group that lies in three tiles": ((1, 303, 5, 70), 3),
    "one group of a few": ((2, 24, 9, 9), 1),
    "a channel a group": ((1, 72, 7, 5), 72),
    "three channels a group": ((1, 24, 40, 20), 8),
    "seven channels": ((2, 7, 11, 13), 7),
    "eight channels, all threads in a column": ((1, 8, 50, 45), 4),
    "one channel": ((3, 1, 33, 70), 1),
    "as many row tiles as there may be": ((1, 2, 310, 900), 2),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORM_SHAPES)
def test_norm_at_odd_shapes(name, dtype, make_norm_case):
    shape, groups = NORM_SHAPES[name]
    make_norm_case(shape, groups, dtype, F32).check(ops.group_norm_silu)


def test_norm_at_drawn_shapes(make_norm_case):
    draw = random.Random(0)
    for _ in range(60):
        groups, members = draw.choice([1, 2, 3, 4, 8, 32]), draw.choice([1, 2, 3, 5, 8, 10, 20, 40])
        shape = (draw.randint(1, 3), groups * members, draw.randint(1, 12), draw.randint(1, 12))
        dtypes = (draw.choice([F32, BF16, F16]), draw.choice([F32, BF16, F16]))
        case = make_norm_case(shape, groups, *dtypes, silu=draw.random() < 0.7)
        try:
            case.check(ops.group_norm_silu)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_norm_of_misaligned_tensors(dtype, make_norm_case):
    case = make_norm_case((2, 40, 5, 7), 4, dtype, dtype)
    (x, *parameters), grad = case.inputs()
    grad = grad.contiguous(memory_format=torch.channels_last)
    forward = torch.ops.esd_fast.group_norm_silu
    backward = torch.ops.esd_fast.group_norm_silu_backward
    expected = forward(x, *parameters, 4, 1e-5, True)
    of_x = backward(grad, x, *expected[1:], *parameters, 4, True, True)
    moved = [misaligned(t) for t in (x, *parameters)]
    results = forward(*moved, 4, 1e-5, True)
    torch.testing.assert_close(results, expected)
    rest = (*results[1:], *moved[1:], 4, True, True)
    torch.testing.assert_close(backward(misaligned(grad), moved[0], *rest), of_x)


def test_norm_gradient_without_parameters_or_in_another_dtype(make_norm_case):
    (x, *parameters), grad = make_norm_case((2, 40, 20, 20), 4, BF16, F32).inputs()
    _, mean, rstd = torch.ops.esd_fast.group_norm_silu(x, *parameters, 4, 1e-5, True)
    backward = torch.ops.esd_fast.group_norm_silu_backward
    arguments = (grad, x, mean, rstd, *parameters, 4, True)
    expected = backward(*arguments, True)
    alone, *none = backward(*arguments, False)
    assert torch.equal(alone, expected[0])
    assert [v.shape for v in none] == [(0,), (0,)]
    torch.testing.assert_close(backward(grad.float(), *arguments[1:], True), expected)


@pytest.mark.parametrize(("shape", "groups"), [((2, 320, 5, 9), 32), ((2, 80, 20, 40), 8)])
def test_norm_agrees_in_every_bit_whatever_comes_first(shape, groups, make_norm_case):
    case = make_norm_case(shape, groups, BF16, BF16)
    inputs, grad = case.inputs()
    inputs = [x.requires_grad_() for x in inputs]
    runs = []
    for _ in range(3):
        y = case.ours(ops.group_norm_silu)(*inputs)
        runs.append((y, *torch.autograd.grad(y, inputs, grad)))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_norm_of_infinities_and_large_numbers(make_norm_case):
    case = make_norm_case(mean=1000.0)
    case.check(ops.group_norm_silu)
    (x, *parameters), _ = case.inputs()
    x[0, 0, 0, 0] = float("inf")
    y = ops.group_norm_silu(x, *parameters, 2)
    assert y[0, :3].isnan().all()
    assert y[0, 3:].isfinite().all()
    assert y[1].isfinite().all()


def test_opcheck_of_norm(make_norm_case):
    (x, weight, bias), grad = make_norm_case(dtype=BF16).inputs()
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias, 2, 1e-5, True)
    torch.library.opcheck(torch.ops.esd_fast.group_norm_silu.default, arguments)
    _, mean, rstd = torch.ops.esd_fast.group_norm_silu(*arguments)
    torch.library.opcheck(
        torch.ops.esd_fast.group_norm_silu_backward.default,
        (grad, x.detach(), mean, rstd, weight.detach(), bias, 2, True, True),
    )


def test_norm_refuses_what_is_not_there(native):
    x, here = (0, 0), torch.zeros(4).data_ptr()
    with pytest.raises(ValueError, match="a tensor without memory"):
        native.group_norm_silu_cuda(x, x, x, 1, 1, 4, 2, True, 1e-5, here, here, here, here, 0, 0)
    x = (here, 0)
    with pytest.raises(ValueError, match="groups do not divide channels"):
        native.group_norm_silu_cuda(x, x, x, 1, 1, 4, 3, True, 1e-5, here, here, here, here, 0, 0)
    with pytest.raises(ValueError, match="an empty batch"):
        native.group_norm_silu_cuda(x, x, x, 1, 0, 4, 2, True, 1e-5, here, here, here, here, 0, 0)
    with pytest.raises(ValueError, match="more than 16777216 channels"):
        native.group_norm_silu_scratch(x, 1, 1, 1 << 25, 1, True)


# --- guidance_loss -----------------------------------------------------------------------------------


def test_loss_matches_float64(guidance_case):
    guidance_case.check(ops.guidance_loss)


@pytest.mark.parametrize("dtypes", list(itertools.product([F32, BF16, F16], repeat=2)))
@pytest.mark.parametrize("shape", [(2, 4, 6, 10), (3, 4, 5, 7), (5, 3)])
def test_loss_of_misaligned_tensors(shape, dtypes, guidance_arguments):
    *predictions, n, weight = guidance_arguments(shape, *dtypes)
    expected = torch.ops.esd_fast.guidance_loss(*predictions, n, weight, 1.0)
    moved = [misaligned(x) for x in predictions]
    results = torch.ops.esd_fast.guidance_loss(*moved, n, weight, 1.0)
    torch.testing.assert_close(results, expected)


def test_loss_agrees_in_every_bit_whatever_comes_first(guidance_arguments, guidance_results):
    arguments = guidance_arguments((3, 4, 61, 67))
    first, *others = (guidance_results(ops.guidance_loss, arguments) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(other, first, strict=True))
