"""What the public scripts computed (golden/), through the package, within golden/README's tolerances."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esd_fast.config import EraseConfig
from esd_fast.objective import Objective
from esd_fast.plan import Rollout

from . import pipelines
from .pipelines import SHAPE, golden_run, relative, watched_run, worst_move

one_thread = pipelines.one_thread

FROZEN = (
    "sd-pndm-esd-x",
    "sd-pndm-strict-from",
    "sd-ddim-esd-u",
    "sd-ddim-selfattn",
    "sd-v-ddim-esd-x",
)


def config_of(preset: str, run: dict[str, Any], erase_from: str | None) -> EraseConfig:
    names = ("train_method", "negative_guidance", "guidance_scale", "num_inference_steps")
    given = {name: run[name] for name in (*names, "learning_rate")}
    return EraseConfig.from_preset(
        preset, run["concept"], erase_from=erase_from, iterations=4, **given
    )


def reproduce(
    pipe: Any,
    config: EraseConfig,
    rollouts: list[Rollout],
    run: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    ours = watched_run(pipe, config, rollouts)
    objective = Objective(config.target_anchor, config.negative_guidance)
    assert len(ours.steps) == len(run["losses"]) == 4
    for i, step in enumerate(ours.steps):
        # none of the golden schedulers scales its input, so what the UNet saw are the latents
        assert relative(step.samples.latents, tensors[f"latents.{i}"]) <= 1e-5
        assert relative(objective.target(step.samples), tensors[f"target.{i}"]) <= 1e-5
        if f"noise_pred_student.{i}" in tensors:
            student = tensors[f"noise_pred_student.{i}"]
            assert relative(step.noise_pred_student, student) <= 1e-5
        assert step.loss == pytest.approx(run["losses"][i], rel=1e-5)
    final = {n.removeprefix("final."): t for n, t in tensors.items() if n.startswith("final.")}
    assert worst_move(ours.start, ours.erasure.tensors, final) <= 1e-3
    assert worst_move(ours.start, {n: pipelines.weights(pipe)[n] for n in final}, final) <= 1e-3


@pytest.mark.parametrize("name", FROZEN)
def test_reference_reproduces_the_public_script(name: str) -> None:
    run, tensors = golden_run(name)
    pipe = pipelines.pipeline(run["model"])
    config = config_of("reference", run, run["erase_from"])
    pipe.scheduler.set_timesteps(run["num_inference_steps"])
    rollouts = [
        Rollout(
            noise=torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed)),
            steps=index,
            query=pipe.scheduler.timesteps[index].item(),
        )
        for seed, index in zip(run["seeds"], run["timestep_indices"], strict=True)
    ]
    reproduce(pipe, config, rollouts, run, tensors)


def test_paper_diffusers_reproduces_the_public_script() -> None:
    run, tensors = golden_run("alt-student-xattn")
    config = config_of("paper-diffusers", run, None)  # there, the concept as erase_from is none
    assert config.anchor == run["anchor"]
    rollouts = [
        Rollout(tensors[f"noise.{i}"], steps, query)
        for i, (steps, query) in enumerate(
            zip(run["rollout_steps"], run["timesteps_queried"], strict=True)
        )
    ]
    reproduce(pipelines.pipeline(run["model"]), config, rollouts, run, tensors)
