"""accelerate(unet): the same numbers, the same names, and all of it undone."""

import copy
import importlib.util

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from esd_fast import accelerate as fast
from esd_fast import ops
from esd_fast.accelerate import accelerate, restore

from .pipelines import one_thread, relative, same_bits  # noqa: F401 -- the fixture is automatic

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
FAMILIES = {
    "sd1": {**SMALL, **CROSS, "attention_head_dim": 2},
    "sd2": {**SMALL, **CROSS, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        **SMALL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
}


def unet_of(family, dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**FAMILIES[family]).to(dtype)
    with torch.no_grad():  # new norms are 1 and 0, which hides mistakes
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def results(unet):
    """The output and the gradient of every parameter, by name."""
    g = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    upstream, pooled = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 10, generator=g)
    added = {"text_embeds": pooled.to(dtype), "time_ids": torch.arange(12.0).view(2, 6).to(dtype)}
    output = unet(
        latents.to(dtype),
        torch.tensor([3, 700]),
        text.to(dtype),
        added_cond_kwargs=added if unet.config.addition_embed_type else None,
    ).sample
    names, parameters = zip(*unet.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, parameters, upstream.to(dtype))
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def assert_close(ours, plains, exact):
    """At most twice the plain UNet's error in the same dtype, and a few roundings. `plains`: in either
    memory layout, since convolutions sum in another order in each."""
    for name, truth in exact.items():
        worst = max(relative(plain[name], truth) for plain in plains)
        allowed = 2 * worst + 4 * torch.finfo(ours[name].dtype).eps
        if truth.norm() < 1e-9 * max(x.norm() for x in exact.values()):
            continue  # a gradient that is 0 but for rounding (a key's bias has none here)
        assert relative(ours[name], truth) <= allowed, name


