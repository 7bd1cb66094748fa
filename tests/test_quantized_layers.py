"""Quantized layers against torch's own with the weights that bitsandbytes says it stored, and erasures
against those of a model that holds such weights from the start."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

import esd_fast
from esd_fast.bases import base_digest
from esd_fast.collecting import collect_samples
from esd_fast.config import EraseConfig
from esd_fast.erasure import fingerprint
from esd_fast.esd import EraseInterrupted
from esd_fast.fit import FitStep
from esd_fast.memory_count import SavedBytes
from esd_fast.memory_plan import count_step, plan_memory
from esd_fast.models import load_model
from esd_fast.packed_weights import packed_weights
from esd_fast.parameters import trainable_names
from esd_fast.quantize import stored_bytes
from esd_fast.quantized_layers import (
    QuantizedConv2d,
    QuantizedLinear,
    forget_frames,
    held_bytes,
    quantized,
)

from . import pipelines
from .pipelines import SHORT, assert_same_weights, relative, same_bits, watched_run, worst_move
from .test_memory_plan import smaller

library = pytest.importorskip(
    "bitsandbytes.functional", reason="the extra bitsandbytes is not installed"
)
one_thread = pipelines.one_thread
FORMATS = ("int8", "nf4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST = ["first.weight", "first.bias"]


def as_stored(how: str, weight: Tensor) -> Tensor:
    """`weight` through the library and back, float32."""
    matrix = weight.detach().contiguous().flatten(1)
    if how == "int8":
        numbers, scales, _ = library.int8_vectorwise_quant(matrix.half())
        dense = library.int8_vectorwise_dequant(numbers, scales)
    else:
        packed, state = library.quantize_4bit(
            matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        dense = library.dequantize_4bit(packed, state).float()
    return dense.view(weight.shape)


class Layers(nn.Module):
    """Each kind of layer, behind one that device and dtype are read off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.matrix = nn.Linear(80, 48)
        self.bare = nn.Linear(64, 96, bias=False)
        self.plain = nn.Conv2d(16, 24, 3, padding=1)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=2)
        self.odd = nn.Linear(33, 8)


def layers(dtype: torch.dtype = torch.float32) -> Layers:
    torch.manual_seed(0)
    return Layers().to(dtype).requires_grad_(False)


