"""Schedulers as tables: diffusers' own steps, called plainly, are the truth."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from esd_fast import ops
from esd_fast.scheduler_table import SchedulerTable, probe

from . import pipelines
from .pipelines import relative

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
one_thread = pipelines.one_thread

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", KARRAS),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", KARRAS),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun karras": ("HeunDiscreteScheduler", KARRAS),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddim zero snr": (
        "DDIMScheduler",
        {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
}
GUIDANCE = 3.0


def scheduler(name: str, prediction: str = "epsilon", **more: Any) -> Any:
    kind, settings = SCHEDULERS.get(name, (name, {}))
    if kind == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    made = getattr(diffusers, kind)
    return made(**BETAS, prediction_type=prediction, **settings | more)


def unet(x: Tensor, timestep: Tensor) -> Tensor:
    """Null and concept (2, B, C, h, w) for a scaled state: mostly its noise, as a real one says."""
    phase = float(timestep) / 1000
    return torch.stack([0.9 * x + 0.1 * torch.sin(3 * x + phase), 0.9 * x + 0.1 * torch.cos(2 * x)])


def own(scheduler: Any, steps: int, noise: Tensor, start: int = 0) -> list[Tensor]:
    """Each scaled state, by the scheduler; the last one unscaled."""
    scheduler.set_timesteps(steps)
    state, seen = noise * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps[start:]:
        seen.append(scheduler.scale_model_input(state, timestep))
        null, concept = unet(seen[-1], timestep)
        guided = null + GUIDANCE * (concept - null)
        state = scheduler.step(guided, timestep, state, return_dict=False)[0]
    return [*seen, state]


def by_table(table: SchedulerTable, noise: Tensor) -> list[Tensor]:
    calls = len(table.timesteps)
    history = torch.zeros(calls + 1, *noise.shape)
    history[0] = noise * table.init_noise_sigma
    inputs = (history[0] * table.input_scales[0]).repeat(2, 1, 1, 1, 1)
    seen = [inputs[0].clone()]
    for call, timestep in enumerate(table.timesteps):
        ops.guided_step(
            unet(inputs[0], timestep),
            torch.tensor(call),
            table.coefficients,
            table.input_scales,
            1,
            GUIDANCE,
            history,
            inputs,
        )
        seen.append(inputs[1].clone())
    return seen


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def worst(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(relative(x, y) for x, y in zip(ours, truth, strict=True))


@pytest.mark.parametrize("steps", [3, 9, 20, 27, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_trajectories_are_the_schedulers_own(name: str, prediction: str, steps: int) -> None:
    table = probe(scheduler(name, prediction), steps)
    if name == "ddim zero snr" and prediction == "epsilon":  # it divides by a signal of 0
        assert table == "its steps are not finite"
        return
    assert isinstance(table, SchedulerTable), table
    truth = own(scheduler(name, prediction), steps, noise())
    assert worst(by_table(table, noise()), truth) <= 1e-5


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++ 2m"])
def test_from_the_second_entry(name: str) -> None:
    table = probe(scheduler(name), 20, start=1)
    assert isinstance(table, SchedulerTable), table
    assert worst(by_table(table, noise()), own(scheduler(name), 20, noise(), start=1)) <= 1e-5


def test_calls_are_counted_not_timesteps() -> None:
    lengths = {}
    for name in ("ddim", "pndm", "heun"):
        table = probe(scheduler(name), 9)
        assert isinstance(table, SchedulerTable)
        assert table.coefficients.shape == (len(table.timesteps) + 1,) * 2
        lengths[name] = len(table.timesteps)
    assert lengths == {"ddim": 9, "pndm": 10, "heun": 17}


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "a replay differs at call 1 of 9"),
        (
            "DDIMScheduler",
            {"clip_sample": False, "thresholding": True},
            "a replay differs at call 1",
        ),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "a replay differs"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "or draw noise"),
        ("EulerAncestralDiscreteScheduler", {}, "or draw noise"),
        ("DDPMScheduler", {}, "or draw noise"),
        ("LCMScheduler", {}, "or draw noise"),
    ],
)
def test_refusals(name: str, settings: dict[str, Any], reason: str) -> None:
    said = probe(scheduler(name, **settings), 9)
    assert isinstance(said, str)
    assert reason in said


def test_more_steps_than_timesteps() -> None:
    said = probe(scheduler("ddim", num_train_timesteps=8), 9)
    assert said == "9 steps of 8 training timesteps"


def spoiled(change: Callable[[Tensor, int], Tensor]) -> Any:
    """DDIM with every step's result changed, given the number of the call in its trajectory."""
    made = scheduler("ddim")
    kind = type(made)

    class Spoiled(kind):  # type: ignore[misc, valid-type]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.calls = 0

        def step(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            self.calls += 1
            return (change(super().step(*args, **kwargs)[0], self.calls),)

    return Spoiled.from_config(made.config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, call: x + 0.01 * x.square() * (call == 7), "a replay differs at call 7 of 9"),
        (lambda x, call: x * float("nan") if call == 5 else x, "its steps are not finite"),
        (lambda x, call: x + 1e-3 * torch.randn_like(x) * (call > 3), "or draw noise"),
        (lambda x, _: x[0, 99], "failed when probed: IndexError"),
    ],
)
def test_what_is_wrong_with_one_step_is_found(
    change: Callable[[Tensor, int], Tensor], reason: str
) -> None:
    said = probe(spoiled(change), 9)
    assert isinstance(said, str)
    assert reason in said


def test_probing_touches_nothing() -> None:
    euler = scheduler("euler")
    euler.set_timesteps(7)
    before, state = dict(vars(euler)), torch.get_rng_state()
    probe(euler, 9)
    probe(scheduler("DDPMScheduler"), 9)  # draws noise
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(euler).keys() == before.keys()
    assert all(vars(euler)[k] is v for k, v in before.items())
