"""Collect: the UNet runs guided trajectories; every state on the way is a training sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .models.base import Conditioning, PromptSet
    from .plan import Rollout


@dataclass(frozen=True)
class TeacherSamples:
    """What the frozen UNet saw and said; N samples.

    `latents` (N, C, h, w) are what the UNet is given, `scale_model_input` applied; `timesteps`
    (N,) as the scheduler lists them; the predictions (N, C, h, w) in the UNet's dtype.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    noise_pred_null: torch.Tensor
    noise_pred_concept: torch.Tensor
    noise_pred_erase_from: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Any) -> TeacherSamples:
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TeacherSamples:
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        return TeacherSamples(*(None if v is None else change(v) for v in values))  # type: ignore[arg-type]

    @staticmethod
    def join(
        parts: list[TeacherSamples], how: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat
    ) -> TeacherSamples:
        columns = zip(*([getattr(p, f.name) for f in fields(p)] for p in parts), strict=True)
        joined: list[Any] = [None if c[0] is None else how(list(c)) for c in columns]
        return TeacherSamples(*joined)


@dataclass(frozen=True)
class Teacher:
    """What collecting needs of a model.

    `rolled` names the prompt that trajectories follow, `asked` the prompts that are predicted
    for a sample: "null", "concept" and perhaps "erase_from".
    """

    unet: torch.nn.Module
    scheduler: Any
    prompts: PromptSet
    rolled: str
    asked: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float

    def predict(
        self, inputs: torch.Tensor, timestep: torch.Tensor, names: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """All named prompts in one batched forward; `inputs` and each prediction (B, C, h, w)."""
        stacked = torch.cat([inputs] * len(names))  # (len(names) * B, C, h, w)
        conditioning = self.prompts.stacked(names, len(inputs))
        predictions = predict_noise(self.unet, stacked, timestep, conditioning)
        return dict(zip(names, predictions.chunk(len(names)), strict=True))

    def begin(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """The start latents (B, C, h, w) and the timesteps of the guided steps."""
        # schedulers carry history: a fresh list for every trajectory
        self.scheduler.set_timesteps(self.num_inference_steps)
        timesteps = self.scheduler.timesteps[rollout.start : rollout.start + rollout.steps]
        device = next(self.unet.parameters()).device
        latents = rollout.noise.to(device) * self.scheduler.init_noise_sigma
        return latents, timesteps

    def model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet is given: scaled (Euler and its kin), in its dtype."""
        dtype = next(self.unet.parameters()).dtype
        return self.scheduler.scale_model_input(latents, timestep).to(dtype)

    def guided_step(
        self, latents: torch.Tensor, timestep: torch.Tensor, predictions: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Classifier-free guidance and the scheduler's step. The state stays float32: a
        scheduler's own half-precision run is percents off."""
        null, rolled = predictions["null"].float(), predictions[self.rolled].float()
        guided = null + self.guidance_scale * (rolled - null)
        return self.scheduler.step(guided, timestep, latents, return_dict=False)[0]


def predict_noise(
    unet: torch.nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """The UNet's raw prediction, noise or velocity (B, C, h, w); timesteps () or (B,)."""
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        added_cond_kwargs=conditioning.added_cond_kwargs,
        return_dict=False,
    )[0]


@torch.no_grad()
def collect_all(
    teacher: Teacher, rollout: Rollout, on_pass: Callable[[int], None]
) -> TeacherSamples:
    """Every state of a batch of trajectories, each with the predictions that moved it on.

    Sorted by trajectory, then time. `on_pass(n)` is told of every n UNet passes.
    """
    latents, timesteps = teacher.begin(rollout)
    states = []
    for timestep in timesteps:
        inputs = teacher.model_input(latents, timestep)
        predictions = teacher.predict(inputs, timestep, teacher.asked)
        states.append(as_samples(inputs, timestep, predictions))
        latents = teacher.guided_step(latents, timestep, predictions)
        on_pass(len(inputs) * len(teacher.asked))
    by_time = TeacherSamples.join(states, torch.stack)  # (T, B, ...)
    return by_time.map(lambda column: column.transpose(0, 1).flatten(0, 1))


@torch.no_grad()
def collect_last(
    teacher: Teacher,
    rollout: Rollout,
    on_pass: Callable[[int], None],
    frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TeacherSamples:
    """The reference's way: roll out, then ask at the query's timestep, there alone.

    The UNet rolls out with the weights that it holds; the questions are asked within `frozen()`.
    """
    assert rollout.query is not None
    latents, timesteps = teacher.begin(rollout)
    rolling = ("null", teacher.rolled)
    for timestep in timesteps:
        inputs = teacher.model_input(latents, timestep)
        predictions = teacher.predict(inputs, timestep, rolling)
        latents = teacher.guided_step(latents, timestep, predictions)
        on_pass(len(inputs) * len(rolling))
    query = torch.tensor(rollout.query, dtype=teacher.scheduler.timesteps.dtype)
    inputs = teacher.model_input(latents, query)
    with frozen():
        predictions = teacher.predict(inputs, query, teacher.asked)
    on_pass(len(inputs) * len(teacher.asked))
    return as_samples(inputs, query, predictions)


def as_samples(
    inputs: torch.Tensor, timestep: torch.Tensor, predictions: dict[str, torch.Tensor]
) -> TeacherSamples:
    return TeacherSamples(
        latents=inputs,
        timesteps=timestep.to(inputs.device).expand(len(inputs)),
        noise_pred_null=predictions["null"],
        noise_pred_concept=predictions["concept"],
        noise_pred_erase_from=predictions.get("erase_from"),
    )


def chunked(rollouts: list[Rollout], size: int) -> Iterator[Rollout]:
    """Whole trajectories side by side, `size` at a time (a forward of twice that many passes)."""
    from dataclasses import replace

    for first in range(0, len(rollouts), size):
        together = rollouts[first : first + size]
        yield replace(together[0], noise=torch.cat([r.noise for r in together]))
