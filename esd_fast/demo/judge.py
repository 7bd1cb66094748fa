"""The judge: which object and which style a picture shows, or none of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .world import OBJECT_NAMES, STYLE_NAMES

NONE = "none of these"
LABELS = (*OBJECT_NAMES, NONE)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in each picture of a batch (names of world.OBJECTS or NONE)."""

    objects: list[str]
    styles: list[str]

    def rate(self, concept: str) -> float:
        """The share of pictures in which `concept`, an object or a style, is recognised."""
        names = self.styles if concept in STYLE_NAMES else self.objects
        return sum(n == concept for n in names) / max(1, len(names))


class ConvolutionJudge(nn.Module):
    """A plain strided convolutional network; (B, 3, 64, 64) in -1..1 to two rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, width in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2))
        self.objects = nn.Linear(widths[-1] * 4, len(LABELS))
        self.styles = nn.Linear(widths[-1] * 4, len(STYLE_NAMES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(pictures)
        return self.objects(features), self.styles(features)


class PatchJudge(nn.Module):
    """The second opinion: a small transformer over 8x8 patches, nothing in common but the task."""

    def __init__(self) -> None:
        super().__init__()
        width = 128
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.objects = nn.Linear(width, len(LABELS))
        self.styles = nn.Linear(width, len(STYLE_NAMES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.patches(pictures).flatten(2).transpose(1, 2) + self.positions
        features = self.body(tokens).mean(1)
        return self.objects(features), self.styles(features)


JUDGES: dict[str, type[nn.Module]] = {"judge": ConvolutionJudge, "second-judge": PatchJudge}


def load_judge(folder: Path, name: str = "judge") -> nn.Module:
    judge = JUDGES[name]()
    judge.load_state_dict(
        {k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}
    )
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def recognise(judge: nn.Module, pictures: torch.Tensor) -> Verdict:
    """`pictures` (B, 3, 64, 64) in -1..1."""
    objects, styles = judge(pictures.float())
    return Verdict(
        [LABELS[i] for i in objects.argmax(-1).tolist()],
        [STYLE_NAMES[i] for i in styles.argmax(-1).tolist()],
    )
