"""What each train method selects, and the float32 masters."""

import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_fast import parameters
from esd_fast.parameters import (
    ALIASES,
    LDM_RULES,
    METHODS,
    TrainableSubset,
    check_method,
    only_trainable,
    trainable_names,
)

from . import pipelines
from .truth.reference_loops import select_trainable

one_thread = pipelines.one_thread


@pytest.fixture(scope="module")
def sd15() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def sdxl() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def millions(unet: Any, names: list[str]) -> float:
    sizes = {n: p.numel() for n, p in unet.named_parameters()}
    return sum(sizes[n] for n in names) / 1e6


@pytest.mark.parametrize(
    ("method", "size", "tolerance", "tensors"),
    [
        ("esd-x", 43.96, 0.005, 80),
        ("esd-x-strict", 19.17, 0.005, 32),
        ("esd-u", 815.4, 0.05, None),
        ("esd-all", 859.3, 0.05, None),
        ("selfattn", 49.6, 0.05, None),
        ("ldm-xattn", 43.96, 0.005, 80),
        ("ldm-full", 859.5, 0.05, None),
        ("ldm-xlayer", None, None, 10),
        ("ldm-selflayer", None, None, 10),
    ],
)
def test_published_sizes(
    sd15: Any, method: str, size: float | None, tolerance: float, tensors: int | None
) -> None:
    names = trainable_names(sd15, method)
    if size is not None:
        assert millions(sd15, names) == pytest.approx(size, abs=tolerance)
    assert tensors in (None, len(names))


@pytest.mark.parametrize("method", [*METHODS, *ALIASES])
def test_the_same_names_as_the_truth(sd15: Any, method: str) -> None:
    assert trainable_names(sd15, method) == select_trainable(sd15, method)


@pytest.mark.parametrize("method", ["esd-x", "esd-x-strict", "esd-u", "esd-all", "selfattn"])
def test_sdxl_scripts_have_a_rule_more(sdxl: Any, method: str) -> None:
    assert trainable_names(sdxl, method, "sdxl") == select_trainable(sdxl, method)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in LDM_RULES])
def test_on_a_small_unet(method: str) -> None:
    unet = pipelines.pipeline().unet
    assert trainable_names(unet, method) == select_trainable(unet, method)


def test_regular_expression_over_module_names(sd15: Any) -> None:
    names = trainable_names(sd15, r"up_blocks\.[12]\..*attn2\.to_[kv]$")
    assert len(names) == 2 * 3 * 2  # two levels of three blocks, keys and values
    assert all(re.match(r"up_blocks\.[12]\..*attn2\.to_[kv]\.weight", n) for n in names)
    assert trainable_names(sd15, "attn2") == trainable_names(sd15, "esd-x")
    assert trainable_names(sd15, "mid_block|attn1") != trainable_names(sd15, "attn1")


def test_names_are_in_order_and_once(sd15: Any) -> None:
    order = [n for n, _ in sd15.named_parameters()]
    for method in METHODS:
        names = trainable_names(sd15, method)
        assert names == [n for n in order if n in set(names)]


@pytest.mark.parametrize("method", ["esd-z", "xatn", "ESD-X", "esd-attn2", "ldm-attn", "crossattn"])
def test_misspelt_method_names_what_there_is(method: str) -> None:
    with pytest.raises(ValueError, match=method) as error:
        check_method(method)
    assert all(known in str(error.value) for known in (*METHODS, *ALIASES))


@pytest.mark.parametrize("method", ["attn2.to_q", "mid_block", "up_blocks.*attn2", "^conv_in$"])
def test_expressions_are_not_taken_for_misspelt(method: str) -> None:
    check_method(method)
    assert trainable_names(pipelines.pipeline().unet, method)


def test_expression_that_selects_nothing(sd15: Any) -> None:
    with pytest.raises(ValueError, match=r"selects no parameter.*look like .*time_embedding"):
        trainable_names(sd15, r"down_blocks\.9\..*")


# ------------------------------------------------------------------------------------ the subset in training


def subset_of(dtype: torch.dtype) -> tuple[Any, TrainableSubset]:
    unet = pipelines.pipeline(dtype=dtype).unet
    return unet, TrainableSubset.of(unet, trainable_names(unet, "esd-x"))


