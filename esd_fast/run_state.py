"""What an unfinished run needs to go on exactly: the format of its checkpoints.

A checkpoint is a safetensors file: `samples.NAME` (TeacherSamples), `masters.PARAMETER`,
`optimizer.PARAMETER.NAME`, and one text of metadata, JSON, with the rest. The rollouts, their noise
and the order of the samples follow from the configuration's seed and are not in it.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .bases import base_digest, digest_of
from .config import EraseConfig, Loading
from .erasure import versions
from .files import check_writable, parsed_json
from .interrupts import held_back
from .stored_samples import CHECKSUM_KEY, checksum_of, samples_in, tensors_of
from .tensor_files import Lazy, open_safetensors, write_tensors

if TYPE_CHECKING:
    import os

    from .collect import TeacherSamples
    from .fit import Fitter
    from .models import Conditioning, Model
    from .parameters import TrainableSubset
    from .plan import Rollout

FORMAT = 1
STATE_KEY = "esd_fast_run_state"
KEPT = 2  # files: should the newest be damaged, there is the one before
# settings that a run may go on with others of: the samples that they were needed for are there,
# they are read off the base, or they are speed and memory alone
FREE = {
    *("given", "device", "vram", "checkpointing", "cuda_graphs", "collect_batch_size"),
    *({field.name for field in dataclasses.fields(Loading)} - {"prediction_type"}),
}


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are whole."""


@dataclass(frozen=True)
class Identity:
    """What two runs share where one can go on with the other's state."""

    config: dict[str, Any]
    model: str
    base: str  # the weights of the UNet and the text encoders, and what the scheduler is
    arguments: str  # of esd.run: what is not in the configuration

    @property
    def told(self) -> dict[str, str]:
        """What processes that train together have to share, by name."""
        decisive = {name: value for name, value in self.config.items() if name not in FREE}
        whole = {"model": self.base, "extra, rollouts or words": self.arguments}
        return {**{name: repr(value) for name, value in decisive.items()}, **whole}

    @classmethod
    def of(
        cls,
        model: Model,
        config: EraseConfig,
        extra: Sequence[Conditioning],
        rollouts: Sequence[Rollout] | None,
        words: Sequence[str] | None,
    ) -> Identity:
        """Before any weight moves or is put away."""
        given: list[Any] = [words, None if rollouts is None else list(map(vars, rollouts))]
        given += [vars(conditioning) for conditioning in extra]
        return cls(
            json.loads(json.dumps(dataclasses.asdict(config))),
            model.source,
            base_digest(model),
            digest_of(given),
        )


@dataclass(frozen=True)
class RunState:
    """A run between two steps."""

    identity: Identity
    losses: list[float]
    """Of the steps that were taken: as many as there are."""
    skipped: int
    skipped_in_a_row: int
    scaler: dict[str, Any]
    """Float16's loss scale, as GradScaler has it."""
    optimizer: dict[str, dict[str, Any]]
    """By parameter: what its optimizer keeps that is no tensor."""
    seconds: dict[str, float]
    """Of each phase and "total", so far."""
    every: int | None
    """Steps between checkpoints."""
    resumed_at: list[int]
    """The steps at which earlier runs stopped and were gone on with."""
    versions: dict[str, str]
    samples_file: dict[str, Any] = field(default_factory=dict)
    """As the manifest has it, where its samples came from one."""
    world_size: int = 1
    """Processes that it ran in. Another number of them rounds otherwise."""
    tensors: Mapping[str, Lazy] = field(default_factory=dict, compare=False)

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def stops(self) -> list[int]:
        """The steps that the run was stopped after, this time included."""
        return [*self.resumed_at, self.step]

    def check(self, ours: Identity, path: str = "the checkpoint") -> None:
        """Raises ValueError, in one line, where a run of `ours` cannot go on from it."""
        theirs = self.identity
        names = sorted((theirs.config.keys() | ours.config.keys()) - FREE)
        for name in names:
            was, now = theirs.config.get(name), ours.config.get(name)
            if was != now:
                raise ValueError(f"{path} is of another config: {name} {was!r}, now {now!r}")
        if theirs.base != ours.base:
            raise ValueError(
                f"{path} is of another base ({theirs.model}): its weights, their dtype or its "
                f"scheduler are not those of {ours.model}"
            )
        if theirs.arguments != ours.arguments:
            raise ValueError(f"{path} is of a run with other extra, rollouts or words")

    def samples(self, device: torch.device) -> TeacherSamples | None:
        """What was collected; None where the run stopped before it had all, or collects as it
        trains."""
        return samples_in(self.tensors, device)

    def restore(self, subset: TrainableSubset, fitter: Fitter) -> None:
        """Masters, the UNet's weights, the optimizer, the loss scale and the losses."""
        with torch.no_grad():
            for name, master in subset.masters.items():
                master.copy_(self.tensors[f"masters.{name}"].read())
        subset.masters_to_parameters()
        whole = fitter.optimizer.state_dict()
        states = [self.state_of(name, master) for name, master in subset.masters.items()]
        whole["state"] = {i: state for i, state in enumerate(states) if state}
        fitter.optimizer.load_state_dict(whole)
        if self.scaler:
            fitter.scaler.load_state_dict(self.scaler)
        fitter.losses.extend(self.losses)
        fitter.skipped, fitter.skipped_in_a_row = self.skipped, self.skipped_in_a_row

    def state_of(self, name: str, master: torch.Tensor) -> dict[str, Any]:
        """What the optimizer keeps of a parameter: laid out as its master, which fused optimizers
        take on trust."""
        state: dict[str, Any] = dict(self.optimizer.get(name, {}))
        prefix = f"optimizer.{name}."
        for key in [key for key in self.tensors if key.startswith(prefix)]:
            tensor = self.tensors[key].read()
            like = master if tensor.shape == master.shape else tensor
            state[key.removeprefix(prefix)] = torch.empty_like(
                like, dtype=tensor.dtype, device="cpu", requires_grad=False
            ).copy_(tensor)
        return state