@pytest.mark.parametrize("through", ["torch", "operators"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_output_and_gradients(family, dtype, checkpointing, through, monkeypatch):
    # torch's own functions run the fused modules, or the operators do
    monkeypatch.setattr(ops, "_torch_runs", lambda *_, **__: through == "torch")
    unet = unet_of(family, dtype)
    exact, plain = results(copy.deepcopy(unet).double()), results(unet)
    moved = results(copy.deepcopy(unet).to(memory_format=torch.channels_last))
    names = list(unet.state_dict())
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with accelerate(unet, always=True) as done:
        assert list(unet.state_dict()) == names
        assert done.changed["group_norm_silu"].startswith(f"{places(unet)} places: ")
        assert done.changed["geglu"]
        assert done.changed["channels_last"]
        assert_close(results(unet), (plain, moved), exact)
    unet.disable_gradient_checkpointing()
    assert all(same_bits(x, plain[name]) for name, x in results(unet).items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_keep_their_layout_on_the_cpu(family, layout, monkeypatch):
    """One contiguous picture made channels_last would be followed by all after it, at a price."""
    monkeypatch.setattr(ops, "_torch_runs", lambda *_, **__: False)
    path_of = ops.path_of
    native = lambda op, device: ops.OpPath(op, "native", {}, path_of(op, device).run)
    monkeypatch.setattr(ops, "path_of", native)
    unet = unet_of(family).to(memory_format=layout)
    seen = []
    with accelerate(unet):
        for module in unet.modules():
            if isinstance(module, (fast.Resnet, fast.Transformer)):
                module.register_forward_hook(lambda _, __, output: seen.append(output))
        results(unet)
    pictures = [x if isinstance(x, torch.Tensor) else x[0] for x in seen]
    assert pictures
    assert all(x.is_contiguous(memory_format=layout) for x in pictures)


def places(unet):
    """Resnets, transformers and the last norm."""
    kinds = [type(m).__name__ for m in unet.modules()]
    return kinds.count("Resnet") + kinds.count("Transformer") + 1


def test_every_norm_and_geglu_is_changed(family):
    unet = unet_of(family)
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm)]
    accelerate(unet, always=True)
    assert {type(m) for m in norms} == {fast.Norm, fast.NormSiLU}
    kinds = {type(m).__name__ for m in unet.modules()}
    assert not kinds & {"GEGLU", "ResnetBlock2D", "Transformer2DModel"}
    assert {"Activation", "Resnet", "Transformer"} <= kinds


def test_undone_to_the_bit_with_layouts(family):
    unet = unet_of(family)
    before = results(unet)
    classes = [type(m) for m in unet.modules()]
    strides = [p.stride() for p in unet.parameters()]
    same = list(unet.parameters())
    done = accelerate(unet, always=True)
    assert [p.stride() for p in unet.parameters()] != strides
    done.undo()
    done.undo()
    assert [type(m) for m in unet.modules()] == classes
    assert [p.stride() for p in unet.parameters()] == strides
    assert all(a is b for a, b in zip(unet.parameters(), same, strict=True))
    assert all(same_bits(x, before[name]) for name, x in results(unet).items())


def test_undo_keeps_what_was_trained():
    unet = unet_of("sd1")
    with accelerate(unet, always=True), torch.no_grad():
        unet.conv_in.weight.fill_(3.0)
    assert (unet.conv_in.weight == 3).all()


def test_deep_copies(family):
    unet = unet_of(family)
    plain = results(unet)
    with accelerate(unet, always=True):
        ours = results(unet)
        copied = copy.deepcopy(unet)
    assert all(same_bits(x, ours[name]) for name, x in results(copied).items())
    restore(copied)
    assert {type(m) for m in copied.modules()} == {type(m) for m in unet.modules()}
    assert all(relative(x, plain[name]) < 1e-4 for name, x in results(copied).items() if x.any())


# --- what is left alone, and why ----------------------------------------------------------------------


def test_nothing_is_changed_where_torch_runs_it():
    if ops.path_of("group_norm_silu").name != "torch":
        pytest.skip("something else runs it")
    unet = unet_of("sd1")
    classes = [type(m) for m in unet.modules()]
    done = accelerate(unet)
    assert [type(m) for m in unet.modules()] == classes
    assert done.changed == {}
    assert done.skipped["group_norm_silu"] == str(ops.path_of("group_norm_silu"))
    assert done.skipped["channels_last"] == "torch's GroupNorm does not keep it"
    assert done.paths_taken()["xformers"] == "as it was (not on cpu)"


def test_an_available_fast_path_is_never_skipped(monkeypatch, family):
    choose = ops.path_of

    def path_of(op, device):  # as on a card with Triton
        path = choose(op, device)
        return ops.OpPath(op, "triton", {}, path.run)

    monkeypatch.setattr(ops, "path_of", path_of)
    monkeypatch.setattr(fast, "_why_no_xformers", lambda *_: "")
    unet = unet_of(family)
    done = accelerate(unet)
    assert done.changed["group_norm_silu"] == f"{places(unet)} places: triton"
    assert done.changed["geglu"].endswith("places: triton")
    assert done.changed["attention"] == "xformers"
    assert {type(p) for p in unet.attn_processors.values()} == {XFormersAttnProcessor}
    assert done.skipped == {"channels_last": "not on cpu"}
    done.undo()
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def odd_norm(resnet):
    resnet.norm1.__class__ = type("Other", (nn.GroupNorm,), {})


def hook(resnet):
    resnet.norm2.register_forward_hook(lambda *_: None)


def own_forward(resnet):
    resnet.forward = resnet.forward


def other_activation(resnet):
    resnet.nonlinearity = nn.Mish()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (odd_norm, "Other where GroupNorm was expected"),
        (hook, "GroupNorm with hooks"),
        (own_forward, "ResnetBlock2D with a forward of its own"),
        (other_activation, "Mish where SiLU was expected"),
        (lambda r: setattr(r, "time_embedding_norm", "scale_shift"), "time_embedding_norm"),
        (lambda r: setattr(r, "upsample", nn.Identity()), "resamples inside"),
    ],
)
def test_what_is_not_exactly_known_stays(change, why):
    unet = unet_of("sd1")
    resnet = unet.mid_block.resnets[0]
    change(resnet)
    kinds = [type(m) for m in resnet.modules()]
    done = accelerate(unet, always=True)
    assert [type(m) for m in resnet.modules()] == kinds
    assert done.skipped["group_norm_silu"].startswith(f"1: {why}")
    assert "; the rest as it was (1: " in done.paths_taken()["group_norm_silu"]
    assert sum(type(m) is ResnetBlock2D for m in unet.modules()) == 1


