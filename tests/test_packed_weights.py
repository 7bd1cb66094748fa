"""packed_weights(unet): torch's own numbers, nothing kept, and every bit back at the end."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

import esd_fast
from esd_fast import engine
from esd_fast import packed_weights as packing
from esd_fast.checkpointing import blocks_of, checkpointed
from esd_fast.frozen_conv import FrozenConv2d, frozen_convolutions
from esd_fast.packed_weights import DirectLinear, PackedConv2d, packed_weights, why_not_dtype
from esd_fast.parameters import trainable_names

from . import pipelines
from .pipelines import relative, same_bits

one_thread = pipelines.one_thread

pytestmark = pytest.mark.skipif(
    bool(why_not_dtype(torch.float32)), reason=why_not_dtype(torch.float32) or "works"
)
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(bool(why_not_dtype(torch.bfloat16)), reason="no bfloat16"),
    ),
]
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def small_unet(dtype: torch.dtype = torch.float32, method: str = "esd-x") -> Any:
    """Random weights; what `method` trains asks for gradients."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL).to(dtype).requires_grad_(False).eval()
    trained = set(trainable_names(unet, method))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in trained)
    return unet


def asked(unet: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    return unet(latents.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample


def results(unet: Any) -> dict[str, torch.Tensor]:
    """The prediction, and the gradient of everything that trains, by name."""
    prediction = asked(unet)
    trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(prediction.shape, generator=g).to(prediction.dtype)
    gradients = torch.autograd.grad(prediction, list(trained.values()), upstream)
    return {"prediction": prediction.detach(), **dict(zip(trained, gradients, strict=True))}


def assert_close(ours: Any, plain: Any, exact: Any) -> None:
    """At most twice torch's error in the same dtype, and a few roundings."""
    largest = max(x.norm() for x in exact.values())
    for name, truth in exact.items():
        if truth.norm() < 1e-9 * largest:
            continue  # a gradient that is 0 but for rounding
        allowed = 2 * relative(plain[name], truth) + 4 * torch.finfo(ours[name].dtype).eps
        assert relative(ours[name], truth) <= allowed, name


def packed(unet: nn.Module) -> list[PackedConv2d]:
    return [m for m in unet.modules() if isinstance(m, PackedConv2d)]


# --- the same numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_channels_last_eager(dtype: torch.dtype) -> None:
    unet = small_unet(dtype)
    plain = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    torch.set_num_threads(2)  # on one, torch has 1x1 float32 kernels done by another library
    with torch.no_grad(), packed_weights(unet) as done:
        for module in unet.modules():
            if dtype == torch.float32 and isinstance(module, DirectLinear):
                module.__class__ = nn.Linear  # what its docstring excepts
        assert (done.convolutions, done.reason) == (len(packed(unet)), "")
        twice = [asked(unet), asked(unet)]
        assert all(m.packs.packed is not None for m in packed(unet))
        truth = asked(plain)
    assert all(same_bits(x, truth) for x in twice)


@pytest.mark.parametrize("through", ["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["esd-x", "esd-u", "conv1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype, method: str, through: str) -> None:
    unet = small_unet(dtype, method)
    exact, plain = results(copy.deepcopy(unet).double()), results(unet)
    with (
        packed_weights(unet),
        checkpointed(unet, blocks_of(unet) if through == "checkpointed" else ()),
    ):
        first, second = results(unet), results(unet)
    assert_close(first, plain, exact)
    assert all(same_bits(second[n], x) for n, x in first.items())


CASES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "no padding": {"kernel_size": 3},
    "oblong": {"kernel_size": (3, 5), "padding": (2, 1)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "no bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "much padding": {"kernel_size": 3, "padding": 3},
}


@pytest.mark.parametrize("shape", [(1, 12, 9, 7), (3, 12, 8, 8), (2, 12, 5, 5)])
@pytest.mark.parametrize("case", CASES)
def test_a_convolution(case: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(12, 20, **CASES[case])).requires_grad_(False)
    pixels = torch.randn(shape)
    upstream = torch.randn(layers[1](pixels).shape)

    def both(convolution: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.requires_grad_()
        y = convolution(x)
        return {"output": y, "gradient": torch.autograd.grad(y, x, upstream.to(x.dtype))[0]}

    plain = both(layers[1], pixels)
    exact = both(copy.deepcopy(layers[1]).double(), pixels.double())
    with packed_weights(layers):
        ours = both(layers[1], pixels)
        turned = "packs" in vars(layers[1]) and layers[1].packs.turned is not None
        assert turned == (case not in ("strided", "much padding"))
    assert_close(ours, plain, exact)


def test_a_frozen_convolution_keeps_nothing() -> None:
    layers = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
    kept: list[torch.Tensor] = []
    with (
        packed_weights(layers),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        layers[1](torch.randn(1, 8, 4, 4, requires_grad=True))
    assert kept == []


# --- what trains ------------------------------------------------------------------------------------------


def test_a_weight_that_moves_is_packed_anew() -> None:
    """While the student rolls out, convolutions in training rest and move in turn."""
    unet = small_unet(method="esd-u")
    with packed_weights(unet):
        for _ in range(2):
            with torch.no_grad():
                rolled = [asked(unet) for _ in range(3)]
                assert all(m.packs.packed is not None for m in packed(unet))
                truth = asked(copy_of(unet))
                assert all(relative(x, truth) < 1e-5 for x in rolled)
                for parameter in unet.parameters():  # an optimizer step
                    parameter.mul_(1.1)
        with torch.no_grad():
            for (
                parameter
            ) in unet.parameters():  # pointers are swapped, as for the teacher's answers
                parameter.data = parameter.data * 0.9
            assert relative(asked(unet), asked(copy_of(unet))) < 1e-5


def copy_of(unet: Any) -> Any:
    """Plain modules, today's weights."""
    plain = UNet2DConditionModel(**SMALL).eval()
    plain.load_state_dict(unet.state_dict())
    return plain


# --- in and out -------------------------------------------------------------------------------------------


def test_within_names_stay_and_numbers_are_not_to_be_read() -> None:
    unet = small_unet()
    names, first = list(unet.state_dict()), next(unet.parameters())
    trained = trainable_names(unet, "esd-x")
    with packed_weights(unet):
        results(unet)
        state = unet.state_dict()
        assert list(state) == names
        assert next(unet.parameters()) is first
        assert (unet.device.type, unet.dtype) == ("cpu", torch.float32)
        assert all(state[n].device.type == "cpu" for n in trained)
        away = [n for n, x in state.items() if x.device.type == "meta"]
        assert "down_blocks.0.resnets.0.conv1.weight" in away
        with pytest.raises((RuntimeError, NotImplementedError)):
            state[away[0]].sum().item()


def test_weights_of_a_mapped_file_stay_and_leave_memory(tmp_path: Any) -> None:
    from esd_fast.pages import file_ranges

    name, weight = tmp_path / "weight", torch.randn(256, 256, 3, 3)
    name.write_bytes(weight.numpy().tobytes())
    mapped = torch.from_file(str(name), shared=False, size=weight.numel(), dtype=torch.float32)
    layers = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(256, 256, 3)).requires_grad_(False)
    layers[1].weight.data = mapped.view_as(weight)
    assert any(a <= mapped.data_ptr() < b for a, b in file_ranges())
    with torch.no_grad(), packed_weights(layers):
        ours = layers[1](torch.ones(1, 256, 4, 4))
        assert resident(mapped.data_ptr()) < weight.nbytes / 4
        assert same_bits(layers[1].weight, weight)  # readable
    assert layers[1].weight.data_ptr() == mapped.data_ptr()
    assert relative(ours, layers[1](torch.ones(1, 256, 4, 4))) < 1e-5


def resident(address: int) -> int:
    """Bytes of the mapping at `address` that are in memory."""
    from pathlib import Path

    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")[0].partition("-")
        if rest:
            inside = int(first, 16) <= address < int(rest, 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undone_to_the_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    unet = small_unet(dtype).to(memory_format=layout)
    weight = unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight[0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    before, parameters = pipelines.weights(unet), list(unet.parameters())
    strides, classes = [p.stride() for p in parameters], [type(m) for m in unet.modules()]

    def stopped() -> None:
        results(unet)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), packed_weights(unet):
        stopped()
    pipelines.assert_same_weights(unet, before)
    assert all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
    assert [p.stride() for p in parameters] == strides
    assert [type(m) for m in unet.modules()] == classes
    assert not any("packs" in vars(m) for m in unet.modules())


def test_over_frozen_convolutions() -> None:
    unet = small_unet()
    plain = results(unet)
    with frozen_convolutions(unet) as count:
        with packed_weights(unet) as done:
            assert done.convolutions == count == len(packed(unet))
            ours = results(unet)
        assert sum(type(m) is FrozenConv2d for m in unet.modules()) == count
    assert relative(ours["prediction"], plain["prediction"]) < 1e-5


class Another(nn.Conv2d):
    pass


def test_what_is_not_its_business_stays() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.another = Another(4, 4, 1)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
            self.same = nn.Conv2d(4, 4, 3, padding="same")
            self.one = nn.Conv2d(4, 4, 1)
            self.other = nn.Conv2d(4, 4, 1)
            self.other.weight = self.one.weight
            self.own = nn.Conv2d(4, 4, 1)
            self.own.forward = self.own.forward

    layers = Layers().requires_grad_(False)
    with packed_weights(layers) as done:
        assert packed(layers) == []
    assert str(done) == (
        "0 convolutions packed, 1 matrices by oneDNN (as they were: 1 are Another; 3 have groups or "
        "padding of another kind; 2 share their weight; 1 have a forward of their own)"
    )


# --- reasons why not ----------------------------------------------------------------------------------------


def reason(unet: Any, **settings: Any) -> str:
    with packed_weights(unet, **settings) as done:
        assert not any(isinstance(m, (PackedConv2d, DirectLinear)) for m in unet.modules())
    assert str(done) == f"no: {done.reason}"
    return done.reason


def test_what_does_not_pay_is_left() -> None:
    unet = small_unet()
    assert reason(unet, passes=18) == "18 UNet passes do not pay for it (64 would)"


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()
    assert reason(copy.deepcopy(unet).to("meta")) == "the UNet is on meta"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(unet) == "autocast is on"
    with torch.inference_mode():
        made_there = copy.deepcopy(unet)
    assert reason(made_there) == "the weights were made in inference mode"
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert reason(unet) == "torch.backends.mkldnn is off"


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_private_entry_points_may_go(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "missing":
        monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    else:
        monkeypatch.setattr(packing, "product", lambda rows, weight, _: 2 * F.linear(rows, weight))
    why_not_dtype.cache_clear()
    said = reason(small_unet())
    why_not_dtype.cache_clear()
    if fault == "missing":
        assert said.startswith("float32 packing failed when tried: AttributeError: ")
    else:
        assert said == "float32 packing gave wrong results when tried"


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fast", "reference", "paper-diffusers"])
def test_an_erasure_is_the_same(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def erased(layout: torch.memory_format = torch.contiguous_format) -> Any:
        pipe = pipelines.pipeline()
        pipe.unet.to(memory_format=layout)
        settings = {"train_method": "esd-u", "preset": preset, **pipelines.SHORT}
        return esd_fast.erase(pipe, "cat", **settings), pipe

    plain, start = erased()[0], pipelines.weights(pipelines.pipeline())
    # torch itself, summing in other orders
    moved = erased(torch.channels_last)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    split = erased()[0]
    torch.set_num_threads(threads)
    monkeypatch.setattr(engine, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(packing, "FEWEST_PASSES", 0)
    ours, pipe = erased()
    said = ours.manifest["paths_taken"]["packed_weights"]
    assert "convolutions packed" in said
    assert plain.manifest["paths_taken"]["packed_weights"].startswith("no: ")
    allowed = 4 * max(pipelines.worst_move(start, x.tensors, plain.tensors) for x in (moved, split))
    assert pipelines.worst_move(start, ours.tensors, plain.tensors) <= allowed
    ours.revert(pipe)
    pipelines.assert_same_weights(pipe, start)
