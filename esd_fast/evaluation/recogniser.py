"""What a recogniser answers, whatever it is made of. An attack or an evaluation takes any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Recogniser(Protocol):
    """Says of pictures which concepts they show."""

    @property
    def told(self) -> dict[str, Any]:
        """What goes beside its numbers: "detector", "version" and "threshold" at least."""

    def knows(self, concept: str) -> bool:
        """Whether it can be asked about `concept` at all."""

    def shows(self, pictures: Sequence[np.ndarray], concepts: Sequence[str]) -> np.ndarray:
        """(N, C) bool: does picture n show concept c? `pictures` are (H, W, 3) uint8 each.

        Raises ValueError for a concept that it does not know.
        """


def refuse_unknown(recogniser: Recogniser, concepts: Sequence[str]) -> None:
    unknown = [c for c in concepts if not recogniser.knows(c)]
    if unknown:
        raise ValueError(f"{recogniser.told['detector']} does not know {', '.join(unknown)}")
