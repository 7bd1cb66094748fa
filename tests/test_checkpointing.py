"""Checkpointed blocks and frozen convolutions: the same gradients, fewer bytes kept."""

from contextlib import ExitStack

import pytest
import torch

from esd_fast.checkpointing import blocks_in_backward, blocks_of, checkpointed
from esd_fast.frozen_conv import FrozenConv2d, frozen_convolutions
from esd_fast.memory_count import SavedBytes
from esd_fast.parameters import trainable_names

from . import pipelines

one_thread = pipelines.one_thread
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def student(method, dtype=torch.float32):
    unet = pipelines.pipeline("sd-ddim", dtype).unet.requires_grad_(False).eval()
    for name in trainable_names(unet, method):
        unet.get_parameter(name).requires_grad_(True)
    return unet


def fit(unet):
    """Bytes kept for the backward, and the gradients by name."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=g).to(unet.dtype)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=g).to(unet.dtype)
    saved = SavedBytes(unet.parameters())
    with saved.watching():
        prediction = unet(latents, torch.tensor([3, 500]), text, return_dict=False)[0]
    kept = saved.by_section().get("", 0)
    prediction.float().square().mean().backward()
    return kept, {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert a
    assert all(pipelines.same_bits(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["esd-x", "esd-u"])
def test_gradients_are_equal_and_bytes_fall_block_by_block(method, dtype):
    plain, gradients = fit(student(method, dtype))
    unet = student(method, dtype)
    last = plain
    for count in range(1, len(BLOCKS) + 1):
        unet.zero_grad()
        with checkpointed(unet, BLOCKS[:count]):
            kept, again = fit(unet)
        assert_same(again, gradients)
        assert kept < last
        last = kept


def test_all_is_undone_even_after_an_error():
    unet = student("esd-x")
    before = {n: dict(m.__dict__) for n, m in unet.named_modules()}
    with pytest.raises(RuntimeError), checkpointed(unet, BLOCKS), frozen_convolutions(unet):  # noqa: PT012
        assert unet.is_gradient_checkpointing
        raise RuntimeError
    assert {n: dict(m.__dict__) for n, m in unet.named_modules()} == before
    assert not any(isinstance(m, FrozenConv2d) for m in unet.modules())


def test_unknown_block_is_named():
    with pytest.raises(ValueError, match=r"'up_blocks.7' is unknown; this UNet has down_blocks.0"):
        checkpointed(student("esd-x"), ["up_blocks.7"]).__enter__()


def test_blocks_that_the_backward_passes():
    unet = student("esd-x")
    assert list(blocks_of(unet)) == BLOCKS
    assert blocks_in_backward(unet, ["mid_block.resnets.0.conv1.weight"]) == BLOCKS[2:]
    assert blocks_in_backward(unet, ["up_blocks.1.x", "down_blocks.1.x"]) == BLOCKS[1:]
    assert blocks_in_backward(unet, ["conv_in.weight"]) == BLOCKS
    assert blocks_in_backward(unet, ["time_embedding.linear_1.bias"]) == BLOCKS
    assert blocks_in_backward(unet, ["conv_out.weight"]) == []


@pytest.mark.parametrize("blocks", [[], BLOCKS])
@pytest.mark.parametrize("method", ["esd-x", "up_blocks.1.resnets.0.conv1", "esd-all"])
def test_frozen_convolutions_keep_less_and_give_the_same(method, blocks):
    with checkpointed(unet := student(method), blocks):
        plain, gradients = fit(unet)
    unet = student(method)
    with ExitStack() as stack:
        stack.enter_context(checkpointed(unet, blocks))
        changed = stack.enter_context(frozen_convolutions(unet))
        kept, again = fit(unet)
    assert_same(again, gradients)
    assert (changed > 0) == (method != "esd-all")
    # what is run again keeps nothing between, so there is little left to save
    assert kept < plain if changed and not blocks else kept <= plain


def test_a_frozen_convolution_saves_its_weight_alone():
    convolution = torch.nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, dilation=2)
    pixels = torch.randn(2, 6, 9, 7, requires_grad=True)
    kept, gradients = [], []
    for lean in (False, True):
        convolution.requires_grad_(False)
        saved = SavedBytes(convolution.parameters())
        with ExitStack() as stack:
            if lean:
                stack.enter_context(frozen_convolutions(convolution))
            with saved.watching():
                out = convolution(pixels)
            kept.append(saved.total())
            gradients += torch.autograd.grad(out.square().sum(), pixels)
    assert kept == [pixels.nelement() * 4, 0]
    assert pipelines.same_bits(*gradients)


@pytest.mark.parametrize(
    ("capability", "dtype", "layout"),
    [
        ("AVX2", torch.bfloat16, torch.channels_last),
        ("AVX2", torch.float32, torch.contiguous_format),
        ("AVX512", torch.bfloat16, torch.contiguous_format),
    ],
)
def test_layout_of_16_bit_convolutions(monkeypatch, capability, dtype, layout):
    """Without AVX-512 oneDNN has them in channels_last alone; the numbers are the convolution's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    convolution = torch.nn.Conv2d(6, 8, 3, padding=1).to(dtype).requires_grad_(False)
    pixels = torch.randn(2, 6, 5, 5, dtype=dtype, requires_grad=True)
    exact = pixels.detach().double().requires_grad_()
    wanted = torch.nn.functional.conv2d(
        exact, convolution.weight.double(), convolution.bias.double(), padding=1
    )
    (gradient,) = torch.autograd.grad(wanted.square().sum(), exact)
    with frozen_convolutions(convolution):
        out = convolution(pixels)
        (ours,) = torch.autograd.grad(out.float().square().sum(), pixels)
    assert out.is_contiguous(memory_format=layout)
    unit = 4 * torch.finfo(dtype).eps
    assert (out.double() - wanted).norm() <= unit * wanted.norm()
    assert (ours.double() - gradient).norm() <= unit * gradient.norm()
