"""Collected samples as a file, which runs of any train method, learning rate or negative guidance share.

A safetensors file: `samples.NAME` (TeacherSamples), as in the checkpoints of run_state.py, and one
text of metadata, JSON, that says what they were collected with. Only a frozen UNet's samples can
be kept: a student's depend on its training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .bases import model_digest, scheduler_told
from .collect import TeacherSamples
from .erasure import fingerprint
from .preserve import DEFAULT
from .tensor_files import Lazy, open_safetensors, write_tensors

if TYPE_CHECKING:
    import os

    from .config import EraseConfig
    from .models import Model
    from .plan import Plan

FORMAT = 1
SAMPLES_KEY, CHECKSUM_KEY = "esd_fast_samples", "checksum"
PREFIX = "samples."
# settings that decide what is collected, those first that a preset alone decides; the resolution
# and the dtype are the model's, if not said
POLICY = ("rollout", "samples", "schedule")
DECISIVE = (
    *POLICY,
    *("concept", "erase_from", "preserve", "guidance_scale", "num_inference_steps", "seed"),
    "quantize",
)
# settings that decide how much; a run may have others
AMOUNT = ("iterations", "batch_size")


@dataclass(frozen=True)
class StoredSamples:
    """Samples, and what they were collected with."""

    config: dict[str, Any]
    """Of the run that collected them, every setting."""
    decisive: dict[str, Any]
    """What a run has to share with it, by name; see `decisive_of`."""
    model: str
    erased: int
    """Samples of what is erased; those of what is preserved follow."""
    seconds: float
    unet_passes: int
    versions: dict[str, str]
    tensors: Mapping[str, Lazy] = field(default_factory=dict, compare=False)
    path: Path | None = field(default=None, compare=False)
    checksum: str = field(default="", compare=False)

    def __len__(self) -> int:
        return self.tensors[f"{PREFIX}latents"].shape[0]

    @property
    def preserved(self) -> int:
        """Samples of what is preserved."""
        return len(self) - self.erased

    @property
    def place(self) -> str:
        return "the samples" if self.path is None else str(self.path)

    def settings(self, **given: Any) -> dict[str, Any]:
        """Settings of a run on these samples: `given` ones, where they are not None, over those
        that it was collected with."""
        said = {name: value for name, value in given.items() if value is not None}
        names = [
            n for n in (*DECISIVE, *AMOUNT, "preset") if "preset" not in said or n not in POLICY
        ]
        if self.config.get("quantize"):
            names.append("train_method")
        ours = {name: self.config.get(name) for name in names}  # older files lack the newer ones
        ours |= {name: self.decisive[name] for name in ("resolution", "dtype")}
        return ours | said

    def check_settings(self, config: EraseConfig) -> None:
        """Raises ValueError where `config` alone shows that its run would have collected others;
        before a model is loaded."""
        for name, now in settings_of(config).items():
            if name != "preserve" or DEFAULT not in now:  # which the model says
                self.check_one(name, now)
        if config.resolution is not None:
            self.check_one("resolution", config.resolution)

    def check(self, model: Model, config: EraseConfig) -> None:
        """Raises ValueError, in one line, where a run of `config`, which is `for_model`, would have
        collected others."""
        for name, now in decisive_of(model, config).items():
            if name == "weights" and now != self.decisive["weights"]:
                raise ValueError(
                    f"{self.place} is of another model ({self.model}): the weights of its UNet or "
                    f"text encoder are not those of {model.source}"
                )
            self.check_one(name, now)

    def check_one(self, name: str, now: Any) -> None:
        was = self.decisive.get(name)
        if was == now:
            return
        if isinstance(now, dict) and isinstance(was, dict):
            part = next(k for k in sorted(now.keys() | was.keys()) if was.get(k) != now.get(k))
            name, was, now = f"{name} {part}", was.get(part), now.get(part)
        raise ValueError(f"{self.place} was collected with {name} {was!r}, now {now!r}")

    def there_of(self, plan: Plan) -> tuple[int, int]:
        """How many trajectories of `plan` it has, the first ones: of what is erased, and of what is
        preserved. All of a run are of one length."""
        each = plan.erased[0].samples
        erased, preserved = self.erased // each, self.preserved // each
        return min(erased, len(plan.erased)), min(preserved, len(plan.preserved))

    def samples_of(self, plan: Plan, device: torch.device) -> list[TeacherSamples]:
        """Those that are there of `plan`: of what is erased, and of what is preserved."""
        each = plan.erased[0].samples
        erased, preserved = self.there_of(plan)
        whole = samples_in(self.tensors, device)
        assert whole is not None
        return [
            whole[: erased * each],
            whole[self.erased : self.erased + preserved * each],
        ]

    def noted(self, plan: Plan, spared: int) -> dict[str, Any]:
        """For the manifest of a run on it; `spared`: UNet passes that it did not take for it."""
        return {
            "path": None if self.path is None else str(self.path),
            "checksum": self.checksum or None,
            "samples": sum(self.there_of(plan)) * plan.erased[0].samples,
            "unet_passes_spared": spared,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: to `path`, or as samples.safetensors in the folder `path`."""
        target = Path(path)
        if target.suffix != ".safetensors":
            target = target / "samples.safetensors"
        text = json.dumps({"format": FORMAT, **self.told()}, allow_nan=False)
        metadata = {SAMPLES_KEY: text, CHECKSUM_KEY: checksum_of(text, self.tensors)}
        write_tensors(target, self.tensors, metadata)
        return target

    def told(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self) if f.compare]
        return {name: getattr(self, name) for name in names}


