"""The work folder, and what one server is made of."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .jobs import JobQueue
from .library import Library
from .limits import Limits, hide_paths
from .models_offered import OfferedModels
from .studio import Studio
from .turns import Turns


@dataclass(frozen=True)
class Place:
    """`work` holds `erasures`, `models` (put yours there, or a link to them) and `uploads`."""

    work: Path
    limits: Limits
    offered: OfferedModels
    library: Library
    studio: Studio
    jobs: JobQueue

    @classmethod
    def at(
        cls,
        work: Path,
        models: Sequence[str] = (),
        limits: Limits | None = None,
        device: str = "auto",
        shared: bool = False,
    ) -> Place:
        """Makes the folders. Raises OSError where they cannot be written to, FileNotFoundError
        where a model is not there."""
        work, limits = work.resolve(), limits or Limits()
        for name in ("erasures", "models", "uploads"):
            (work / name).mkdir(parents=True, exist_ok=True)
        trial = work / f".writable-{secrets.token_hex(4)}"
        trial.write_text("")
        trial.unlink()
        preload()
        offered = OfferedModels.of(work / "models", models)
        library = Library(work / "erasures", offered, limits, shared)
        studio = Studio(offered, library, Turns(), device)
        place = cls(
            work,
            limits,
            offered,
            library,
            studio,
            JobQueue(limits.jobs_each, limits.jobs, lambda error: place.told(error)),
        )
        return place

    def told(self, error: Exception) -> str:
        """An error in one line that names no place of this machine."""
        from esd_fast.cli import told

        return hide_paths(told(error), {str(self.work): "/work", **self.offered.paths()})


def preload() -> None:
    """diffusers imports its parts when they are first asked for, and fails where two threads ask
    at once: here, before there are several."""
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    import esd_fast.esd
    import esd_fast.evaluation.proof
    import esd_fast.export.merge  # noqa: F401
