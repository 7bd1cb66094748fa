"""The scheduler that a run rolls out with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EraseConfig

# Steps that draw noise: a state would no longer be a function of its start.
STOCHASTIC = ("Ancestral", "SDE", "DDPM", "LCM", "TCD")


def scheduler_for(own: Any, config: EraseConfig) -> Any:
    """A scheduler of the run's own, its timesteps set; the pipeline's is never touched.

    Raises ValueError for a scheduler whose steps draw noise, or with fewer training timesteps
    than `num_inference_steps`.
    """
    name, settings = type(own).__name__, dict(own.config)
    stochastic = any(word in name for word in STOCHASTIC) or "sde" in str(
        settings.get("algorithm_type", "")
    )
    if config.schedule == "model" and stochastic:
        raise ValueError(
            f"the model's scheduler is {name}, whose steps draw noise; "
            "give the pipeline a deterministic one such as DDIMScheduler"
        )
    trained = int(settings.get("num_train_timesteps", 1000))
    if config.num_inference_steps > trained:
        raise ValueError(
            f"num_inference_steps is {config.num_inference_steps}; "
            f"this scheduler has {trained} timesteps"
        )
    if config.schedule != "model" and trained != 1000:
        raise ValueError(
            f"schedule is {config.schedule!r}, a list of 1000 timesteps; "
            f"this scheduler has {trained}; schedule 'model' would do"
        )
    scheduler = copy.deepcopy(own) if config.schedule == "model" else paper_ddim(settings)
    scheduler.set_timesteps(config.num_inference_steps)
    return scheduler


def paper_ddim(settings: dict[str, Any]) -> Any:
    """DDIM with eta 0 as both published scripts run it, on the model's own noise levels."""
    from diffusers import DDIMScheduler

    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    names = ("num_train_timesteps", "prediction_type", *betas)
    kept = {k: settings[k] for k in names if settings.get(k) is not None}
    return DDIMScheduler(
        **kept,
        clip_sample=False,
        set_alpha_to_one=False,  # the step before the first has the first noise level
        steps_offset=1,
        timestep_spacing="leading",
    )
