"""What ESD asks the student to predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .collect import TeacherSamples
    from .config import Anchor


@dataclass(frozen=True)
class Objective:
    """target = noise_pred_anchor - negative_guidance * (noise_pred_concept - noise_pred_null)

    Equation 6 of "Erasing Concepts from Diffusion Models" (Gandikota et al., ICCV 2023) with the
    null anchor; the later scripts start from the concept's or `erase_from`'s prediction. The
    arithmetic is done on what the UNet predicts, noise or velocity.
    """

    anchor: Anchor
    negative_guidance: float

    def anchor_prediction(self, samples: TeacherSamples) -> torch.Tensor:
        if self.anchor == "null":
            return samples.noise_pred_null
        if self.anchor == "concept":
            return samples.noise_pred_concept
        assert samples.noise_pred_erase_from is not None, "samples were collected without it"
        return samples.noise_pred_erase_from

    def target(self, samples: TeacherSamples) -> torch.Tensor:
        """(B, C, h, w) float32; for reading only: training never writes it to memory."""
        concept, null = samples.noise_pred_concept.float(), samples.noise_pred_null.float()
        return self.anchor_prediction(samples).float() - self.negative_guidance * (concept - null)
