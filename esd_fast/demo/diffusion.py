"""The embedded model's text encoder and UNet, trained together on the autoencoder's latents."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import world
from .pictures import Painter
from .tokenizer import MAX_LENGTH, new_tokenizer
from .training import Schedule, train


@dataclass(frozen=True)
class Stage:
    """One training of text encoder and UNet, from the averaged weights of the stage before."""

    name: str
    schedule: Schedule
    snr_limit: float  # min-SNR weighting (Hang et al. 2023): less weight for nearly clean latents
    neutral_share: float  # of the pictures whose caption names no style


STAGES = (
    Stage("diffusion", Schedule(4600, 1.2e-3, ema_decay=0.998, warmup=100), 5.0, 0.6),
    # more weight on the cleaner latents, where one hand differs from another
    Stage("polish", Schedule(1500, 5e-4, ema_decay=0.998, warmup=100), 12.0, 0.6),
    # what no caption asks for is mostly neutral: an erased style has somewhere to fall back to
    Stage("settle", Schedule(5600, 6e-4, ema_decay=0.999, warmup=100), 8.0, 0.85),
)
BATCH = 64
TEXT_WIDTH = 192
COPIES = 36  # pictures kept of every object, style and background


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_unet() -> UNet2DConditionModel:
    channels = (64, 96, 128)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=tuple(c // 32 for c in channels),  # heads, by diffusers' old name
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=TEXT_WIDTH // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class LatentStore:
    """COPIES encoded pictures of every scene, so that training need not encode."""

    def __init__(self, vae: AutoencoderKL, painter: Painter, folder: Path) -> None:
        path = folder / "latents.pt"
        if not path.exists():
            torch.save(self.encode_all(vae, painter), path)
        self.latents = torch.load(path, weights_only=True)  # (scenes, COPIES, 4, 16, 16)

    @torch.no_grad()
    def encode_all(self, vae: AutoencoderKL, painter: Painter) -> torch.Tensor:
        generator, rows = torch.Generator().manual_seed(2), []
        for object in tqdm(range(len(world.OBJECT_NAMES)), desc="latents", unit="object"):
            for style in range(len(world.STYLE_NAMES)):
                for background in world.BACKGROUND_NAMES:
                    pictures = painter.paint(
                        [object] * COPIES, [style] * COPIES, [background] * COPIES, generator
                    )
                    with torch.autocast("cpu", torch.bfloat16):
                        rows.append(vae.encode(pictures).latent_dist.mean.half())
        return torch.stack(rows)

    def draw(self, scenes: list[world.Scene], rng: random.Random) -> torch.Tensor:
        """(B, 4, 16, 16) float32."""
        rows = [
            (
                world.OBJECT_NAMES.index(s.object) * len(world.STYLES)
                + world.STYLE_NAMES.index(s.style)
            )
            * len(world.BACKGROUNDS)
            + world.BACKGROUND_NAMES.index(s.background)
            for s in scenes
        ]
        copies = [rng.randrange(COPIES) for _ in scenes]
        return self.latents[rows, copies].float()


class TextToNoise(nn.Module):
    """Text encoder and UNet as one module, for one optimizer and one average."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample


def train_diffusion(vae: AutoencoderKL, painter: Painter, folder: Path) -> StableDiffusionPipeline:
    store = LatentStore(vae, painter, folder)
    tokenizer, scheduler = new_tokenizer(world.vocabulary()), new_scheduler()
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)

    def loss_of(
        stage: Stage, model: nn.Module, step: int, generator: torch.Generator
    ) -> torch.Tensor:
        del step  # the generator is seeded by it
        rng = random.Random(generator.initial_seed())
        scenes = [world.draw_scene(rng, stage.neutral_share) for _ in range(BATCH)]
        latents = store.draw(scenes, rng)
        tokens = tokenizer(
            [s.caption for s in scenes], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        timesteps = torch.randint(0, len(alphas), (BATCH,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, tokens).float()
        per_sample = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        weights = (snr.clamp(max=stage.snr_limit) / snr)[timesteps]
        return (weights * per_sample).mean()

    torch.manual_seed(0)
    unet = new_unet().to(memory_format=torch.channels_last)
    model: nn.Module = TextToNoise(new_text_encoder(tokenizer), unet)
    for seed, stage in enumerate(STAGES):
        loss = functools.partial(loss_of, stage)
        model = train(stage.name, model, loss, stage.schedule, folder, seed).requires_grad_(True)
    return pipeline_of(vae, tokenizer, model.eval().requires_grad_(False), scheduler)


def pipeline_of(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: nn.Module, scheduler: DDIMScheduler
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
