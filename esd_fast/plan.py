"""Which trajectories are drawn: their noise, their length, and where they are asked."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field, replace
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
    every state on the way is a sample. `concepts` (B,): the one that each trajectory belongs to,
    by its number in the run; the first if not given.
    """

    noise: torch.Tensor
    steps: int
    query: float | None = None
    start: int = 0
    concepts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.concepts:
            object.__setattr__(self, "concepts", (0,) * len(self.noise))

    @property
    def samples(self) -> int:
        """That come of it."""
        return len(self.noise) * (self.steps if self.query is None else 1)


def share_of(rollouts: list[Rollout], rank: int, size: int) -> list[Rollout]:
    """The trajectories of process `rank`: every `size`-th of all of them, with its own noise."""
    if size == 1:
        return rollouts
    found, first = [], 0
    for rollout in rollouts:
        batch = len(rollout.noise)
        rows = slice((rank - first) % size, None, size)
        first += batch
        if range(batch)[rows]:
            noise, concepts = rollout.noise[rows], rollout.concepts[rows]
            found.append(replace(rollout, noise=noise, concepts=concepts))
    return found


@dataclass(frozen=True)
class Plan:
    """The trajectories of a run: of what is erased, and of what is preserved."""

    erased: list[Rollout]
    preserved: list[Rollout] = field(default_factory=list)

    def after(self, erased: int, preserved: int) -> Plan:
        """Without the first so many of each."""
        return Plan(self.erased[erased:], self.preserved[preserved:])


def check_room(
    config: EraseConfig, shape: tuple[int, int, int], asked: int, device: torch.device
) -> None:
    """Raises ValueError where what a run keeps of its samples is more than all memory that there is:
    latents of `shape`, and where a frozen UNet rolls out `asked` predictions at each."""
    kept = 4 if config.rollout == "student" else 4 + 2 * (1 + asked)  # noise float32, the rest half
    need = config.iterations * config.samples_a_step * math.prod(shape) * kept
    there = memory_of(device)
    if need > there:
        as_many = " and as many preserved" if config.samples_a_step > config.batch_size else ""
        raise ValueError(
            f"iterations is {config.iterations} and batch_size {config.batch_size}: their samples"
            f"{as_many} take {need / 2**30:.0f} GiB, and there are {there / 2**30:.0f}; fewer iterations, or "
            "a lower resolution, take less"
        )


def memory_of(device: torch.device) -> int:
    """Bytes, all of them."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_rollouts(
    config: EraseConfig, timesteps: torch.Tensor, shape: tuple[int, int, int], concepts: int = 0
) -> list[Rollout]:
    """The rollouts of a whole run, drawn from `config.seed` alone.

    `timesteps` is the scheduler's real list (PNDM's is one longer than asked, Heun's nearly
    twice), `shape` is (C, h, w) of one sample's latents, `concepts` how many there are where they
    are not those of `config` alone. Frozen trajectories are dealt to the concepts in turn, equally
    many to each where every state is a sample; a student's follow one drawn for each step, as the
    paper's script does it.
    """
    rng = random.Random(config.seed)
    concepts = concepts or len(config.concepts)
    batch = config.batch_size
    if config.samples == "all":
        wanted = config.iterations * batch
        count = concepts * math.ceil(wanted / (len(timesteps) * concepts))
        return [
            Rollout(noise(rng, 1, shape), len(timesteps), concepts=dealt(i, 1, concepts))
            for i in range(count)
        ]
    draw = {"model": draw_last, "paper": draw_paper, "paper-diffusers": draw_paper_diffusers}
    # a stream of its own: noise and timesteps are those that one concept would have
    words = random.Random(f"concepts {config.seed}")
    student = config.rollout == "student"
    return [
        Rollout(
            noise=noise(rng, batch, shape),
            concepts=(words.randrange(concepts),) * batch if student else dealt(i, batch, concepts),
            **draw[config.schedule](rng, config.num_inference_steps, timesteps),
        )
        for i in range(config.iterations)
    ]


def plan_preserved(
    config: EraseConfig, timesteps: torch.Tensor, shape: tuple[int, int, int], concepts: range
) -> list[Rollout]:
    """Trajectories of what is preserved, of which each step takes as many states as of what is
    erased: dealt to `concepts` in turn, one to each at least. Their draws have a stream of their
    own, so that the others are those of a run that preserves nothing."""
    if not concepts:
        return []
    rng = random.Random(f"preserved {config.seed}")
    wanted = math.ceil(config.iterations * config.batch_size / len(timesteps))
    return [
        Rollout(noise(rng, 1, shape), len(timesteps), concepts=(concepts[i % len(concepts)],))
        for i in range(max(wanted, len(concepts)))
    ]


def dealt(turn: int, batch: int, concepts: int) -> tuple[int, ...]:
    """Of batch number `turn`: the concept of each trajectory, one after the other in turn."""
    return tuple((turn * batch + row) % concepts for row in range(batch))


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