def state_of(
    identity: Identity,
    samples: TeacherSamples | None,
    subset: TrainableSubset,
    fitter: Fitter,
    seconds: dict[str, float],
    every: int | None,
    resumed_at: list[int],
    samples_file: dict[str, Any],
) -> RunState:
    """The state of a run between two steps. Raises NonFiniteLoss where a master is no number."""
    tensors = {f"masters.{name}": master for name, master in subset.masters.items()}
    fitter.check_finite(subset.masters)
    if samples is not None:
        tensors |= tensors_of(samples)
    plain: dict[str, dict[str, Any]] = {}
    for name, master in subset.masters.items():
        for key, value in fitter.optimizer.state.get(master, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    return RunState(
        identity,
        list(fitter.losses),
        fitter.skipped,
        fitter.skipped_in_a_row,
        fitter.scaler.state_dict(),
        plain,
        seconds,
        every,
        resumed_at,
        versions(),
        {} if samples is None else samples_file,
        fitter.ranks.size,
        {name: Lazy.of(tensor) for name, tensor in tensors.items()},
    )


# --- files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state, and after how many steps; without a folder nowhere, without a
    number only when it is interrupted."""

    folder: Path | None = None
    every: int | None = None

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike[str] | None,
        every: int | None = None,
        resumed: RunState | None = None,
    ) -> Checkpoints:
        """`every`: as before in a resumed run, if not given. Raises ValueError for a bad number,
        or one without a folder, FileExistsError where the folder holds another run's checkpoints,
        CheckpointError where it cannot be written to."""
        if every is None and resumed is not None:
            every = resumed.every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise ValueError(f"checkpoint_every is {every!r}; it must be a whole number from 1")
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every is {every}; it must be a whole number from 1")
        if folder is None:
            if every is not None:
                raise ValueError(f"checkpoint_every is {every} without a folder: give checkpoints")
            return cls()
        path = Path(folder)
        if resumed is None and checkpoints_in(path):
            raise FileExistsError(
                f"{path} holds checkpoints of a run: resume goes on with it, another folder (or "
                "deleting them) starts anew"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_writable(path)
        except OSError as error:
            raise CheckpointError(f"no checkpoint can be written to {path}: {error}") from None
        return cls(path, every)

    def due(self, step: int) -> bool:
        return self.folder is not None and self.every is not None and step % self.every == 0

    def write(self, state: RunState) -> Path:
        """The state as a file of its own. Then all but the KEPT newest go, with what a process
        left that was killed while it wrote.

        Raises CheckpointError where it cannot be written; the files before it stay.
        """
        assert self.folder is not None
        target = self.folder / f"checkpoint-{state.step:08d}.safetensors"
        try:
            if not self.folder.is_dir():  # a mount that is gone: not made anew beneath it
                raise FileNotFoundError("the folder is gone")
            write_state(target, state)
            found = checkpoints_in(self.folder)
            for old in (*found[: found.index(target)], *self.folder.glob("checkpoint-*.part")):
                old.unlink(missing_ok=True)  # newer ones are damaged, or were not gone on with
            for old in found[found.index(target) + KEPT :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            last = [str(path) for path in checkpoints_in(self.folder)[:1]]
            raise CheckpointError(
                f"no checkpoint of step {state.step} in {self.folder}: {error}; the last one is "
                f"{last[0] if last else 'none'}"
            ) from None
        return target


def checkpoints_in(folder: Path) -> list[Path]:
    """The newest, which has taken most steps, first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


def forget_checkpoints(folder: Path) -> None:
    for pattern in ("checkpoint-*.safetensors", "checkpoint-*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_state(target: Path, state: RunState) -> None:
    said = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del said["tensors"]
    said["identity"] = vars(state.identity)
    text = json.dumps({"format": FORMAT, **said}, allow_nan=False)
    metadata = {STATE_KEY: text, CHECKSUM_KEY: checksum_of(text, state.tensors)}
    write_tensors(target, state.tensors, metadata)


def newest_state(path: str | os.PathLike[str]) -> RunState:
    """The state in a file, or the newest whole one of a folder; warns of damaged ones.

    Raises FileNotFoundError where there is none, ValueError where none is whole, or of another
    version of the format.
    """
    place = Path(path)
    found = checkpoints_in(place) if place.is_dir() else [place]
    if not found:
        raise FileNotFoundError(
            f"{place} holds no checkpoint (checkpoint-*.safetensors) to resume from; a finished run "
            "keeps none"
        )
    damaged = []
    for file in found:
        try:
            state = read_state(file)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        for why in damaged:
            warnings.warn(f"{why}; going on from {file.name}", stacklevel=2)
        return state
    raise ValueError("; ".join(damaged))


class DamagedError(ValueError):
    """The file is not what was once written."""


def read_state(file: Path) -> RunState:
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {str(file)!r} does not exist")
    try:
        opened = open_safetensors(file)
        text = opened.metadata[STATE_KEY]
        said = parsed_json(text, "its state")
        version = said.pop("format")
    except KeyError:
        raise DamagedError(f"{file} is no checkpoint of a run") from None
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise DamagedError(f"{file} is damaged: {error}") from None
    if version != FORMAT:
        raise ValueError(
            f"{file} has version {version!r} of the format; this esd-fast reads {FORMAT}"
        )
    if opened.metadata.get(CHECKSUM_KEY) != checksum_of(text, opened.tensors):
        raise DamagedError(f"{file} is damaged: its checksum differs")
    try:
        identity = Identity(**said.pop("identity"))
        state = RunState(identity, **said, tensors=opened.tensors)
    except (KeyError, TypeError):
        raise DamagedError(f"{file} is damaged: it lacks a part of the state") from None
    if wrong := wrong_type(state):
        raise DamagedError(f"{file} is damaged: its {wrong} is of another type")
    return state


def wrong_type(state: RunState) -> str:
    """The first part of a state that cannot be what it is called; a checksum tells only that nobody
    changed the file by accident."""

    def all_are(kinds: Any, values: Any, within: type = list) -> bool:
        if not isinstance(values, within):
            return False
        inner: Any = values.values() if isinstance(values, dict) else values
        return all(isinstance(value, kinds) and not isinstance(value, bool) for value in inner)

    number, phases = (int, float), {"total", "collect", "fit"}
    identity, seconds = state.identity, state.seconds
    right = {
        "config": isinstance(identity.config, dict),
        "identity": all_are(str, [identity.model, identity.base, identity.arguments]),
        "losses": all_are(number, state.losses),
        "skipped": all_are(int, [state.skipped, state.skipped_in_a_row]),
        "scaler": isinstance(state.scaler, dict),
        "optimizer": all_are(dict, state.optimizer, dict),
        "seconds": all_are(number, seconds, dict) and seconds.keys() >= phases,
        "every": state.every is None or all_are(int, [state.every]),
        "resumed_at": all_are(int, state.resumed_at),
        "versions": all_are(str, state.versions, dict),
        "world_size": all_are(int, [state.world_size]),
    }
    return next((name for name, fine in right.items() if not fine), "")


def config_in(state: RunState) -> EraseConfig:
    """The configuration that a state's run has."""
    return EraseConfig.recorded(state.identity.config, "the checkpoint")


@dataclass
class Keeper:
    """Takes the state of one run up, and puts it down where and when its checkpoints say."""

    checkpoints: Checkpoints
    identity: Identity
    resume: RunState | None
    subset: TrainableSubset
    fitter: Fitter
    started: float  # time.perf_counter()
    seconds: dict[str, float]  # of each phase, as they pass
    samples_file: dict[str, Any]  # of the manifest
    samples: TeacherSamples | None = None
    begun: bool = False

    def restored(self) -> TeacherSamples | None:
        """All as it was at the checkpoint; the samples, where it has them."""
        with held_back():  # half of a state must not be written as a whole one
            if self.resume is not None:
                self.resume.restore(self.subset, self.fitter)
                self.seconds.update({phase: self.resume.seconds[phase] for phase in self.seconds})
                device = next(self.fitter.unet.parameters()).device
                self.samples = self.resume.samples(device)
                if self.samples is not None:
                    self.samples_file.clear()
                    self.samples_file.update(self.resume.samples_file)
            self.begun = True
        return self.samples

    def collected(self, samples: TeacherSamples) -> None:
        """Half of the work, and more: kept where steps are."""
        self.samples = samples
        if self.checkpoints.due(0):
            self.write()

    def stepped(self) -> None:
        if self.checkpoints.due(len(self.fitter.losses)):
            self.write()

    def interrupted(self) -> Path | None:
        """The file, where there is a folder for it. One that cannot be written is only warned of:
        the work so far is handed out all the same."""
        if self.checkpoints.folder is None or not self.begun:
            return None
        try:
            return self.write()
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    def write(self) -> Path:
        stops = [] if self.resume is None else self.resume.stops
        passed = {"total": time.perf_counter() - self.started, **self.seconds}
        state = state_of(
            *(self.identity, self.samples, self.subset, self.fitter),
            *(passed, self.checkpoints.every, stops, self.samples_file),
        )
        return self.checkpoints.write(state)
