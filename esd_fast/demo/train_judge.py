"""Training of the two judges, on renders with noise, blur and the autoencoder's own losses."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from . import world
from .autoencoder import balanced
from .judge import JUDGES, LABELS, NONE, recognise
from .pictures import Painter
from .training import Schedule, train

SCHEDULES = {
    "judge": Schedule(steps=700, learning_rate=1e-3, ema_decay=0.99),
    "second-judge": Schedule(steps=900, learning_rate=1e-3, ema_decay=0.99),
}
BATCH = 64
STRANGER_SHARE = 0.125  # of a batch: objects outside the world


def train_judge(
    name: str, painter: Painter, strangers: Painter, vae: AutoencoderKL, folder: Path
) -> nn.Module:
    """`vae` gives every second batch its own decoding losses, which all generated pictures have."""

    def loss_of(judge: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(generator.initial_seed())
        pictures, objects, styles = labelled(painter, strangers, rng, generator)
        if step % 2:
            pictures = through(vae, pictures, generator)
        pictures = disturbed(pictures, generator)
        with torch.autocast("cpu", torch.bfloat16):
            object_logits, style_logits = judge(pictures)
        return F.cross_entropy(object_logits.float(), objects, label_smoothing=0.05) + (
            F.cross_entropy(style_logits.float(), styles, label_smoothing=0.05)
        )

    seed = list(JUDGES).index(name) + 1
    torch.manual_seed(seed)
    return train(name, JUDGES[name](), loss_of, SCHEDULES[name], folder, seed)


def labelled(
    painter: Painter, strangers: Painter, rng: random.Random, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scenes = balanced(rng, BATCH)
    pictures = painter.paint_scenes(scenes, generator)
    objects = torch.tensor([LABELS.index(s.object) for s in scenes])
    styles = [world.STYLE_NAMES.index(s.style) for s in scenes]
    count = int(BATCH * STRANGER_SHARE)
    outside = [rng.randrange(len(strangers.sprites)) for _ in range(count)]
    drawn = strangers.paint(
        outside, styles[:count], [s.background for s in scenes[:count]], generator
    )
    pictures[:count] = drawn
    objects[:count] = LABELS.index(NONE)
    return pictures, objects, torch.tensor(styles)


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Encoded, disturbed a little in latent space, decoded."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mean
        latents = latents + 0.15 * torch.randn(latents.shape, generator=generator)
        return vae.decode(latents).sample.float()


def disturbed(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a strength of its own for every picture, and small shifts."""
    strength = torch.rand(len(pictures), 1, 1, 1, generator=generator) * 0.15
    noisy = pictures + strength * torch.randn(pictures.shape, generator=generator)
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return noisy.roll((down, right), (2, 3)).clamp(-1, 1)


@torch.no_grad()
def accuracy(judge: nn.Module, painter: Painter, count: int = 2200) -> tuple[float, float]:
    """Object and style accuracy on renders of seeds that no training step has used."""
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(99_991)
    objects = styles = 0
    for _ in range(count // 100):
        scenes = balanced(rng, 100)
        verdict = recognise(judge, painter.paint_scenes(scenes, generator))
        objects += sum(a == s.object for a, s in zip(verdict.objects, scenes, strict=True))
        styles += sum(a == s.style for a, s in zip(verdict.styles, scenes, strict=True))
    return objects / count, styles / count
