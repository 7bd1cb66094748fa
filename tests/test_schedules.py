"""The run's own scheduler: deterministic, fresh, and the DDIM lists of the published scripts."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from esd_fast.config import EraseConfig
from esd_fast.schedules import paper_ddim, scheduler_for

from . import pipelines
from .truth.reference_loops import compvis_timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FAST = EraseConfig(concept="cat", num_inference_steps=10)


def test_the_pipelines_own_is_left_alone() -> None:
    own = pipelines.pipeline("sd-pndm").scheduler
    own.set_timesteps(7)
    before = {**own.__dict__}
    config, timesteps = dict(own.config), own.timesteps.clone()
    ours = scheduler_for(own, FAST)
    ours.step(torch.zeros(1, 4, 8, 8), ours.timesteps[0], torch.zeros(1, 4, 8, 8))
    assert type(ours) is PNDMScheduler
    assert ours is not own
    assert dict(own.config) == config
    assert torch.equal(own.timesteps, timesteps)
    assert own.__dict__.keys() == before.keys()
    assert all(own.__dict__[k] is v for k, v in before.items())


def test_pndm_lists_one_more_and_one_twice() -> None:
    config = EraseConfig(concept="cat", num_inference_steps=20)
    timesteps = scheduler_for(pipelines.pipeline("sd-pndm").scheduler, config).timesteps
    assert len(timesteps) == 21
    assert len(timesteps.unique()) == 20


def test_float_timesteps_are_kept() -> None:
    own = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    config = EraseConfig(concept="cat", num_inference_steps=7)
    timesteps = scheduler_for(own, config).timesteps
    assert timesteps.is_floating_point()
    assert (timesteps != timesteps.round()).any()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_steps_that_draw_noise_are_refused(name: str, settings: dict[str, Any]) -> None:
    own = getattr(diffusers, name)(**BETAS, **settings)
    with pytest.raises(ValueError, match=f"{name}.*DDIMScheduler"):
        scheduler_for(own, FAST)
    paper = EraseConfig.from_preset("paper", "cat", num_inference_steps=10)
    assert type(scheduler_for(own, paper)) is DDIMScheduler  # it brings its own


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("name", ["sd-ddim", "sd-pndm", "sd-v-ddim"])
def test_the_papers_list(name: str, steps: int) -> None:
    own = pipelines.pipeline(name).scheduler
    config = EraseConfig.from_preset("paper", "cat", num_inference_steps=steps)
    ours = scheduler_for(own, config)
    assert ours.timesteps.tolist() == compvis_timesteps(steps)[::-1]
    assert torch.equal(ours.alphas_cumprod, own.alphas_cumprod)
    assert ours.config.prediction_type == own.config.prediction_type
    assert ours.final_alpha_cumprod == own.alphas_cumprod[0]
    assert not ours.config.clip_sample


def test_the_papers_list_on_a_model_with_other_betas() -> None:
    """The noise levels are the model's: Euler has them, and zero terminal SNR."""
    own = EulerDiscreteScheduler(
        **BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    ours = paper_ddim(dict(own.config))
    expected = DDIMScheduler.from_config(own.config)
    assert torch.equal(ours.alphas_cumprod, expected.alphas_cumprod)
    assert ours.config.prediction_type == "v_prediction"


def test_too_many_steps() -> None:
    own = DDIMScheduler(**BETAS, num_train_timesteps=100)
    config = EraseConfig(concept="cat", num_inference_steps=101)
    with pytest.raises(ValueError, match="num_inference_steps is 101; this scheduler has 100"):
        scheduler_for(own, config)


@pytest.mark.parametrize("preset", ["paper", "paper-diffusers"])
def test_published_lists_are_of_1000_timesteps(preset: str) -> None:
    own = DDIMScheduler(**BETAS, num_train_timesteps=500)
    config = EraseConfig.from_preset(preset, "cat", num_inference_steps=10)
    with pytest.raises(ValueError, match="1000 timesteps; this scheduler has 500"):
        scheduler_for(own, config)
