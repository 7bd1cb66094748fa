"""Fit: the trainable subset regresses the targets of collected samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import ops
from .collect import predict_noise

if TYPE_CHECKING:
    from .collect import TeacherSamples
    from .models.base import Conditioning
    from .objective import Objective
    from .parameters import TrainableSubset

FLOAT16_SCALE = 1024.0  # of the loss, so that small gradients survive float16


@dataclass(frozen=True)
class FitStep:
    """One optimizer step as it happened, for whoever watches."""

    iteration: int
    loss: float
    samples: TeacherSamples
    noise_pred_student: torch.Tensor


class NonFiniteLoss(RuntimeError):
    """The loss was no number: nothing of this run is worth keeping."""


@dataclass
class Fitter:
    """Adam on the float32 masters of `subset`; keeps its state from step to step."""

    unet: torch.nn.Module
    subset: TrainableSubset
    conditioning: Conditioning  # (1, L, D): what the student is asked with
    objective: Objective
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    asked: dict[int, Conditioning] = field(default_factory=dict, init=False)  # by batch size

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.subset.masters.values(), lr=self.learning_rate)

    def step(self, samples: TeacherSamples) -> FitStep:
        """Forward, loss and its gradient in one kernel, backward, optimizer. Raises
        NonFiniteLoss before any weight has moved."""
        student = predict_noise(
            self.unet, samples.latents, samples.timesteps, self.question(len(samples))
        )  # (B, C, h, w)
        loss, _ = ops.guidance_loss(
            student,
            self.objective.anchor_prediction(samples),
            samples.noise_pred_concept,
            samples.noise_pred_null,
            self.objective.negative_guidance,
            1.0,
        )
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"the loss is {value} at iteration {len(self.losses)}, timestep "
                f"{samples.timesteps.tolist()}; try a lower learning_rate than "
                f"{self.learning_rate:g}, or dtype float32"
            )
        scale = FLOAT16_SCALE if student.dtype == torch.float16 else 1.0
        (loss * scale).backward()
        self.subset.step(self.optimizer, scale)
        self.losses.append(value)
        return FitStep(len(self.losses) - 1, value, samples, student.detach())

    def question(self, size: int) -> Conditioning:
        """The same tensors at every step: what was made of them once may be kept."""
        if size not in self.asked:
            self.asked[size] = self.conditioning.repeated(size)
        return self.asked[size]


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A fixed order of `count` samples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(count, generator=generator, device=torch.device("cpu"))
