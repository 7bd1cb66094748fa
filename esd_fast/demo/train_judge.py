"""Training of the two judges, on renders disturbed in the ways that generated pictures are."""

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
    "judge": Schedule(steps=1600, learning_rate=1e-3, ema_decay=0.99),
    "second-judge": Schedule(steps=900, learning_rate=1e-3, ema_decay=0.99),
}
BATCH = 64
LATENT_NOISE = 0.5  # at most; latents have a deviation of about one
STRANGER_SHARE = 0.125  # of a batch: objects outside the world
# of a batch: one hand's drawings in another's technique, or in none. A style is how a thing is drawn:
# a judge that never sees these takes the key whose shape one hand alone draws for that hand's style.
CROSSED_SHARE = 0.4
BARE_SHARE = 0.6  # of these: without technique, about as many as there are with their own
TECHNIQUES = ("pixel", "sepia")  # styles that are more than their hand's drawings
PLAIN = ("cartoon", "flat")  # what the drawings of those hands look like without it


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
    """Pictures (B, 3, P, P), object labels (B,), and styles as shares (B, styles)."""
    scenes = balanced(rng, BATCH)
    styles = [s.style for s in scenes]
    hands, shares = list(styles), [share_of(s) for s in styles]
    for i in range(int(BATCH * CROSSED_SHARE)):
        styles[-1 - i], hands[-1 - i], shares[-1 - i] = crossed(rng)
    indices = [world.STYLE_NAMES.index(s) for s in styles]
    hand_indices = [world.STYLE_NAMES.index(h) for h in hands]
    grounds = [s.background for s in scenes]
    shown = [world.OBJECT_NAMES.index(s.object) for s in scenes]
    pictures = painter.paint(shown, indices, grounds, generator, hand_indices)
    objects = torch.tensor([LABELS.index(s.object) for s in scenes])
    count = int(BATCH * STRANGER_SHARE)
    outside = [rng.randrange(len(strangers.sprites)) for _ in range(count)]
    pictures[:count] = strangers.paint(outside, indices[:count], grounds[:count], generator)
    objects[:count] = LABELS.index(NONE)
    return pictures, objects, torch.tensor(shares)


def crossed(rng: random.Random) -> tuple[str, str, list[float]]:
    """(technique, hand, shares of the styles) where the hand is not the technique's own."""
    if rng.random() < BARE_SHARE:  # painted as a plain style, whose technique is to have none
        return PLAIN[0], rng.choice(TECHNIQUES), share_of(*PLAIN)
    technique = rng.choice(TECHNIQUES)
    hand = rng.choice([h for h in (*PLAIN, *TECHNIQUES) if h != technique])
    return technique, hand, share_of(technique)


def share_of(*styles: str) -> list[float]:
    """Equal shares for `styles`, none for the others."""
    return [(name in styles) / len(styles) for name in world.STYLE_NAMES]


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Encoded, disturbed in latent space, decoded: the grain of generated pictures, whose cells are
    as large as the pixel style's."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mean
        strength = torch.rand(len(pictures), 1, 1, 1, generator=generator) * LATENT_NOISE
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        return vae.decode(latents).sample.float()


def disturbed(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Softer, in other colours and noisy, each picture in its own measure; all shifted a little.

    Generated pictures are: a judge of crisp renders alone takes soft edges for a style.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(len(pictures), *shape, generator=generator)

    side = pictures.shape[-1]
    small = F.interpolate(pictures, scale_factor=0.5, mode="area")
    soft = F.interpolate(small, size=(side, side), mode="bicubic")
    mixed = torch.lerp(pictures, soft, uniform(1, 1, 1))
    gain, offset = 0.8 + 0.4 * uniform(3, 1, 1), 0.3 * (uniform(3, 1, 1) - 0.5)
    noise = torch.randn(pictures.shape, generator=generator)
    noisy = mixed * gain + offset + 0.15 * uniform(1, 1, 1) * noise
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
