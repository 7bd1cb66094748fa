"""A live pipeline, whatever it has switched on, is left erased and otherwise as it was."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import esd_fast
from esd_fast.erasure import Erasure

from . import pipelines
from .pipelines import SHORT, assert_same_weights, pipeline, same_bits, weights

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Already found a `peft_config`",
)


def erase(pipe: Any, concept: str = "red apple", **settings: Any) -> Erasure:
    return esd_fast.erase(pipe, concept, preset="fast", **SHORT | settings)


def moved(pipe: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, t in weights(pipe).items() if not same_bits(t, before[n])}


def add_lora(pipe: Any, size: float = 0.1) -> None:
    pytest.importorskip("peft")
    g = torch.Generator().manual_seed(0)
    lora = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn1.to_v", "resnets.0.conv1")):
            out, into, *kernel = module.weight.shape
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(2, into, *kernel, generator=g) * size
            ones = [1] * len(kernel)
            lora[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2, *ones, generator=g) * size
    pipe.load_lora_weights(lora)


@pytest.mark.parametrize("method", ["esd-x", "esd-all", "ldm-full"])
def test_a_lora_survives(method: str) -> None:
    """The model's own weights are trained, with the LoRA in force; the LoRA itself is not."""
    pipe = pipeline()
    plain_names = set(dict(pipe.unet.named_parameters()))
    add_lora(pipe)
    before = weights(pipe)
    erasure = erase(pipe, train_method=method)
    assert erasure.tensors.keys() <= plain_names
    assert erasure.tensors.keys() == erase(pipeline(), train_method=method).tensors.keys()
    changed = moved(pipe, before)
    assert {n.replace(".base_layer", "") for n in changed} == erasure.tensors.keys()
    assert not [n for n in changed if "lora_" in n]
    assert list(pipe.get_active_adapters()) == ["default_0"]
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_the_lora_is_in_force_while_training() -> None:
    with_lora, fused = pipeline(), pipeline()
    add_lora(with_lora, 0.5)
    add_lora(fused, 0.5)
    fused.fuse_lora()
    fused.unload_lora_weights()
    losses = [erase(p).manifest["losses"] for p in (with_lora, fused, pipeline())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_a_lora_loaded_or_gone_after_the_erasure() -> None:
    pipe = pipeline()
    before = weights(pipe)
    erasure = erase(pipe)
    erased = weights(pipe)
    add_lora(pipe)
    erasure.revert(pipe)
    erasure.apply(pipe, strength=0.5)
    erasure.apply(pipe)
    pipe.unload_lora_weights()
    assert_same_weights(pipe, erased)
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_textual_inversion_survives() -> None:
    """An embedding of two vectors is a concept like any other, and stays."""
    pipe, plain = pipeline(), pipeline()
    embedding = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<toy>": embedding})
    tokens = dict(pipe.tokenizer.get_vocab())
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    erasure = erase(pipe, "a <toy>", keep_vocabulary=1.0)
    assert pipe.tokenizer.get_vocab() == tokens
    assert {"<toy>", "<toy>_1"} <= tokens.keys()
    assert pipe.text_encoder.get_input_embeddings().weight.equal(table)
    assert table[-2:].equal(embedding)
    other = erase(plain, "a toy", keep_vocabulary=1.0)
    assert any(not t.equal(other.tensors[n]) for n, t in erasure.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings_of_the_pipeline_stay(dtype: torch.dtype) -> None:
    pipe = pipeline(dtype=dtype)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.unet.conv_in.requires_grad_(False)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    processors = dict(pipe.unet.attn_processors)
    before = weights(pipe)
    layout = {n: p.stride() for n, p in pipe.unet.named_parameters()}
    flags = {n: p.requires_grad for n, p in pipe.unet.named_parameters()}
    kinds = {n: type(m) for n, m in pipe.unet.named_modules()}
    places = {n: p.data_ptr() for n, p in pipe.unet.named_parameters()}
    random = torch.get_rng_state()
    erasure = erase(pipe, train_method="esd-all")
    assert calls
    assert torch.get_rng_state().equal(random)
    assert pipe.vae.use_tiling
    assert pipe.vae.use_slicing
    assert pipe.unet.attn_processors == processors
    assert pipe.unet.up_blocks[0].s1 == 0.9
    assert pipe.unet.dtype == dtype
    for revert in (False, True):
        if revert:
            erasure.revert(pipe)
        assert {n: p.stride() for n, p in pipe.unet.named_parameters()} == layout
        assert {n: p.requires_grad for n, p in pipe.unet.named_parameters()} == flags
        assert {n: type(m) for n, m in pipe.unet.named_modules()} == kinds
        assert {n: p.data_ptr() for n, p in pipe.unet.named_parameters()} == places
        assert all(p.grad is None for p in pipe.unet.parameters())
    assert_same_weights(pipe, before)


def test_attention_slicing_stays() -> None:
    pipe = pipeline()
    pipe.enable_attention_slicing(1)
    processors = dict(pipe.unet.attn_processors)
    erase(pipe)
    assert pipe.unet.attn_processors == processors


def test_compiled_unet() -> None:
    """torch.compile wraps the UNet; its weights are erased, and the wrapper stays."""
    pipe, plain = pipeline(), pipeline()
    compiled = torch.compile(pipe.unet, backend="eager")
    pipe.unet = compiled
    before = weights(plain)
    erasure = erase(pipe)
    assert pipe.unet is compiled
    expected = erase(plain)
    assert all(same_bits(t, expected.tensors[n]) for n, t in erasure.tensors.items())
    assert erasure.tensors.keys() == expected.tensors.keys()
    erasure.revert(pipe)
    assert_same_weights(compiled._orig_mod, before)


def test_model_offload_stays() -> None:
    """enable_model_cpu_offload: hooks are taken off for the run and put on again."""
    pipe = pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    before = weights(pipe)
    erasure = erase(pipe)
    assert len(pipe._all_hooks) == 3
    assert pipe.unet._hf_hook is pipe._all_hooks[1].hook
    assert pipe.unet._hf_hook.prev_module_hook is pipe._all_hooks[0]
    expected = erase(pipeline())
    assert all(same_bits(t, expected.tensors[n]) for n, t in erasure.tensors.items())
    pipe("red apple", num_inference_steps=1, height=64, width=64, output_type="np")
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_model_offload_stays_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    pipe.enable_model_cpu_offload(device="cpu")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("esd_fast.esd.collect_all", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        erase(pipe)
    assert hasattr(pipe.unet, "_hf_hook")


def sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def fused(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


def casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def group(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def quantized(pipe: Any) -> None:
    layer = pipe.unet.mid_block.attentions[0].proj_in
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def ip_adapter(pipe: Any) -> None:
    pipe.unet.encoder_hid_proj = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (sequential, "enable_sequential_cpu_offload.*remove_all_hooks"),
        (fused, "unfuse_qkv_projections"),
        (casting, "layerwise_casting"),
        (group, "group_offloading"),
        (quantized, "int8 weights"),
        (ip_adapter, "unload_ip_adapter"),
    ],
)
def test_what_is_refused(change: Any, said: str) -> None:
    pipe = pipeline()
    change(pipe)
    with pytest.raises(ValueError, match=said):
        erase(pipe)


def test_apply_is_refused_where_weights_are_elsewhere() -> None:
    erasure = erase(pipeline())
    pipe = pipeline()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="remove_all_hooks"):
        erasure.apply(pipe)
    pipe.remove_all_hooks()
    erasure.apply(pipe)
    now = dict(pipe.unet.named_parameters())
    assert all(same_bits(now[n].detach(), t) for n, t in erasure.tensors.items())


def test_whole_export_with_a_lora_is_refused(tmp_path: Any) -> None:
    pipe = pipeline()
    erasure = erase(pipe)
    add_lora(pipe)
    for format, name in (("single-file", "o.safetensors"), ("diffusers", "o")):
        with pytest.raises(ValueError, match="fuse_lora"):
            erasure.export(tmp_path / name, format, model=pipe)
    erasure.export(tmp_path / "l.safetensors", "lora", model=pipe)