def test_float32_parameters_are_their_own_masters() -> None:
    _, subset = subset_of(torch.float32)
    assert all(subset.masters[n] is p for n, p in subset.parameters.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_low_precision(dtype: torch.dtype) -> None:
    """Each step is below what the weights can show, a hundred of them are not."""
    unet, subset = subset_of(dtype)
    with torch.no_grad():
        for parameter in subset.parameters.values():
            parameter.fill_(1.0)
    subset = TrainableSubset.of(unet, list(subset.parameters))
    step = 1e-4
    assert torch.ones((), dtype=dtype) - step == 1  # lost without masters
    optimizer = torch.optim.Adam(subset.masters.values(), lr=step)
    for _ in range(100):
        for parameter in subset.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        subset.step(optimizer)
    for name, parameter in subset.parameters.items():
        master = subset.masters[name]
        torch.testing.assert_close(master, torch.full_like(parameter, 0.99, dtype=torch.float32))
        assert torch.equal(parameter, master.to(dtype))
        assert parameter.grad is None
        assert (parameter < 0.995).all()


def test_masters_see_gradients_at_their_own_size() -> None:
    _, subset = subset_of(torch.float16)
    before = {n: m.clone() for n, m in subset.masters.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # makes the scale
    for parameter in subset.parameters.values():
        parameter.grad = torch.full_like(parameter, 1024 * 2e-6)
    subset.step(torch.optim.SGD(subset.masters.values(), lr=1e3), scaler)
    for name, master in subset.masters.items():
        torch.testing.assert_close(
            before[name] - master, torch.full_like(master, 2e-3), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filtered", [False, True])
def test_moved_in_parts_is_moved_at_once(
    dtype: torch.dtype, filtered: bool, monkeypatch: Any
) -> None:
    """The same bits, and never more than a part of the gradients in float32."""
    most, ends = 4096, {}
    for part_bytes in (2**40, most):
        monkeypatch.setattr(parameters, "PART_BYTES", part_bytes)
        unet = pipelines.pipeline(dtype=dtype).unet
        names = trainable_names(unet, "esd-x")
        width = unet.config.cross_attention_dim
        generator = torch.Generator().manual_seed(0)
        keys = [n for n in names if n.endswith("to_k.weight")] if filtered else []
        filters = {n: torch.randn(width, width, generator=generator) for n in keys}
        subset = TrainableSubset.of(unet, names, filters)
        own = [m for n, m in subset.masters.items() if m is not subset.parameters[n]]
        optimizer = torch.optim.AdamW(subset.masters.values(), lr=1e-3, fused=True)
        at_once: list[int] = []
        optimizer.register_step_pre_hook(
            lambda *_, own=own, at_once=at_once: at_once.append(
                sum(m.grad.nbytes for m in own if m.grad is not None)
            )
        )
        for _ in range(3):
            for parameter in subset.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            subset.step(optimizer)
        assert max(at_once) <= part_bytes
        assert all(s["step"] == 3 for s in optimizer.state.values())
        ends[part_bytes] = {n: p.detach().clone() for n, p in subset.parameters.items()}
    assert len(at_once) > 3 or not own
    whole, parts = ends.values()
    assert all(torch.equal(parts[n], whole[n]) for n in whole)


def test_teacher_swaps_there_and_back() -> None:
    unet, subset = subset_of(torch.float32)
    before = pipelines.weights(unet)
    with torch.no_grad():
        for parameter in subset.parameters.values():
            parameter.add_(1)
    moved = pipelines.weights(unet)
    with subset.teacher():
        pipelines.assert_same_weights(unet, before)
    pipelines.assert_same_weights(unet, moved)
    with pytest.raises(KeyError), subset.teacher():
        raise KeyError
    pipelines.assert_same_weights(unet, moved)
    subset.restore()
    pipelines.assert_same_weights(unet, before)


def test_flags_modes_and_gradients_come_back() -> None:
    unet, subset = subset_of(torch.float32)
    unet.train()
    unet.mid_block.eval()
    unet.conv_in.requires_grad_(False)
    unet.conv_out.bias.grad = torch.ones(4)
    first = next(iter(subset.parameters.values()))
    first.grad = torch.full_like(first, 2)

    def state() -> list[Any]:
        flags = [p.requires_grad for p in unet.parameters()]
        modes = [m.training for m in unet.modules()]
        return [flags, modes, [None if p.grad is None else p.grad.sum() for p in unet.parameters()]]

    before = state()
    with only_trainable(unet, subset):
        asked = {n for n, p in unet.named_parameters() if p.requires_grad}
        assert asked == set(subset.parameters)
        assert not any(m.training for m in unet.modules())
        assert all(p.grad is None for p in unet.parameters())  # a stale one would be added to
        first.grad = torch.ones_like(first)
    assert state() == before