def decisive_of(model: Model, config: EraseConfig) -> dict[str, Any]:
    """All that samples follow from, as JSON has it, the model's hash last."""
    kind, told = scheduler_told(model)
    found = {
        **settings_of(config),
        "resolution": config.resolution or model.native_resolution,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": {"class": kind, **told},
        "weights": model_digest(model),
    }
    return as_json(found)


def settings_of(config: EraseConfig) -> dict[str, Any]:
    """What samples follow from of the settings. One that is "last" has its whole batch's noise;
    where frozen weights are quantized the teacher depends on which are frozen."""
    names = [*DECISIVE, "batch_size"] if config.samples == "last" else [*DECISIVE]
    names += ["train_method"] if config.quantize else []
    return as_json({name: getattr(config, name) for name in names})


def as_json(told: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


def holds_samples(file: Path) -> bool:
    """Whether `file` is one of `collect`."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    return SAMPLES_KEY in open_safetensors(file).metadata


def read_samples(path: str | os.PathLike[str]) -> StoredSamples:
    """Raises FileNotFoundError, or ValueError where the file is damaged or none that `collect`
    wrote."""
    file = Path(path)
    if file.is_dir():
        file = file / "samples.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"samples {str(file)!r} do not exist")
    opened = open_safetensors(file)
    text = opened.metadata.get(SAMPLES_KEY)
    if text is None:
        raise ValueError(f"{file} holds no samples; `esd-fast collect` writes them")
    if opened.metadata.get(CHECKSUM_KEY) != checksum_of(text, opened.tensors):
        raise ValueError(f"{file} is damaged: its checksum differs; collect again")
    said = json.loads(text)
    version = said.pop("format", None)
    if version != FORMAT:
        raise ValueError(
            f"{file} has version {version!r} of the format; this esd-fast reads {FORMAT}"
        )
    checksum = opened.metadata[CHECKSUM_KEY]
    return StoredSamples(**said, tensors=opened.tensors, path=file, checksum=checksum)


# --- tensors, as checkpoints have them too ----------------------------------------------------------------


def tensors_of(samples: TeacherSamples) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}{n}": column for n, column in vars(samples).items() if column is not None}


def samples_in(tensors: Mapping[str, Lazy], device: torch.device) -> TeacherSamples | None:
    """None where there are none."""
    if f"{PREFIX}latents" not in tensors:
        return None
    names = [f.name for f in dataclasses.fields(TeacherSamples)]
    held = {n: tensors.get(f"{PREFIX}{n}") for n in names}
    # cloned: into memory that is aligned as torch's own
    return TeacherSamples(
        **{n: None if v is None else v.read().to(device).clone() for n, v in held.items()}  # type: ignore[arg-type]
    )


def checksum_of(text: str, tensors: Mapping[str, Lazy]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(fingerprint({name: tensors[name].read()}).encode())
    return digest.hexdigest()[:16]
