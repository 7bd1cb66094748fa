"""Which trajectories are drawn: their noise, their length, and where they are asked."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .config import EraseConfig


@dataclass(frozen=True)
class Rollout:
    """One batch of trajectories that share their length.

    From `noise` (B, C, h, w), standard normal, float32 on the CPU (so that a seed means the same
    on every device), `steps` guided scheduler steps are taken from entry `start` of the
    scheduler's list. Then teacher and student are asked at timestep `query`. Without a query
    every state on the way is a sample.
    """

    noise: torch.Tensor
    steps: int
    query: float | None = None
    start: int = 0


def plan_rollouts(
    config: EraseConfig, timesteps: torch.Tensor, shape: tuple[int, int, int]
) -> list[Rollout]:
    """The rollouts of a whole run, drawn from `config.seed` alone.

    `timesteps` is the scheduler's real list (PNDM's is one longer than asked, Heun's nearly
    twice), `shape` is (C, h, w) of one sample's latents.
    """
    rng = random.Random(config.seed)
    if config.samples == "all":
        wanted = config.iterations * config.batch_size
        count = math.ceil(wanted / len(timesteps))
        return [Rollout(noise(rng, 1, shape), len(timesteps)) for _ in range(count)]
    draw = {"model": draw_last, "paper": draw_paper, "paper-diffusers": draw_paper_diffusers}
    return [
        Rollout(
            noise=noise(rng, config.batch_size, shape),
            **draw[config.schedule](rng, config.num_inference_steps, timesteps),
        )
        for _ in range(config.iterations)
    ]


def noise(rng: random.Random, batch: int, shape: tuple[int, int, int]) -> torch.Tensor:
    import torch

    # the device is said: a caller may have set another one as torch's default
    generator = torch.Generator("cpu").manual_seed(rng.randrange(2**31))
    return torch.randn(
        (batch, *shape), generator=generator, dtype=torch.float32, device=torch.device("cpu")
    )


def draw_last(rng: random.Random, steps: int, timesteps: torch.Tensor) -> dict[str, Any]:
    """The frozen-rollout scripts: entry i of the list, after i guided steps.

    i is one of `steps` though PNDM's list has one entry more: as the scripts draw it.
    """
    index = rng.randrange(steps)
    return {"steps": index, "query": timesteps[index].item()}


def draw_paper(rng: random.Random, steps: int, _: torch.Tensor) -> dict[str, Any]:
    """The paper's script: the list without its noisiest entry; t uniform in stride i."""
    index, stride = rng.randrange(steps), 1000 // steps
    return paper_rollout(index, rng.randrange(stride * index, stride * (index + 1)), steps)


def paper_rollout(index: int, timestep: int, steps: int) -> dict[str, Any]:
    return {"start": 1, "steps": min(steps - 1, steps - index), "query": timestep}


def draw_paper_diffusers(rng: random.Random, steps: int, _: torch.Tensor) -> dict[str, Any]:
    """The paper's algorithm on diffusers: i steps, then entry i of the steps in a list of 1000."""
    index = rng.randrange(1, steps - 1)
    return {"steps": index, "query": 1000 - (1000 // steps) * index}
