"""Collecting by a scheduler's table and by its own steps: the same samples."""

from typing import Any

import pytest
import torch

import esd_fast
from esd_fast.collect import Teacher, TeacherSamples, collect_all, collect_last
from esd_fast.config import EraseConfig
from esd_fast.esd import encode_prompts
from esd_fast.models import load_model
from esd_fast.plan import Rollout
from esd_fast.schedules import scheduler_for

from . import pipelines
from .pipelines import SHAPE, SHORT, relative

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__:DeprecationWarning"
)  # diffusers' schedulers
CONFIG = EraseConfig(concept="cat", erase_from="a fish", num_inference_steps=6)


def teacher(name: str, by: str, dtype: torch.dtype = torch.float32, scheduler: str = "") -> Teacher:
    import diffusers

    pipe = pipelines.pipeline(name, dtype)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    model = load_model(pipe, CONFIG)
    prompts = encode_prompts(model, CONFIG, 64)
    made = Teacher(
        unet=model.unet,
        scheduler=scheduler_for(pipe.scheduler, CONFIG),
        prompts=prompts,
        rolled="concept",
        asked=tuple(prompts.by_name),
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=3.0,
    )
    if by == "scheduler":
        made.tables.update({0: "so the test wants it", 1: "so the test wants it"})
    return made


def rollout(**settings: Any) -> Rollout:
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Rollout(noise, **{"steps": 1000} | settings)


def assert_same(ours: TeacherSamples, own: TeacherSamples, tolerance: float) -> None:
    assert ours.timesteps.tolist() == own.timesteps.tolist()
    for name in ("latents", "noise_pred_null", "noise_pred_concept", "noise_pred_erase_from"):
        a, b = getattr(ours, name), getattr(own, name)
        assert a.dtype == b.dtype
        assert relative(a, b) <= tolerance, name


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd-ddim", ""),
        ("sd-pndm", ""),
        ("sd-v-ddim", ""),
        ("sd-ddim", "EulerDiscreteScheduler"),
        ("sd-v-ddim", "DPMSolverMultistepScheduler"),
    ],
)
def test_every_state(name: str, scheduler: str) -> None:
    passes: list[int] = []
    ours, own = (
        collect_all(teacher(name, by, scheduler=scheduler), rollout(), passes.append)
        for by in ("table", "scheduler")
    )
    calls = len(own) // 2
    assert passes == [2 * 3] * calls * 2
    assert_same(ours, own, 1e-5)


def test_every_state_of_a_half_precision_unet() -> None:
    """The state stays float32: only what the UNet gets is rounded, and now and then the other way."""
    ours, own = (
        collect_all(teacher("sd-ddim", by, torch.bfloat16), rollout(), lambda _: None)
        for by in ("table", "scheduler")
    )
    assert ours.latents.dtype == ours.noise_pred_concept.dtype == torch.bfloat16
    assert_same(ours, own, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("scheduler", ["", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 4}, {"steps": 3, "start": 1}])
def test_the_last_state(settings: dict[str, int], scheduler: str) -> None:
    found = []
    for by in ("table", "scheduler"):
        asked = teacher("sd-ddim", by, scheduler=scheduler)
        query = asked.scheduler.timesteps[settings["steps"]].item()  # one that Euler knows
        found.append(collect_last(asked, rollout(query=query, **settings), lambda _: None))
    assert_same(*found, 1e-5)


def test_the_manifest_says_how_it_stepped() -> None:
    erasure = esd_fast.erase(pipelines.pipeline("sd-pndm"), "cat", preset="fast", **SHORT)
    assert erasure.manifest["paths_taken"]["scheduler"] == "table"
    pipe = pipelines.pipeline()
    pipe.scheduler.register_to_config(clip_sample=True)
    erasure = esd_fast.erase(pipe, "cat", preset="fast", **SHORT)
    assert erasure.manifest["paths_taken"]["scheduler"] == (
        "diffusers' own step (a replay differs at call 1 of 4: not linear, or random)"
    )