def plainly(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMATS)
def test_a_layer_computes_with_the_weight_that_is_stored(
    how: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """Forward and the input's gradient against float64; nothing is kept for the backward."""
    unet = layers(dtype)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    before = {name: module.weight.detach().clone() for name, module in unet.named_children()}
    strides = {name: module.weight.stride() for name, module in unet.named_children()}
    sizes = 2 * torch.finfo(dtype).eps
    with quantized(unet, FIRST, how) as done:
        told = {"matrix", "bare", "plain", "pointwise", "down", "grouped"}
        ours = {
            n for n, m in unet.named_children() if isinstance(m, (QuantizedLinear, QuantizedConv2d))
        }
        assert ours == told
        assert done.skipped == {"have rows of odd length": 1}
        for name in ours:
            layer = unet.get_submodule(name)
            x = (
                torch.randn(2, layer.in_features)
                if name in ("matrix", "bare")
                else torch.randn(2, 16, 9, 7)
            )
            if channels_last and x.dim() == 4:
                x = x.to(memory_format=torch.channels_last)
            x = x.to(dtype).requires_grad_()
            saved = SavedBytes([])
            with saved.watching():
                y = layer(x)
            assert not saved.kept
            gradient = torch.randn(y.shape).to(dtype)
            (g,) = torch.autograd.grad(y, x, gradient)
            with torch.no_grad():
                assert same_bits(layer(x), y)
            weight = as_stored(how, before[name]).double()
            exact = x.detach().double().requires_grad_()
            truth = plainly(layer, exact, weight)
            (g_truth,) = torch.autograd.grad(truth, exact, gradient.double())
            assert relative(y, truth) < 4 * sizes
            assert relative(g, g_truth) < 4 * sizes
            assert relative(weight, before[name]) < {"int8": 0.02, "nf4": 0.12}[how]
            with pytest.raises((RuntimeError, NotImplementedError)):  # no zeros for who reads it
                layer.weight.sum().item()
    for name, module in unet.named_children():
        assert type(module) in (nn.Linear, nn.Conv2d)
        assert same_bits(module.weight, before[name])
        assert module.weight.stride() == strides[name]
        assert not hasattr(module, "quantized")


@pytest.mark.parametrize("how", FORMATS)
def test_a_weight_takes_the_bytes_that_are_planned(how: str) -> None:
    unet = layers()
    whole = held_bytes(unet)
    assert whole == sum(p.nbytes for p in unet.parameters())
    with quantized(unet, FIRST, how) as done:
        for module in unet.children():
            if isinstance(module, (QuantizedLinear, QuantizedConv2d)):
                rows, columns = len(module.weight), module.weight[0].numel()
                assert module.quantized.stored.nbytes == stored_bytes(how, rows, columns)
        assert held_bytes(unet) < whole / 2
        assert done.nbytes < held_bytes(unet)
    assert held_bytes(unet) == whole


def test_numbers_out_of_range_and_shared_weights_stay() -> None:
    unet = layers()
    unet.plain.weight[0, 0, 0, 0] = math.nan
    unet.down.weight[0, 0, 0, 0] = math.inf
    unet.matrix.weight[0, 0] = 1e6
    unet.bare.weight = nn.Linear(64, 96).weight
    unet.twin = nn.Linear(64, 96)
    unet.twin.weight = unet.bare.weight
    with quantized(unet, FIRST, "int8") as done:
        assert type(unet.matrix) is type(unet.bare) is nn.Linear
        assert done.skipped["hold numbers out of range"] == 3
        assert done.skipped["share their weight"] == 2
    with quantized(unet, FIRST, "nf4") as done:
        assert type(unet.matrix) is QuantizedLinear
        assert done.skipped["hold numbers out of range"] == 2
    with (
        pytest.raises(ValueError, match="no frozen layer of this UNet can be"),
        quantized(nn.Sequential(nn.Linear(2, 2)), [], "nf4"),
    ):
        pytest.fail("entered")


def test_other_fast_forms_leave_quantized_layers_alone() -> None:
    unet = layers()
    with quantized(unet, FIRST, "nf4"), packed_weights(unet) as packing:
        assert str(packing).startswith("no: the frozen weights are quantized")


# ------------------------------------------------------------------------------------ through an erasure


def dequantized(how: str, dtype: torch.dtype, method: str) -> Any:
    """A pipeline that holds in its frozen layers what the library would have stored."""
    pipe = pipelines.pipeline(dtype=dtype)
    trained = trainable_names(pipe.unet, method)
    for name, module in pipe.unet.named_modules():
        frozen = isinstance(module, (nn.Linear, nn.Conv2d)) and f"{name}.weight" not in trained
        if frozen and name not in ("conv_in", "conv_out"):
            module.weight.data = as_stored(how, module.weight).to(dtype)
    return pipe


@pytest.mark.parametrize(("how", "method"), [("nf4", "esd-u"), ("int8", "esd-x-strict")])
def test_an_erasure_is_that_of_a_model_with_such_weights(how: str, method: str) -> None:
    config = EraseConfig("cat", train_method=method, **SHORT)
    truth = watched_run(dequantized(how, torch.float32, method), config)
    quantizing = EraseConfig("cat", train_method=method, quantize=how, checkpointing="all", **SHORT)
    ours = watched_run(pipelines.pipeline(), quantizing)
    losses = truth.erasure.manifest["losses"]
    assert ours.erasure.manifest["losses"] == pytest.approx(losses, rel=1e-4)
    assert worst_move(ours.start, ours.erasure.tensors, truth.erasure.tensors) < 0.02
    assert "quantize" not in truth.erasure.manifest["paths_taken"]
    assert ours.erasure.manifest["paths_taken"]["quantize"].startswith(f"{how} by bitsandbytes")
    assert ours.erasure.manifest["config"]["quantize"] == how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_exact_and_the_result_goes_onto_it(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = pipelines.pipeline(dtype=dtype)
    config = EraseConfig("cat", train_method="esd-x", quantize="nf4", **SHORT)
    base = base_digest(load_model(pipe, config))
    ours = watched_run(pipe, config)
    assert ours.erasure.manifest["base_digest"] == base
    trained = {name: ours.start[name] for name in ours.erasure.tensors}
    assert ours.erasure.manifest["base_fingerprint"] == fingerprint(trained)
    fresh = pipelines.pipeline(dtype=dtype)
    esd_fast.load(ours.erasure.save(tmp_path)).apply(fresh)
    assert_same_weights(pipe, pipelines.weights(fresh))
    ours.erasure.revert(pipe)
    assert_same_weights(pipe, ours.start)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_model_is_whole_after_a_run_that_ends_early(error: type[BaseException]) -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)

    def stop(_: FitStep) -> None:
        raise error

    with pytest.raises((EraseInterrupted, ZeroDivisionError)):
        esd_fast.erase(pipe, "cat", quantize="nf4", on_step=stop, **SHORT)
    assert_same_weights(pipe, before)
    assert {type(m) for m in pipe.unet.modules()}.isdisjoint({QuantizedLinear, QuantizedConv2d})


def test_stored_samples_and_checkpoints_are_of_the_quantized_model(tmp_path: Path) -> None:
    given = {"quantize": "nf4", "train_method": "esd-x", **SHORT}
    straight = esd_fast.erase(pipelines.pipeline(), "cat", **given)
    samples = collect_samples(pipelines.pipeline(), "cat", **given)
    taken = esd_fast.erase(pipelines.pipeline(), samples=samples, learning_rate=1e-3)
    for name, tensor in straight.tensors.items():
        assert same_bits(taken.tensors[name], tensor)
    with pytest.raises(ValueError, match="collected with quantize 'nf4', now 'int8'"):
        esd_fast.erase(pipelines.pipeline(), samples=samples, quantize="int8")
    with pytest.raises(ValueError, match="collected with train_method 'esd-x', now 'esd-u'"):
        esd_fast.erase(pipelines.pipeline(), samples=samples, train_method="esd-u")

    def stop(step: FitStep) -> None:
        if step.iteration == 1:
            raise KeyboardInterrupt

    with pytest.raises(EraseInterrupted):
        esd_fast.erase(pipelines.pipeline(), "cat", checkpoints=tmp_path, on_step=stop, **given)
    resumed = esd_fast.erase(pipelines.pipeline(), "cat", resume=tmp_path, **given)
    assert resumed.manifest["resumed_at"]
    for name, tensor in straight.tensors.items():
        assert same_bits(resumed.tensors[name], tensor)


# ------------------------------------------------------------------------------------------------ memory


def test_a_plan_is_what_is_counted() -> None:
    """The weights to the byte; what is kept for the backward, and the peak, on the CPU."""
    config, how = smaller(), "nf4"
    plan = plan_memory(
        "sd1", config, "esd-x-strict", 64, batch_size=2, quantize=how, enough=2**50
    )  # the first choices are enough
    unet = UNet2DConditionModel.from_config(config).bfloat16().requires_grad_(False).eval()
    names = trainable_names(unet, "esd-x-strict")
    for name in names:
        unet.get_parameter(name).requires_grad_(True)
    with quantized(unet, names, how):
        assert held_bytes(unet) == plan.weights
        real, choice = count_step(unet, 8, 2), plan.choices[1]
    assert real.activations == pytest.approx(choice.activations, rel=0.02)
    largest = max(m.weight.nbytes for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    counted = choice.activations + choice.workspace
    assert 0.95 * counted < real.peak <= 1.05 * counted + largest


def test_what_failed_holds_no_memory_while_weights_come_back() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        try:
            raise KeyError
        except KeyError:
            raise ValueError from None

    def caught(function: Callable[[], None]) -> Iterator[None]:
        try:
            function()
        except ValueError as error:
            assert kept[0]() is not None
            forget_frames(error)
            gc.collect()
            yield

    for _ in caught(fails):
        assert kept[0]() is None
