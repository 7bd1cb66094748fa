"""Fit: the trainable subset regresses the targets of collected samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import ops
from .collect import predict_noise
from .interrupts import held_back
from .parallel import Ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .collect import TeacherSamples
    from .models.base import Conditioning
    from .objective import Objective
    from .parameters import TrainableSubset

MOST_SKIPS = 20  # in a row; the loss scale is then a millionth of what it began with


@dataclass(frozen=True)
class FitStep:
    """One optimizer step as it happened, for whoever watches."""

    iteration: int
    loss: float
    samples: TeacherSamples
    noise_pred_student: torch.Tensor
    skipped: bool = False  # gradients overflowed float16: no weight moved
    batch: int = 0  # of how many samples: `samples` are this process's share of them


class NonFiniteLoss(RuntimeError):
    """The loss or its gradients were no numbers: nothing of this run is worth keeping."""


@dataclass
class Fitter:
    """Moves the float32 masters of `subset` by `optimizer` (optimizers.py), step by step.

    Where a UNet has float16 weights the loss is scaled, as torch.amp does it: a step whose
    gradients overflow is skipped, and the scale halved. Of several processes each has its share
    of a batch, and all take the same step.
    """

    unet: torch.nn.Module
    subset: TrainableSubset
    conditioning: Conditioning  # (K, L, D): what the student is asked with, a row a concept
    objective: Objective
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None = None
    weights: torch.Tensor | None = None  # (K,) float32: of each concept's samples in the loss
    ranks: Ranks = field(default_factory=Ranks)
    losses: list[float] = field(default_factory=list)
    skipped: int = 0  # steps, of all
    skipped_in_a_row: int = 0
    last: TeacherSamples | None = field(default=None, init=False)  # of the step before
    asked: dict[int, Conditioning] = field(default_factory=dict, init=False)  # by batch size

    def __post_init__(self) -> None:
        self.scaler = self.new_scaler()

    def new_scaler(self) -> torch.amp.GradScaler:
        weights = list(self.unet.parameters())
        return torch.amp.GradScaler(
            weights[0].device.type, enabled=any(w.dtype == torch.float16 for w in weights)
        )

    def step(self, samples: TeacherSamples) -> FitStep:
        """Forward, loss and its gradient in one kernel, backward, optimizer; `samples`: this
        process's.

        Raises NonFiniteLoss before any weight has moved; also after MOST_SKIPS skipped steps in
        a row, where no scale helps. Interrupted, the step is taken as a whole or not at all.
        """
        loss, student = self.backward(samples)
        value = loss.item()
        if not math.isfinite(value):
            from .sick_numbers import where_it_began

            raise NonFiniteLoss(
                f"the loss is {value} at iteration {len(self.losses)}, timestep "
                f"{samples.timesteps.tolist()}: {where_it_began(self, samples, student)}; "
                f"{self.would_do()}"
            )
        value, batch = self.ranks.mean(value, len(samples))
        if self.ranks.size > 1:
            self.ranks.average(self.gradients(), len(samples) / batch)
        scale = self.scaler.get_scale()
        with held_back():
            self.update()
            skipped = self.scaler.get_scale() < scale
            self.losses.append(value)
            self.last = samples
            self.count_skipped(skipped)
        return FitStep(len(self.losses) - 1, value, samples, student, skipped, batch)

    def backward(self, samples: TeacherSamples) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss (), the student's predictions (B, C, h, w), and gradients on the UNet's
        parameters; on the masters, where there are several processes. Nothing waits for the
        device."""
        for parameter in self.subset.parameters.values():
            parameter.grad = None
        student = predict_noise(
            self.unet, samples.latents, samples.timesteps, self.question(samples)
        )  # (B, C, h, w)
        loss, _ = ops.guidance_loss(
            student,
            self.objective.anchor_prediction(samples),
            samples.noise_pred_concept,
            samples.noise_pred_null,
            self.objective.negative_guidance,
            1.0 if self.weights is None else self.weights[samples.concepts],
        )
        self.scaler.scale(loss).backward()
        if self.ranks.size > 1:  # to be averaged; one alone needs them part by part, in the update
            self.subset.gradients_to_masters(self.subset.parameters)
        return loss.detach(), student.detach()

    def gradients(self) -> list[torch.Tensor]:
        """Of the masters, by the last backward, where there are several processes."""
        return self.subset.gradients()

    def update(self) -> None:
        """Gradients to masters, masters to the UNet. Nothing waits for the device where the
        optimizer is fused (GradScaler looks at the gradients of another on the host)."""
        averaged = self.ranks.size > 1
        self.subset.step(self.optimizer, self.scaler, self.max_grad_norm, averaged)

    @property
    def answered(self) -> list[float]:
        """The timesteps of the last step."""
        return [] if self.last is None else self.last.timesteps.tolist()

    def would_do(self) -> str:
        rate = self.optimizer.param_groups[0]["lr"]
        return f"try a lower learning_rate than {rate:g}, or dtype float32"

    def check_finite(self, trained: Mapping[str, torch.Tensor]) -> None:
        """Raises NonFiniteLoss where the last step, whose loss nobody saw yet, left weights that
        are no numbers."""
        from .sick_numbers import broken, last_in_forward

        names = broken(trained)
        if names:
            first = names[0] if self.last is None else last_in_forward(self, self.last, names)
            raise NonFiniteLoss(
                f"{len(names)} of {len(trained)} trained tensors are not finite after iteration "
                f"{len(self.losses) - 1}, timestep {self.answered}: {first} went first; "
                f"{self.would_do()}"
            )

    def count_skipped(self, skipped: bool) -> None:
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MOST_SKIPS:
            raise NonFiniteLoss(
                f"gradients overflowed float16 in {MOST_SKIPS} steps in a row, the last one "
                f"iteration {len(self.losses) - 1}; try dtype bfloat16 or float32"
            )

    def question(self, samples: TeacherSamples) -> Conditioning:
        """Each sample's own concept. Of one concept the same tensors at every step: what was made
        of them once may be kept."""
        if samples.concepts is not None:
            return self.conditioning.rows(samples.concepts)
        size = len(samples)
        if size not in self.asked:
            self.asked[size] = self.conditioning.repeated(size)
        return self.asked[size]


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A fixed order of `count` samples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(count, generator=generator, device=torch.device("cpu"))
