"""A number that is none stops a run, and the layer that went first is named."""

import math
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast.fit import NonFiniteLoss

from . import pipelines
from .pipelines import SHORT, assert_same_weights

one_thread = pipelines.one_thread
# esd-u trains all around it; the mid block has its attention between two resnets
RESNET = "mid_block.resnets.0.conv2"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def stopped(pipe: Any, **settings: Any) -> str:
    before = pipelines.weights(pipe)
    with pytest.raises(NonFiniteLoss) as sick:
        esd_fast.erase(pipe, "cat", **SHORT | settings)
    assert_same_weights(pipe, before)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    text = str(sick.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_gradient_that_is_no_number_is_named_by_its_layer(preset: str) -> None:
    """The loss of the step after shows it."""
    pipe = pipelines.pipeline()
    calls = iter(range(100))
    pipe.unet.get_parameter(f"{LAYER}.weight").register_hook(
        lambda gradient: gradient * (math.nan if next(calls) == 1 else 1.0)
    )
    seen: list[list[int]] = []
    text = stopped(pipe, preset=preset, on_step=lambda s: seen.append(s.samples.timesteps.tolist()))
    assert text.startswith("the loss is nan at iteration 2, timestep ")
    said = f"{LAYER}.weight went first, whose gradient was not finite at iteration 1, timestep"
    assert f"{said} {seen[1]}" in text


def test_of_several_layers_the_first_of_the_backward_is_named() -> None:
    """All that comes before it in the forward learns its NaN, in whatever order they are listed."""
    pipe = pipelines.pipeline()
    hook = pipe.unet.get_submodule(RESNET).register_full_backward_hook(
        lambda _, given, __: tuple(None if g is None else g * math.nan for g in given)
    )
    pipe.unet.get_parameter(f"{RESNET}.weight").register_hook(lambda g: g * math.nan)
    text = stopped(pipe, train_method="esd-u", iterations=1)
    hook.remove()
    assert f"{RESNET}.weight went first" in text
    count, of = (int(word) for word in text.split(" trained")[0].split(" of "))
    assert 10 < count < of - 10


def test_a_gradient_of_the_last_step_too() -> None:
    pipe = pipelines.pipeline()
    pipe.unet.get_parameter(f"{LAYER}.weight").register_hook(lambda gradient: gradient * math.inf)
    seen: list[list[int]] = []
    text = stopped(pipe, iterations=1, on_step=lambda s: seen.append(s.samples.timesteps.tolist()))
    assert f"after iteration 0, timestep {seen[0]}: {LAYER}.weight went first" in text


def test_a_prediction_that_is_no_number_is_named_by_its_layer() -> None:
    """An adapter, say, that overflows for the student alone."""
    pipe = pipelines.pipeline()
    layer = pipe.unet.get_submodule("up_blocks.0.resnets.0.conv1")
    plain, calls = layer.forward, iter(range(100))

    def overflowing(*given: Any) -> Any:
        return plain(*given) * (math.inf if next(calls) > 6 else 1.0)

    layer.forward = overflowing
    text = stopped(pipe)
    assert "up_blocks.0.resnets.0.conv1 went first" in text


def test_a_frozen_unet_that_says_none_is_told_apart() -> None:
    layer = "down_blocks.1.resnets.0.conv2"
    for preset, said in (
        ("fast", "collecting: the noise_pred_null of the frozen UNet is not finite at timestep ["),
        ("paper", "the loss is nan at iteration 0, timestep"),
    ):
        pipe = pipelines.pipeline()
        with torch.no_grad():
            pipe.unet.get_parameter(f"{layer}.bias")[0] = math.nan
        text = stopped(pipe, preset=preset, num_inference_steps=4)
        assert text.startswith(said)
        assert f"of its layers {layer}" in text
