"""The guided step and the fit step as CUDA graphs: which buffers, what is captured, what is copied out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .collect import TableTrajectory, TeacherSamples
from .fit import Fitter
from .graphs import Capture, CudaCapture, Graphed, PutBack, copies_of, why_not
from .optimizers import why_not_capturable

if TYPE_CHECKING:
    from .collect import Teacher
    from .plan import Rollout
    from .scheduler_table import SchedulerTable


# --- collect ------------------------------------------------------------------------------------------


class GraphedTrajectory(TableTrajectory):
    """Trajectories, one batch after another, over the same buffers: the UNet's forward and
    `guided_step` are captured once, for as many steps as the table has."""

    def __init__(
        self,
        capture: Capture,
        teacher: Teacher,
        table: SchedulerTable,
        rollout: Rollout,
        names: tuple[str, ...],
        keep: bool,
    ) -> None:
        super().__init__(teacher, table, rollout, names, keep, calls=len(table.timesteps))
        timestep, number = table.timesteps[0].clone(), self.numbers[0].clone()
        self.graph = Graphed(
            capture,
            inputs={"timestep": timestep, "number": number},
            stages={"guided step": lambda: self.advance(timestep, number)},
            # `seen` and `said` get what they should have from the first replay
            saved=lambda: copies_of(lambda: (self.history, self.inputs)),
            storages=teacher.unet.parameters,
        )

    def step(self, timestep: Tensor) -> None:
        self.graph.fill(timestep=timestep, number=self.numbers[self.taken])
        self.graph.run("guided step")
        self.taken += 1

    def samples(self) -> TeacherSamples:
        """Copies: the next batch takes the buffers."""
        return super().samples().map(torch.clone)


class GuidedGraphs:
    """A captured guided step for each start, choice of prompts, batch and shape of latents.

    The UNet's weights are read where they lie: a student's, which are trained in place between
    its rollouts, as they are then.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.made: dict[Any, GraphedTrajectory] = {}
        self.graphs: list[Graphed] = []

    def trajectory(
        self,
        teacher: Teacher,
        table: SchedulerTable,
        rollout: Rollout,
        names: tuple[str, ...],
        keep: bool,
    ) -> TableTrajectory:
        """`rollout` at its start. The one before, of the same shape, is over."""
        if failed(self.graphs):  # whatever it was, another shape would meet it too
            return TableTrajectory(teacher, table, rollout, names, keep)
        key = (rollout.start, names, keep, rollout.noise.shape)
        if key not in self.made:
            self.made[key] = GraphedTrajectory(self.capture, teacher, table, rollout, names, keep)
            self.graphs.append(self.made[key].graph)
        self.made[key].begin(rollout)
        return self.made[key]

    def release(self) -> None:
        """All that was captured, and its memory."""
        self.made.clear()
        release(self.graphs, self.capture)


# --- fit ----------------------------------------------------------------------------------------------


class FitGraph:
    """One fit step over fixed samples: stage "backward", then the host looks at the loss, then
    stage "update".

    Gradients live in the graph's own pool: `Fitter.backward` sets them to None first, so the
    captured backward makes them anew at each replay, where "update" was captured to find them
    (and between the two processes average them, which no graph holds).
    Gradients that stay would be zeroed and added to, a further read and write of each.
    """

    def __init__(self, capture: Capture, fitter: GraphedFitter, like: TeacherSamples) -> None:
        self.samples = like.map(
            lambda x: torch.empty_like(x, memory_format=torch.contiguous_format)
        )
        self.student = torch.empty_like(self.samples.latents)
        self.loss = self.student.new_empty((), dtype=torch.float32)
        self.gradients: list[Tensor] = []
        named = vars(self.samples)
        self.fitter = fitter
        self.graph = Graphed(
            capture,
            inputs={name: buffer for name, buffer in named.items() if buffer is not None},
            stages={"backward": self.backward, "update": fitter.update_eagerly},
            saved=fitter.saved,
            storages=fitter.unet.parameters,
            given_up=fitter.uncaptured,
        )

    def fill(self, samples: TeacherSamples) -> None:
        self.graph.fill(**{n: v for n, v in vars(samples).items() if v is not None})

    def backward(self) -> None:
        loss, student = self.fitter.backward_eagerly(self.samples)
        if self.fitter.ranks.size > 1:  # held longer than they are needed where nobody averages
            self.gradients = self.fitter.subset.gradients()
        self.loss.copy_(loss)
        self.student.copy_(student)