def test_twice_is_refused_and_an_error_undoes_everything(monkeypatch):
    unet = unet_of("sd1")
    classes = [type(m) for m in unet.modules()]
    with accelerate(unet, always=True), pytest.raises(ValueError, match="accelerated already"):
        accelerate(unet, always=True)
    monkeypatch.setattr(fast, "_attention", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(unet, always=True)
    assert [type(m) for m in unet.modules()] == classes


# --- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "left", "says"),
    [
        (AttnProcessor, AttnProcessor2_0, "SDPA"),
        (AttnProcessor2_0, AttnProcessor2_0, "as it was (SDPA already)"),
        (
            lambda: SlicedAttnProcessor(1),
            SlicedAttnProcessor,
            "as it was (SlicedAttnProcessor was chosen)",
        ),
    ],
)
def test_which_attention(processor, left, says):
    unet = unet_of("sd1")
    unet.set_attn_processor(processor())
    before = unet.attn_processors
    done = accelerate(unet)
    assert done.paths_taken()["attention"] == says
    assert {type(p) for p in unet.attn_processors.values()} == {left}
    done.undo()
    assert unet.attn_processors == before


@pytest.mark.parametrize("cross", [None, 12])
@pytest.mark.parametrize("how", ["plain", "masked", "another processor"])
def test_attention_is_diffusers_bit_for_bit(cross, how, monkeypatch):
    attention = Attention(8, cross, heads=2, dim_head=4, processor=AttnProcessor2_0())
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 8, generator=g, requires_grad=True)
    states = torch.randn(2, 3, 12, generator=g) if cross else None
    mask = torch.randn(2, 1, 3 if cross else 5, generator=g) if how == "masked" else None
    if how == "another processor":
        attention.set_processor(AttnProcessor())

    def asked():
        y = attention(tokens, states, attention_mask=mask)
        wanted = (tokens, *attention.parameters())
        return y, *torch.autograd.grad(y, wanted, torch.ones_like(y))

    plain = asked()
    attention.__class__ = fast.DirectAttention
    if how == "plain":  # diffusers' own forward is not asked
        monkeypatch.setattr(Attention, "forward", lambda *_, **__: pytest.fail("diffusers'"))
    assert all(same_bits(x, y) for x, y in zip(asked(), plain, strict=True))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"norm_num_groups": 2}, "Attention with group_norm"),
        ({"cross_attention_norm": "layer_norm", "cross_attention_dim": 6}, "with norm_cross"),
        ({"qk_norm": "layer_norm"}, "with norm_q"),
        ({"residual_connection": True}, "adds or scales"),
        ({"rescale_output_factor": 2.0}, "adds or scales"),
    ],
)
def test_attention_of_another_kind_is_left(settings, why):
    assert why in fast._why_not_attention(Attention(8, heads=2, dim_head=4, **settings))
    assert fast._why_not_attention(Attention(8, heads=2, dim_head=4)) == ""


def test_direct_attention_is_told_where_it_is_taken():
    unet = unet_of("sd1")
    with accelerate(unet) as done:
        assert done.changed["attention_calls"].endswith("places: direct")
    unet.set_attn_processor(SlicedAttnProcessor(2))
    with accelerate(unet) as done:
        assert "attention_calls" not in done.paths_taken()
        assert "SlicedAttnProcessor was chosen" in done.paths_taken()["attention"]


def test_attention_shapes():
    shapes = set(fast.attention_shapes(unet_of("sd1"), (9, 6), batch=2))
    # 16 channels, 2 a head (diffusers reads attention_head_dim as the number of heads)
    assert shapes == {(4, 54, 54, 8), (4, 54, 77, 8), (4, 15, 15, 16), (4, 15, 77, 16)}


def wrong_gradient(query, key, value):
    return fast._sdpa(query, key, value.detach()) + 0 * value.sum()


def no_backward(query, key, value):
    return F.scaled_dot_product_attention(query.detach(), key, value).detach()


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (F.scaled_dot_product_attention, ""),
        (wrong_gradient, "gave wrong results when tried on (2, 6, 5, 4)"),
        (no_backward, "failed when tried on (2, 6, 5, 4): RuntimeError"),
        (lambda *_: 1 / 0, "failed when tried on (2, 6, 5, 4): ZeroDivisionError"),
    ],
)
def test_attention_is_tried_forward_and_backward(attention, why):
    with torch.no_grad():  # whatever the caller's mode is
        said = fast.why_wrong(attention, (2, 6, 5, 4), torch.device("cpu"), torch.float32)
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_why_no_xformers():
    shapes = ((2, 6, 5, 4),)
    assert fast._why_no_xformers(torch.device("cpu"), torch.float32, shapes) == "not on cpu"
    if importlib.util.find_spec("xformers") is None:
        said = fast._why_no_xformers(torch.device("cuda", 0), torch.float32, shapes)
        assert said == "not installed"
