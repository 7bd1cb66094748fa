"""Collect: the UNet runs guided trajectories; every state on the way is a training sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from .ops import guided_step
from .scheduler_table import SchedulerTable, probe

if TYPE_CHECKING:
    from .graphed_steps import GuidedGraphs
    from .models.base import Conditioning, PromptSet
    from .parallel import Ranks
    from .plan import Rollout


@dataclass(frozen=True)
class TeacherSamples:
    """What the frozen UNet saw and said; N samples.

    `latents` (N, C, h, w) are what the UNet is given, `scale_model_input` applied; `timesteps`
    (N,) as the scheduler lists them; the predictions (N, C, h, w) in the UNet's dtype; `concepts`
    (N,) which of a run's concepts each belongs to, by number; None where there is one. Of a
    concept that is preserved all predictions are the same, that for its own prompt: so is the
    target, whatever the anchor and the negative guidance.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    noise_pred_null: torch.Tensor
    noise_pred_concept: torch.Tensor
    noise_pred_erase_from: torch.Tensor | None = None
    concepts: torch.Tensor | None = None

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
    graphs: GuidedGraphs | None = field(default=None, compare=False)
    tables: dict[int, SchedulerTable | str] = field(default_factory=dict, compare=False)

    def table(self, start: int) -> SchedulerTable | str:
        """The scheduler from entry `start` of its list as a table on the UNet's device, or why it
        has to be called. Probed once."""
        if start not in self.tables:
            table = probe(self.scheduler, self.num_inference_steps, start)
            if isinstance(table, SchedulerTable):
                table = table.to(next(self.unet.parameters()).device)
            self.tables[start] = table
        return self.tables[start]

    def scheduler_path(self, rollouts: list[Rollout]) -> str:
        """For reports: how trajectories step."""
        tables = [self.table(start) for start in sorted({r.start for r in rollouts})]
        reasons = [table for table in tables if isinstance(table, str)]
        return f"diffusers' own step ({'; '.join(reasons)})" if reasons else "table"

    def trajectory(
        self, rollout: Rollout, names: tuple[str, ...], keep: bool = False
    ) -> TableTrajectory | SchedulerTrajectory:
        """`rollout` at its start, to be asked for `names`; `keep`: every state is a sample."""
        table = self.table(rollout.start)
        if isinstance(table, SchedulerTable):
            if self.graphs:
                return self.graphs.trajectory(self, table, rollout, names, keep)
            return TableTrajectory(self, table, rollout, names, keep)
        return SchedulerTrajectory(self, rollout, names, keep)

    def finished_collecting(self) -> None:
        """What was captured for trajectories goes, before the fit needs the memory."""
        if self.graphs:
            self.graphs.release()

    def predict(
        self,
        inputs: torch.Tensor,
        timestep: torch.Tensor,
        names: tuple[str, ...],
        concepts: tuple[int, ...],
    ) -> dict[str, torch.Tensor]:
        """All named prompts, each row's of its own concept, in one batched forward; `inputs` and
        each prediction (B, C, h, w)."""
        stacked = torch.stack([inputs] * len(names))  # (len(names), B, C, h, w)
        conditioning = self.prompts.stacked(names, concepts)
        predictions = self.ask(stacked, timestep, conditioning)
        return dict(zip(names, predictions, strict=True))

    def ask(
        self, inputs: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """One forward for N prompts; `inputs` and the predictions (N, B, C, h, w)."""
        prediction = predict_noise(self.unet, inputs.flatten(0, 1), timestep, conditioning)
        return prediction.view(inputs.shape)

    def numbers_of(self, concepts: Sequence[int]) -> torch.Tensor | None:
        """The samples' column of that name; one concept needs none."""
        if self.prompts.concepts == 1:
            return None
        return torch.tensor(concepts, device=next(self.unet.parameters()).device)

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
        rolled = predictions[self.rolled].float()
        null = predictions["null"].float() if "null" in predictions else rolled
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


class TableTrajectory:
    """A batch of B trajectories on a scheduler's table, for N prompts: one operator a step, on
    buffers that stay where they are, and nothing waits for the host. The state is float32.

    `calls`: how many steps the buffers hold; those of `rollout` if not given.
    """

    def __init__(
        self,
        teacher: Teacher,
        table: SchedulerTable,
        rollout: Rollout,
        names: tuple[str, ...],
        keep: bool,
        calls: int | None = None,
    ) -> None:
        self.teacher, self.table, self.names = teacher, table, names
        self.rolled, self.guidance_scale = names.index(teacher.rolled), teacher.guidance_scale
        weight = next(teacher.unet.parameters())
        self.batch, *sample = rollout.noise.shape
        self.concepts = rollout.concepts
        self.conditioning = teacher.prompts.stacked(names, self.concepts)
        calls = len(table.timesteps[: rollout.steps]) if calls is None else calls
        numbers = torch.arange(calls, device=weight.device)
        self.numbers = numbers  # of the calls, read on the device
        latents = (self.batch, *sample)
        self.history = weight.new_empty(calls + 1, *latents, dtype=torch.float32)
        self.inputs = weight.new_empty(len(names), *latents)  # (N, B, C, h, w)
        # the samples, in their order: by trajectory, then time
        self.seen = weight.new_empty(self.batch, calls, *sample) if keep else None
        self.said: torch.Tensor | None = None  # (N, B, calls, C, h, w)
        self.begin(rollout)

    def begin(self, rollout: Rollout) -> None:
        """To the start of `rollout`."""
        self.timesteps, self.taken = self.table.timesteps[: rollout.steps], 0
        if rollout.concepts != self.concepts:
            self.concepts = rollout.concepts
            self.conditioning.fill(self.teacher.prompts.stacked(self.names, self.concepts))
        start = rollout.noise.to(self.history.device) * self.table.init_noise_sigma  # (B, C, h, w)
        self.history.zero_()  # rows to come are read, times nothing: they have to be finite
        self.history[0] = start
        first = (start * self.table.input_scales[0]).to(self.inputs.dtype)
        self.inputs.copy_(first)
        if self.seen is not None:
            self.seen[:, :1] = first.unsqueeze(1)

    def model_inputs(self, _: torch.Tensor) -> torch.Tensor:
        """What the UNet is given next (N, B, C, h, w)."""
        return self.inputs

    def step(self, timestep: torch.Tensor) -> None:
        """On to the next state."""
        self.advance(timestep, self.numbers[self.taken])
        self.taken += 1

    def advance(self, timestep: torch.Tensor, number: torch.Tensor) -> None:
        """The UNet's predictions and call `number` () of the scheduler, both read on the device."""
        predictions = self.teacher.ask(self.inputs, timestep, self.conditioning)
        if self.seen is not None and self.said is None:
            self.said = predictions.new_empty(len(self.names), *self.seen.shape)
        guided_step(
            predictions,
            number,
            self.table.coefficients,
            self.table.input_scales,
            self.rolled,
            self.guidance_scale,
            self.history,
            self.inputs,
            self.seen,
            self.said,
        )

    def samples(self) -> TeacherSamples:
        """Every state of the way: views of the buffers."""
        assert self.seen is not None
        assert self.said is not None
        steps = len(self.timesteps)
        said = dict(zip(self.names, self.said[:, :, :steps].flatten(1, 2), strict=True))
        return as_samples(
            self.seen[:, :steps].flatten(0, 1),
            self.timesteps.repeat(self.batch),
            said,
            self.teacher.numbers_of([k for k in self.concepts for _ in range(steps)]),
        )


class SchedulerTrajectory:
    """The same by the scheduler's own steps, where it has no table."""

    def __init__(
        self, teacher: Teacher, rollout: Rollout, names: tuple[str, ...], keep: bool
    ) -> None:
        self.teacher, self.names, self.keep = teacher, names, keep
        self.latents, self.timesteps = teacher.begin(rollout)
        self.batch = len(self.latents)
        self.conditioning = teacher.prompts.stacked(names, rollout.concepts)
        self.concepts = teacher.numbers_of(rollout.concepts)
        self.states: list[TeacherSamples] = []

    def model_inputs(self, timestep: torch.Tensor) -> torch.Tensor:
        self.inputs = self.teacher.model_input(self.latents, timestep)
        return torch.stack([self.inputs] * len(self.names))

    def step(self, timestep: torch.Tensor) -> None:
        predictions = self.teacher.ask(self.model_inputs(timestep), timestep, self.conditioning)
        by_name = dict(zip(self.names, predictions, strict=True))
        if self.keep:
            self.states.append(as_samples(self.inputs, timestep, by_name, self.concepts))
        self.latents = self.teacher.guided_step(self.latents, timestep, by_name)

    def samples(self) -> TeacherSamples:
        by_time = TeacherSamples.join(self.states, torch.stack)  # (T, B, ...)
        return by_time.map(lambda column: column.transpose(0, 1).flatten(0, 1))


@torch.no_grad()
def collect_all(
    teacher: Teacher, rollout: Rollout, on_pass: Callable[[int], object]
) -> TeacherSamples:
    """Every state of a batch of trajectories, each with the predictions that moved it on.

    Sorted by trajectory, then time. `on_pass(n)` is told of every n UNet passes.
    """
    trajectory = teacher.trajectory(rollout, teacher.asked, keep=True)
    roll(trajectory, on_pass)
    return trajectory.samples()


def collect_preserved(
    teacher: Teacher, rollout: Rollout, on_pass: Callable[[int], object]
) -> TeacherSamples:
    """`collect_all` of prompts that are preserved, asked alone and followed without guidance: the
    states that the model was trained on, for one UNet pass each."""
    alone = replace(teacher, rolled="concept", asked=("concept",))
    samples = collect_all(alone, rollout, on_pass)
    if "erase_from" in teacher.asked:
        return replace(samples, noise_pred_erase_from=samples.noise_pred_concept)
    return samples


@torch.no_grad()
def collect_last(
    teacher: Teacher,
    rollout: Rollout,
    on_pass: Callable[[int], object],
    frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TeacherSamples:
    """The reference's way: roll out, then ask at the query's timestep, there alone.

    The UNet rolls out with the weights that it holds; the questions are asked within `frozen()`.
    """
    assert rollout.query is not None
    trajectory = teacher.trajectory(rollout, ("null", teacher.rolled))
    roll(trajectory, on_pass)
    query = torch.tensor(rollout.query, dtype=trajectory.timesteps.dtype)
    inputs = trajectory.model_inputs(query)[0].clone()  # the buffer may be used again
    with frozen():
        predictions = teacher.predict(inputs, query, teacher.asked, rollout.concepts)
    on_pass(len(inputs) * len(teacher.asked))
    return as_samples(inputs, query, predictions, teacher.numbers_of(rollout.concepts))


def roll(
    trajectory: TableTrajectory | SchedulerTrajectory, on_pass: Callable[[int], object]
) -> None:
    """All the guided steps of a trajectory."""
    for timestep in trajectory.timesteps:
        trajectory.step(timestep)
        on_pass(trajectory.batch * len(trajectory.names))


def as_samples(
    inputs: torch.Tensor,
    timestep: torch.Tensor,
    predictions: dict[str, torch.Tensor],
    concepts: torch.Tensor | None,
) -> TeacherSamples:
    return TeacherSamples(
        latents=inputs,
        timesteps=timestep.to(inputs.device).expand(len(inputs)),
        noise_pred_null=predictions.get("null", predictions["concept"]),
        noise_pred_concept=predictions["concept"],
        noise_pred_erase_from=predictions.get("erase_from"),
        concepts=concepts,
    )


def gathered(
    ranks: Ranks, parts: list[TeacherSamples], rollouts: list[Rollout], device: torch.device
) -> list[TeacherSamples]:
    """The samples of all `rollouts`, in their order, where `parts` are those of this process's share
    of their trajectories."""
    if ranks.size == 1 or not rollouts:
        return parts
    ours = {} if not parts else vars(TeacherSamples.join(parts))
    columns = {name: column for name, column in ours.items() if column is not None}
    whole = TeacherSamples(**ranks.gather(columns, device))  # by process
    trajectories = sum(len(rollout.noise) for rollout in rollouts)
    numbers = torch.arange(len(whole), device=device).view(trajectories, -1)
    came = torch.cat([numbers[rank :: ranks.size].flatten() for rank in range(ranks.size)])
    return [whole[torch.argsort(came)]]


def chunked(rollouts: list[Rollout], size: int) -> Iterator[Rollout]:
    """Whole trajectories side by side, `size` at a time (a forward of twice that many passes)."""
    for first in range(0, len(rollouts), size):
        together = rollouts[first : first + size]
        yield replace(
            together[0],
            noise=torch.cat([r.noise for r in together]),
            concepts=tuple(k for r in together for k in r.concepts),
        )
