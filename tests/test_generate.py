"""Pictures are diffusers' own, each from its own noise whatever the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from esd_fast.generate import Shot, pictures, start_noise

from . import pipelines

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SHOTS = [Shot("a cat", 3), Shot("a dog", 3), Shot("a cat", 4), Shot("a red apple", 3, 2)]


def with_scheduler(kind: Any) -> Any:
    pipe = pipelines.pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, shots: list[Shot], batch_size: int) -> np.ndarray:
    stream = pictures(pipe, shots, num_inference_steps=4, guidance_scale=7.5, batch_size=batch_size)
    return np.stack(list(stream)).astype(int)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_a_batch_draws_what_each_alone_would(scheduler: Any) -> None:
    pipe = with_scheduler(scheduler)
    alone = np.concatenate([drawn(pipe, [shot], 1) for shot in SHOTS])
    for batch_size in (2, 3, 4):
        assert np.abs(drawn(pipe, SHOTS, batch_size) - alone).max() <= 1  # uint8 rounding
    pairs = [np.abs(a - b).max() for i, a in enumerate(alone) for b in alone[:i]]
    assert min(pairs) > 1


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_one_picture_is_diffusers_own(scheduler: Any) -> None:
    pipe = with_scheduler(scheduler)
    theirs = pipe(
        "a cat",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=7.5,
        output_type="np",
    ).images
    ours = drawn(pipe, SHOTS[:1], 1)
    assert np.abs(ours - (theirs * 255).round().astype(int)).max() <= 1


def test_samples_are_those_of_the_public_scripts() -> None:
    """These seed once and draw all samples of a prompt in one call."""
    pipe = with_scheduler(DDIMScheduler)
    theirs = pipe(
        ["a cat"] * 3,
        generator=torch.Generator().manual_seed(9),
        num_inference_steps=4,
        guidance_scale=7.5,
        output_type="np",
    ).images
    ours = drawn(pipe, [Shot("a cat", 9, sample) for sample in range(3)], 1)
    assert np.abs(ours - (theirs * 255).round().astype(int)).max() <= 1


def test_noise_is_the_seeds_whatever_torchs_defaults() -> None:
    pipe = pipelines.pipeline()
    expected, _ = start_noise(pipe, SHOTS, None)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        again, _ = start_noise(pipe, SHOTS, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(expected, again)
    assert again.dtype == torch.float32


def test_what_is_not_finite_is_no_black_picture() -> None:
    pipe = with_scheduler(DDIMScheduler)
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"'a cat' \(seed 3\) is not finite in float32"):
        drawn(pipe, SHOTS[:1], 1)
