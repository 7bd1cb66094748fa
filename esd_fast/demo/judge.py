"""The judge: which object and which style a picture shows, or none of these."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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


class ConvolutionJudge(nn.Module):
    """A plain strided convolutional network; (B, 3, 64, 64) in -1..1 to two rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2))
        self.objects = nn.Linear(widths[-1] * 4, len(LABELS))
        self.styles = nn.Linear(widths[-1] * 4, len(STYLE_NAMES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(pictures)
        return self.objects(features), self.styles(features)


class ResidualJudge(nn.Module):
    """The second opinion, built differently: residual, max-pooled, other widths and seed."""

    def __init__(self) -> None:
        super().__init__()
        width = 48
        self.stem = nn.Conv2d(3, width, 5, 2, 2)  # (B, 48, 32, 32)
        self.blocks = nn.ModuleList(ResidualBlock(width * 2**i) for i in range(3))
        self.widen = nn.ModuleList(nn.Conv2d(width * 2**i, width * 2 ** (i + 1), 1) for i in (0, 1))
        features = width * 4 * 16
        self.objects = nn.Linear(features, len(LABELS))
        self.styles = nn.Linear(features, len(STYLE_NAMES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.blocks[0](F.max_pool2d(self.stem(pictures), 2))  # (B, 48, 16, 16)
        for widen, block in zip(self.widen, self.blocks[1:], strict=True):
            x = block(F.max_pool2d(widen(x), 2))
        features = F.dropout(x.flatten(1), 0.3, self.training)  # (B, 192 * 16)
        return self.objects(features), self.styles(features)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, 1, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


JUDGES: dict[str, type[nn.Module]] = {"judge": ConvolutionJudge, "second-judge": ResidualJudge}


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
