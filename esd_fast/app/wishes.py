"""What somebody asks to have erased, and the package's configuration of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esd_fast.config import EraseConfig, Loading, check_number, refuse

from .limits import Limits
from .models_offered import OfferedModels

PACES = {"quick": 0.25, "standard": 1.0, "thorough": 2.0}  # times the recipe's iterations
PROOFS = {
    "measured": "pictures, and how often the concept is recognised (embedded model)",
    "pictures": "pictures",
    "none": "no pictures",
}


@dataclass(frozen=True)
class Wish:
    """As the form has it. None: the recipe's own."""

    concept: str
    """One a line; commas stay in the prompt."""
    model: str = "embedded"
    erase_from: str = ""
    train_method: str | None = None
    preset: str = "fast"
    pace: str = "standard"
    strength: float = 1.0
    """Times the recipe's negative guidance."""
    iterations: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    proof: str = "measured"

    @property
    def concepts(self) -> list[str]:
        return [line for line in map(str.strip, self.concept.splitlines()) if line]

    def check(self, limits: Limits) -> None:
        """Raises ValueError for what is more than a browser may ask for; the rest is checked where
        the configuration is made."""
        limits.check_text("concept", self.concept)
        limits.check_text("erase from", self.erase_from)
        if not self.concepts:
            raise ValueError("say what to erase, such as 'cat' or 'Van Gogh'")
        if len(self.concepts) > limits.concepts:
            raise ValueError(f"{len(self.concepts)} concepts; at most {limits.concepts} are taken")
        if self.pace not in PACES:
            refuse("pace", self.pace, " or ".join(PACES))
        if self.proof not in PROOFS:
            refuse("report", self.proof, " or ".join(PROOFS))
        check_number("strength", self.strength, above=0.0)
        if self.strength > limits.strength:
            refuse("strength", self.strength, f"at most {limits.strength:g}")

    def config(self, offered: OfferedModels, limits: Limits, device: str = "auto") -> EraseConfig:
        """Every value said. Reads the model's configurations, no weight. Raises ValueError, or
        FileNotFoundError where the model is not there."""
        from esd_fast.demo import model_path
        from esd_fast.models import look_at

        self.check(limits)
        source = offered.source_of(self.model)
        concepts = self.concepts
        given: dict[str, Any] = {
            "erase_from": self.erase_from.strip() or None,
            "train_method": self.train_method or None,
            "iterations": self.iterations,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "device": device,
        }
        concept = concepts if len(concepts) > 1 else concepts[0]
        recipe = EraseConfig.from_preset(self.preset, concept, source, **given)
        family = look_at(str(source or model_path()), Loading()).family
        recipe = recipe.with_recipe(family)
        if self.iterations is None:
            given["iterations"] = max(1, round(recipe.iterations * PACES[self.pace]))
        given["negative_guidance"] = recipe.negative_guidance * self.strength
        config = EraseConfig.from_preset(self.preset, concept, source, **given)
        if config.iterations > limits.iterations:
            refuse("iterations", config.iterations, f"at most {limits.iterations}")
        return config.with_recipe(family)
