"""CUDA graphs: steps recorded once over fixed buffers and replayed, so that the host launches next to nothing.

As PyTorch documents it (notes/cuda, "Whole-network capture"): warm-up on a side stream, then
`torch.cuda.graph`, then replays, which read and write the same memory for ever. What is recorded
must not wait for the device, and what Python does in it is done once: hence the rules below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

WARM_UPS = 3  # PyTorch's number: libraries are loaded, kernels compiled, an optimizer's state made
Stage = Callable[[], None]
PutBack = Callable[[], None]


class Capture(Protocol):
    """How stages become something to replay."""

    capturable: bool  # whether an optimizer has to be made for it

    def warm_up(self, stages: Stage) -> None:
        """Runs them all WARM_UPS times."""

    def record(self, stage: Stage) -> Stage:
        """Its replay. The stage's own numbers are not computed."""

    def release(self) -> None:
        """Every replay has been dropped: their memory may go."""


class CudaCapture:
    """Real graphs on one device. They share a pool of memory, which holds what is alive within a
    replay: whatever outlasts it lies in buffers made outside, so the order of replays is free."""

    capturable = True

    def __init__(self, device: torch.device) -> None:
        # torch.cuda.graph's own stream is one of the device that was current at its first use
        self.device, self.side = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, stages: Stage) -> None:
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            for _ in range(WARM_UPS):
                stages()
        current.wait_stream(self.side)

    def record(self, stage: Stage) -> Stage:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its stream the current one where ending the capture fails; the
        # stream context around it puts that right
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            generator_put_back_on_failure(),
            torch.cuda.graph(graph, pool=self.pool, stream=self.side),
        ):
            stage()
        return graph.replay

    def release(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()  # replays may still run
            torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()


@contextmanager
def generator_put_back_on_failure() -> Iterator[None]:
    """A capture that fails to end leaves the current device's own generator thinking that it goes on, and every
    random number of the caller's raises from then on: it gets the state from before, which knows nothing of it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


class Twin:
    """No graph at all: a replay calls the stage again. All but the speed can be seen of it without
    a card: order, shapes, stale buffers, what is put back, the number of steps."""

    capturable = False

    def warm_up(self, stages: Stage) -> None:
        for _ in range(WARM_UPS):
            stages()

    def record(self, stage: Stage) -> Stage:
        return stage

    def release(self) -> None:
        pass


class Graphed:
    """Named `stages` over fixed buffers; captured on the first step, then replayed.

    A step: `fill` every one of `inputs`, then `run` the stages in their order. Those behind the
    first may be left out (a step that is given up). Stages take their inputs from the buffers and
    leave results in others that exist already; they keep no state in Python.

    Warm-up is not a step: `saved()` is called before it, and what that returned after it, to put
    everything back in its place, bit for bit (`copies_of`).

    `storages()` are tensors that the stages read and that others could move: their addresses are
    compared before each replay, which would read the old ones.

    Where capture fails, `why_not` says why, `given_up()` is called, and `run` calls the stages.
    """

    def __init__(
        self,
        capture: Capture,
        inputs: Mapping[str, Tensor],
        stages: Mapping[str, Stage],
        saved: Callable[[], PutBack],
        storages: Callable[[], Iterable[Tensor]],
        given_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.capture, self.inputs, self.stages = capture, dict(inputs), dict(stages)
        self.saved, self.given_up = saved, given_up
        self.storages = list(storages())
        self.fresh: set[str] = set()
        self.turn = 0  # of which stage, by number
        self.replays: list[Stage] = []
        self.addresses: list[int] = []
        self.steps = 0  # that went through the first stage
        self.why_not = ""

    def fill(self, **values: Tensor) -> None:
        """Copies `values` into the inputs of these names. Raises ValueError where one has another
        shape or dtype than its buffer."""
        for name, value in values.items():
            if name not in self.inputs:
                raise ValueError(f"{name!r} is no input; there are {', '.join(self.inputs)}")
            buffer = self.inputs[name]
            if value.shape != buffer.shape or value.dtype != buffer.dtype:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype}; its buffer holds "
                    f"{tuple(buffer.shape)} {buffer.dtype}"
                )
            buffer.copy_(value)
            self.fresh.add(name)

    def run(self, stage: str) -> None:
        """Raises RuntimeError where it is not the stage's turn, an input was not filled since the
        last step, or a storage has moved."""
        names = list(self.stages)
        number = names.index(stage)
        if number not in (0, self.turn):
            raise RuntimeError(f"stage {stage!r} out of turn: next is {names[self.turn]!r}")
        stale = [name for name in self.inputs if name not in self.fresh]
        if number == 0 and stale:
            raise RuntimeError(f"not filled since the last step: {', '.join(stale)}")
        if self.moved():
            raise RuntimeError(f"{self.moved()} of the tensors that were captured have moved")
        if number == 0:
            if not self.replays:
                self.prepare()
            self.fresh.clear()
            self.steps += 1
        self.replays[number]()
        self.turn = (number + 1) % len(names)

    def moved(self) -> int:
        """How many storages are no longer where they were captured."""
        now = zip(self.storages, self.addresses, strict=False)
        return sum(tensor.data_ptr() != address for tensor, address in now)

    def prepare(self) -> None:
        """Warm-up, everything as before, capture."""
        try:
            put_back = self.saved()
            try:
                self.capture.warm_up(self.every_stage)
            finally:  # Ctrl-C as well: what was trained until now is kept
                put_back()
            self.replays = [self.capture.record(stage) for stage in self.stages.values()]
            self.addresses = [tensor.data_ptr() for tensor in self.storages]
        except Exception as error:  # noqa: BLE001 -- whatever it is, eager steps do the work
            self.why_not = told(error)
            self.replays = list(self.stages.values())
            self.given_up()

    def release(self) -> None:
        """Of what was captured, and of its buffers, nothing stays; `steps` and `why_not` do."""
        self.replays, self.storages, self.inputs, self.stages = [], [], {}, {}
        self.saved, self.given_up = nothing_saved, lambda: None

    def every_stage(self) -> None:
        for stage in self.stages.values():
            stage()


def copies_of(tensors: Callable[[], Iterable[Tensor]]) -> PutBack:
    """Saves `tensors()`. What comes back asks again, and makes zeros of those that are new: so
    begins the state that torch's optimizers make at their first step."""
    # on the CPU: a warm-up is as hungry for the card's memory as a step
    before = {id(tensor): (tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors()}

    @torch.no_grad()
    def put_back() -> None:
        for tensor in tensors():
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)][1])
            else:
                tensor.zero_()

    return put_back


def nothing_saved() -> PutBack:
    return lambda: None


def told(error: BaseException) -> str:
    """In one line. Ending a capture that has failed fails as well, and hides the reason."""
    cause = error.__context__ or error
    line = str(cause).strip().partition("\n")[0][:200]
    return f"capture failed: {type(cause).__name__}: {line}"


def why_not(setting: str, unet: torch.nn.Module) -> str:
    """Why graphs are not tried on `unet`, in words; nothing if they are."""
    device = next(unet.parameters()).device
    if setting == "off":
        return "switched off"
    if device.type != "cuda":
        return f"not on CUDA ({device})"
    if torch.is_autocast_enabled("cuda"):
        return "under autocast, which keeps casts of weights"
    hooked = [name or "the UNet" for name, module in unet.named_modules() if has_hooks(module)]
    return f"hooks on {hooked[0]} would not be called" if hooked else ""


def has_hooks(module: torch.nn.Module) -> bool:
    """Hooks of torch, or of accelerate, whose offloading moves weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or hasattr(module, "_hf_hook")
