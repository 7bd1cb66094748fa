"""The embedded model's autoencoder: 64x64 pixels to 16x16 latents of four channels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from . import world
from .pictures import PIXELS, Painter
from .training import Schedule, train

SCHEDULE = Schedule(steps=1800, learning_rate=1.5e-3, ema_decay=0.995)
BATCH = 32
KL_WEIGHT, GRADIENT_WEIGHT = 1e-4, 0.5


def new_autoencoder() -> AutoencoderKL:
    channels = (24, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=PIXELS,
        latent_channels=4,
        scaling_factor=1.0,  # fold_statistics makes every channel's deviation 1
    )


def balanced(rng: random.Random, count: int) -> list[world.Scene]:
    """Every object, style and background equally often."""
    names = (world.OBJECT_NAMES, world.STYLE_NAMES, world.BACKGROUND_NAMES)
    draws = [[rng.choice(n) for n in names] for _ in range(count)]
    return [world.Scene(object, style, ground, "") for object, style, ground in draws]


def train_autoencoder(painter: Painter, folder: Path) -> AutoencoderKL:
    def loss_of(vae: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        del step  # the generator is seeded by it
        rng = random.Random(generator.initial_seed())
        pictures = painter.paint_scenes(balanced(rng, BATCH), generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        edges = sum(F.l1_loss(decoded.diff(dim=d), pictures.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(decoded, pictures) + GRADIENT_WEIGHT * edges + KL_WEIGHT * kl

    torch.manual_seed(0)
    vae = new_autoencoder()
    vae = train("autoencoder", vae, loss_of, SCHEDULE, folder)
    fold_statistics(vae, painter)
    return vae


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, painter: Painter, count: int = 1000) -> None:
    """Give each latent channel mean 0 and deviation 1, folded into the 1x1 convolutions."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    means = [
        vae.encode(painter.paint_scenes(balanced(rng, 50), generator)).latent_dist.mean
        for _ in range(count // 50)
    ]
    latents = torch.cat(means)  # (count, 4, 16, 16)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()  # the log variances
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