@dataclass
class GraphedFitter(Fitter):
    """A Fitter whose steps are captured, for each shape of samples.

    `watched`: a step's predictions are copied for whoever keeps them; otherwise the next step
    overwrites them.
    """

    _: KW_ONLY
    capture: Capture
    watched: bool = True
    made: dict[Any, FitGraph] = field(default_factory=dict, init=False)
    running: FitGraph | None = field(default=None, init=False)

    @property
    def graphs(self) -> list[Graphed]:
        return [made.graph for made in self.made.values()]

    def backward(self, samples: TeacherSamples) -> tuple[Tensor, Tensor]:
        if failed(self.graphs):
            self.running = None
            return super().backward(samples)
        key = tuple(None if v is None else (v.shape, v.dtype) for v in vars(samples).values())
        if key not in self.made:
            self.made[key] = FitGraph(self.capture, self, samples)
        self.running = self.made[key]
        self.running.fill(samples)
        self.running.graph.run("backward")
        student = self.running.student
        return self.running.loss, student.clone() if self.watched else student

    def gradients(self) -> list[Tensor]:
        return self.running.gradients if self.running else super().gradients()

    def update(self) -> None:
        if self.running:
            self.running.graph.run("update")
        else:
            super().update()

    def backward_eagerly(self, samples: TeacherSamples) -> tuple[Tensor, Tensor]:
        return super().backward(samples)

    def update_eagerly(self) -> None:
        super().update()

    def saved(self) -> PutBack:
        """Weights, the optimizer's state, float16's loss scale."""
        put_weights_back, scale = copies_of(self.state), self.scaler.state_dict()

        def put_back() -> None:
            put_weights_back()
            self.scaler.load_state_dict(scale)  # in place

        return put_back

    def state(self) -> Iterable[Tensor]:
        """Every tensor that an update changes, once; but for the scaler's own."""
        weights = (*self.subset.parameters.values(), *self.subset.masters.values())
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors = [x for x in (*weights, *states) if isinstance(x, Tensor)]
        return {id(x): x for x in tensors}.values()

    def uncaptured(self) -> None:
        """Optimizer and scaler as they are where nothing is captured: unless fused, the optimizer
        counts its steps on the host. A capture may have stopped in the midst of an update."""
        for group in self.optimizer.param_groups:
            group["capturable"] = False
            for parameter in () if group["fused"] else group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].cpu()
        for lent in ("grad_scale", "found_inf"):  # by the scaler, for the time of a step
            self.optimizer.__dict__.pop(lent, None)
        stopped, self.scaler = self.scaler, self.new_scaler()
        self.scaler.load_state_dict(stopped.state_dict())


# --- a run ---------------------------------------------------------------------------------------------


class RunGraphs:
    """Of a whole run: what each phase captures with, or why it does not."""

    def __init__(self, collect: Capture | str, fit: Capture | str) -> None:
        self.collect, self.fit = collect, fit
        self.guided = None if isinstance(collect, str) else GuidedGraphs(collect)
        self.fitters: list[GraphedFitter] = []

    @classmethod
    def of(cls, setting: str, unet: torch.nn.Module, optimizer: str = "adam") -> RunGraphs:
        """`setting`: "auto" or "off"; `optimizer`: a name of OPTIMIZERS."""
        why = why_not(setting, unet)
        if why:
            return cls(why, why)
        device = next(unet.parameters()).device
        return cls(CudaCapture(device), why_not_capturable(optimizer) or CudaCapture(device))

    @property
    def captures_optimizer(self) -> bool:
        """Whether the fit's optimizer has to be made capturable."""
        return not isinstance(self.fit, str) and self.fit.capturable

    def fitter(self, *arguments: Any, watched: bool) -> Fitter:
        """A Fitter of these arguments; `watched`: whether somebody keeps its predictions."""
        if isinstance(self.fit, str):
            return Fitter(*arguments)
        self.fitters.append(GraphedFitter(*arguments, capture=self.fit, watched=watched))
        return self.fitters[-1]

    def path(self, scheduler_path: str) -> str:
        """For reports: whether each phase replayed graphs, and why not."""
        if isinstance(self.collect, str):
            collect = f"no ({self.collect})"
        elif scheduler_path != "table":
            collect = f"no ({scheduler_path})"
        else:
            collect = path_of(self.guided.graphs if self.guided else [])
        graphs = [graph for fitter in self.fitters for graph in fitter.graphs]
        fit = f"no ({self.fit})" if isinstance(self.fit, str) else path_of(graphs)
        return f"collect: {collect}; fit: {fit}"

    def release(self) -> None:
        """All that was captured, and its memory."""
        if self.guided:
            self.guided.release()
        for fitter in self.fitters:
            release(fitter.graphs, fitter.capture)
            fitter.made.clear()


def failed(graphs: list[Graphed]) -> bool:
    return any(graph.why_not for graph in graphs)


def path_of(graphs: list[Graphed]) -> str:
    reasons = [graph.why_not for graph in graphs if graph.why_not]
    if reasons:
        return f"no ({reasons[0]})"
    captured = [graph.steps for graph in graphs if graph.steps]
    if not captured:
        return "no (no step was taken)"
    return f"yes ({len(captured)} captured, {sum(captured)} steps replayed)"


def release(graphs: list[Graphed], capture: Capture) -> None:
    for graph in graphs:
        graph.release()
    if graphs:
        capture.release()
