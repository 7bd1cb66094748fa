"""A model at hand for questions and pictures: the last one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .library import Entry, Library
from .models_offered import OfferedModels
from .turns import Turns

if TYPE_CHECKING:
    import numpy as np

    from esd_fast.erasure import Erasure
    from esd_fast.models import Model

ORIGINALS = 32  # pictures of the model as it is that are remembered


@dataclass(frozen=True)
class Scene:
    """What is drawn, twice from the same noise: `seed`, `seed` + 1, ... for each picture."""

    model: str
    prompt: str
    seed: int = 0
    images: int = 1
    num_inference_steps: int = 25
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class Pair:
    """(H, W, 3) uint8 each, in the order of the seeds."""

    original: list[np.ndarray]
    erased: list[np.ndarray]
    notes: tuple[str, ...] = ()


class Studio:
    """Holds one pipeline of its own, never one that trains; whoever uses it has the turn."""

    def __init__(
        self, offered: OfferedModels, library: Library, turns: Turns, device: str = "auto"
    ) -> None:
        self.offered, self.library, self.turns, self.device = offered, library, turns, device
        self.label: str | None = None
        self.model: Model | None = None
        self.merged: tuple[tuple[str, ...], Erasure, tuple[str, ...]] | None = None
        self.originals: dict[Scene, list[np.ndarray]] = {}

    def loaded(self, label: str, **settings: Any) -> Model:
        """A fresh model, which the caller may change; its source is the label, not the place."""
        from esd_fast.config import EraseConfig
        from esd_fast.models import load_model

        source = self.offered.source_of(label)
        config = EraseConfig(concept="none", device=self.device, **settings)
        return replace(load_model(source, config), source=label)

    def at_hand(self, label: str) -> Model:
        """The one that stays here, as its files have it."""
        if self.model is None or self.label != label:
            self.forget()
            self.model, self.label = self.loaded(label), label
        return self.model

    def forget(self) -> None:
        """Its memory may be needed."""
        self.model = self.label = self.merged = None
        self.originals.clear()

    def draw(
        self, scene: Scene, keys: Sequence[str], strength: float, owner: str, other_base: bool
    ) -> Pair:
        """Without and with the erasures `keys` at `strength` (0: original, 1: erased). Raises
        ValueError where one does not fit the model."""
        entries = [self.library.get(key, owner) for key in keys]
        with self.turns.turn():
            model = self.at_hand(scene.model)
            merged, notes = self.stacked(model, entries, other_base)
            if scene not in self.originals:
                while len(self.originals) >= ORIGINALS:
                    del self.originals[next(iter(self.originals))]
                self.originals[scene] = drawn(model, scene)
            original = self.originals[scene]
            if merged is None or strength == 0:
                return Pair(original, original, notes)
            merged.apply(model.pipeline, strength)
            try:
                return Pair(original, drawn(model, scene), notes)
            finally:
                merged.revert(model.pipeline)

    def stacked(
        self, model: Model, entries: Sequence[Entry], other_base: bool
    ) -> tuple[Erasure | None, tuple[str, ...]]:
        """Several as one, and what is to be known of it. The last one is kept: a slider moves
        often, the choice seldom."""
        if not entries:
            return None, ()
        keys = (*(entry.key for entry in entries), str(other_base))
        if self.merged is None or self.merged[0] != keys:
            from esd_fast.erasure import load
            from esd_fast.export import merged_erasure
            from esd_fast.export.base import open_base
            from esd_fast.export.merge import merge

            base = replace(open_base(model.pipeline), source=model.source)
            erasures = [load(entry.folder) for entry in entries]
            merged = merge(erasures, base, allow_other_base=other_base)
            self.merged = keys, merged_erasure(merged), tuple(merged.notes)
        return self.merged[1:]


def drawn(model: Model, scene: Scene) -> list[np.ndarray]:
    from esd_fast.evaluation.proof import at_home
    from esd_fast.generate import Shot, pictures

    shots = [Shot(scene.prompt, scene.seed + i) for i in range(scene.images)]
    with at_home(model.pipeline):
        return list(
            pictures(
                model.pipeline,
                shots,
                num_inference_steps=scene.num_inference_steps,
                guidance_scale=scene.guidance_scale,
                batch_size=len(shots) if model.source == "embedded" else 1,
            )
        )
