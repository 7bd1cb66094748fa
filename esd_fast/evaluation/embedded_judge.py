"""The embedded model's judges as recognisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import esd_fast
from esd_fast.demo import model_path, world
from esd_fast.demo.judge import load_judge, recognise

from .recogniser import refuse_unknown

BATCH = 256


class EmbeddedJudge:
    """`name`: "judge", or "second-judge", which has another architecture and another seed. It
    knows the objects and styles of the embedded model's world, in pictures of 64 x 64."""

    def __init__(self, name: str = "judge") -> None:
        self.name = name
        self.network = load_judge(model_path(), name)

    @property
    def told(self) -> dict[str, Any]:
        return {
            "detector": f"the embedded model's {self.name.replace('-', ' ')}",
            "version": f"esd-fast {esd_fast.__version__}",
            "threshold": (
                f"the likeliest of {len(world.OBJECTS)} objects and none of these, and of "
                f"{len(world.STYLES)} styles"
            ),
        }

    def knows(self, concept: str) -> bool:
        return concept in world.OBJECTS or concept in world.STYLES

    def shows(self, pictures: Sequence[np.ndarray], concepts: Sequence[str]) -> np.ndarray:
        refuse_unknown(self, concepts)
        named: list[tuple[str, str]] = []
        for first in range(0, len(pictures), BATCH):
            batch = torch.from_numpy(np.stack(pictures[first : first + BATCH]))  # (B, 64, 64, 3)
            verdict = recognise(self.network, batch.permute(0, 3, 1, 2).float() / 127.5 - 1)
            named += zip(verdict.objects, verdict.styles, strict=True)
        rows = [[concept in both for concept in concepts] for both in named]
        return np.array(rows, dtype=bool).reshape(len(pictures), len(concepts))
