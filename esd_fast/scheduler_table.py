"""A deterministic scheduler as a table of numbers, measured on the scheduler itself.

Every state of such a trajectory is a weighted sum of its start and of the predictions so far,

    x_i = U[i, 0] x_0 + sum over k < i of U[i, 1 + k] p_k

so the lower-triangular U holds the whole scheduler, whatever it remembers between its steps. Shorter
rows (a x + b p) would do for DDIM and Euler, but not for PNDM, LMS, DPM++, UniPC or Heun; this form does
for all, and the sum is small beside a forward of a UNet. A call is known by its number, never by its
timestep: PNDM, Heun and Karras lists name some timesteps twice.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of a replayed state, by norm; float32 leaves about 1e-6


@dataclass(frozen=True)
class SchedulerTable:
    """A scheduler's N calls.

    `coefficients` (N + 1, N + 1) float32: row i makes the state after i calls from the start and
    the guided predictions. `input_scales` (N + 1,) float32: what a state is multiplied with before
    the UNet sees it; nothing follows the last. `timesteps` (N,) as the scheduler lists them.
    """

    coefficients: Tensor
    input_scales: Tensor
    timesteps: Tensor
    init_noise_sigma: float

    def to(self, device: torch.device) -> SchedulerTable:
        return SchedulerTable(
            self.coefficients.to(device),
            self.input_scales.to(device),
            self.timesteps.to(device),
            self.init_noise_sigma,
        )


def probe(scheduler: Any, num_inference_steps: int, start: int = 0) -> SchedulerTable | str:
    """The table of a trajectory that begins at entry `start` of the list, or why there is none.

    Works on a copy; neither the scheduler nor torch's global generator is touched. A table is
    handed out only if another trajectory, of random numbers, agrees with the scheduler's own at
    every step: that refuses clipping, thresholding and drawn noise, whatever they are called.
    """
    trained = int(scheduler.config.get("num_train_timesteps", 1000))
    if num_inference_steps > trained:
        return f"{num_inference_steps} steps of {trained} training timesteps"
    scheduler = copy.deepcopy(scheduler)
    try:
        # neither catch_warnings nor fork_rng: both put back a state of the whole process, and other
        # threads may have moved it on meanwhile
        with torch.no_grad():
            table = measure(scheduler, num_inference_steps, start)
            return why_not(table, scheduler, num_inference_steps, start) or table
    except Exception as error:  # noqa: BLE001 -- whatever it is, the scheduler is called instead
        return f"failed when probed: {type(error).__name__}: {str(error).strip()[:200]}"


def begun(scheduler: Any, num_inference_steps: int, start: int) -> Tensor:
    """The timesteps of a fresh trajectory. Schedulers carry history: a fresh list for each."""
    scheduler.set_timesteps(num_inference_steps)
    timesteps: Tensor = scheduler.timesteps[start:].cpu()
    return timesteps


def measure(scheduler: Any, num_inference_steps: int, start: int) -> SchedulerTable:
    """One trajectory whose start and predictions are the N + 1 unit vectors: its states are U."""
    timesteps = begun(scheduler, num_inference_steps, start)
    calls = len(timesteps)
    # latents (B, C, h, w); dtypes are said: a caller may have set another default
    units = torch.eye(calls + 1, dtype=torch.float32, device="cpu").view(-1, 1, calls + 1, 1, 1)
    ones = torch.ones_like(units[0])
    states, scales = [units[0]], []
    for timestep, prediction in zip(timesteps, units[1:], strict=True):
        scales.append(scheduler.scale_model_input(ones, timestep).flatten()[0])
        states.append(step(scheduler, prediction, timestep, states[-1]))
    return SchedulerTable(
        coefficients=torch.stack(states).view(calls + 1, calls + 1).float(),
        input_scales=torch.stack([*scales, torch.ones_like(scales[0])]).float(),
        timesteps=timesteps,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def why_not(table: SchedulerTable, scheduler: Any, num_inference_steps: int, start: int) -> str:
    """What is wrong with a table, in words; nothing if it may be used."""
    if not (table.coefficients.isfinite().all() and table.input_scales.isfinite().all()):
        return "its steps are not finite"
    if table.coefficients.triu(1).any():
        return "its steps are not linear, or draw noise"
    timesteps = begun(scheduler, num_inference_steps, start)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (len(timesteps) + 1, 1, 4, 8, 8)
    history = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    history[0] *= table.init_noise_sigma
    state = history[0]
    for call, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(state, timestep)
        agrees = close(table.input_scales[call] * state, scaled)
        state = step(scheduler, history[call + 1], timestep, state)
        agrees &= close(torch.tensordot(table.coefficients[call + 1], history, dims=1), state)
        if not agrees:
            return f"a replay differs at call {call + 1} of {len(timesteps)}: not linear, or random"
    return ""


def step(scheduler: Any, prediction: Tensor, timestep: Tensor, state: Tensor) -> Tensor:
    """One that draws noise draws it from a generator of its own."""
    takes = inspect.signature(scheduler.step).parameters
    own = {"generator": torch.Generator("cpu").manual_seed(0)} if "generator" in takes else {}
    after: Tensor = scheduler.step(prediction, timestep, state, return_dict=False, **own)[0]
    return after


def close(ours: Tensor, own: Tensor) -> bool:
    return bool((ours - own).norm() <= TOLERANCE * own.norm())  # NaN is not close
