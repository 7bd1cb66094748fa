"""Concept inversion: which token embedding makes a model draw what some pictures show?

Textual inversion (Gal et al., ICLR 2023) against an erased model is the attack of Pham et al.
(Circumventing Concept Erasure Methods for Text-to-Image Generative Models, ICLR 2024): the UNet and
the text encoders stay as they are, and one new token is learnt through the ordinary denoising loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from esd_fast.collect import predict_noise
from esd_fast.config import check_count, check_number, refuse
from esd_fast.files import replacing
from esd_fast.live import onloading
from esd_fast.models import Conditioning, Model
from esd_fast.models.text import visiting

from .placeholder import TOKENIZER_OF, Placeholder

SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # of such files


@dataclass(frozen=True)
class InversionConfig:
    """How a token is learnt. A bad value raises ValueError."""

    steps: int = 200
    """Optimizer steps (AdamW, as in diffusers' textual_inversion.py)."""
    batch_size: int = 8
    learning_rate: float = 1e-2
    initializer: str | None = None
    """A word whose embedding the token starts from; None: the mean of all embeddings."""
    seed: int = 0
    """Of pictures, templates, noise and timesteps."""

    def __post_init__(self) -> None:
        check_count("inversion steps", self.steps)
        check_count("inversion batch size", self.batch_size)
        check_number("inversion learning rate", self.learning_rate, above=0.0)


@dataclass(frozen=True)
class LearnedToken:
    """Its embedding for each text encoder ((D,) float32 on the CPU, by name), and the losses."""

    vectors: dict[str, torch.Tensor]
    losses: tuple[float, ...]

    def save(self, path: str | Path, token: str = "<concept>") -> Path:
        """A safetensors file for diffusers' `load_textual_inversion`: of one text encoder under
        `token`, of two as "clip_l" and "clip_g"."""
        from safetensors.torch import save_file

        path = Path(path)
        if len(self.vectors) == 1:
            tensors = {token: next(iter(self.vectors.values()))}
        else:
            tensors = {SDXL_KEYS[name]: v[None] for name, v in self.vectors.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary)
        return path


@onloading
@torch.inference_mode(False)
@torch.enable_grad()
def invert(
    model: Model,
    pictures: np.ndarray,
    templates: Sequence[str],
    placeholder: Placeholder,
    config: InversionConfig | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> LearnedToken:
    """Learn what `placeholder` has to mean for `model` to draw `pictures` (N, H, W, 3) uint8.

    `templates` are prompts with {} where the word goes. `on_step(step, loss)` is told of each step.
    The model is left as it was. Raises ValueError where no picture is given, RuntimeError where the
    loss is no number.
    """
    config = config or InversionConfig()
    pipeline, device = model.pipeline, model.device
    if not len(pictures):
        refuse("pictures", "empty", "one picture or more")
    encoders = [getattr(pipeline, name) for name in placeholder.ids]
    prompts = [template.format(placeholder.word) for template in templates]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    draw = torch.Generator("cpu").manual_seed(config.seed)
    vectors = first_vectors(pipeline, placeholder, config.initializer, device)
    optimizer = torch.optim.AdamW(vectors.values(), lr=config.learning_rate)
    losses = []
    with (
        visiting(device, pipeline.vae, *encoders),
        frozen(model.unet, *encoders),
        placeholder.meaning(pipeline, vectors),
    ):
        latents = EncodedPictures.of(pipeline.vae, pictures, device)
        resolution = latents.mean.shape[-1] * model.vae_scale_factor
        for step in range(config.steps):
            x0 = latents.draw(config.batch_size, draw)
            noise = normal(x0.shape, draw).to(device)
            timesteps = below(scheduler.config.num_train_timesteps, len(x0), draw).to(device)
            chosen = below(len(prompts), len(x0), draw)
            question = model.family.encode_with_gradient(
                pipeline, [prompts[i] for i in chosen.tolist()], resolution
            )
            loss = denoising_loss(model, scheduler, x0, noise, timesteps, question)
            if not loss.isfinite():
                raise RuntimeError(
                    f"concept inversion: the loss is {loss.item()} at step {step} in "
                    f"{str(model.dtype).removeprefix('torch.')}; try dtype float32"
                )
            gradients = torch.autograd.grad(loss, list(vectors.values()))
            for vector, gradient in zip(vectors.values(), gradients, strict=True):
                vector.grad = gradient
            optimizer.step()
            losses.append(loss.item())
            if on_step:
                on_step(step, losses[-1])
    learned = {name: vector.detach().cpu().clone() for name, vector in vectors.items()}
    return LearnedToken(learned, tuple(losses))


def denoising_loss(
    model: Model,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """Mean squared error of the UNet's answer on `latents` (B, C, h, w) with `noise` added at
    `timesteps` (B,): against the noise, or the velocity where the model predicts that."""
    noisy = scheduler.add_noise(latents, noise, timesteps).to(model.dtype)
    predicted = predict_noise(model.unet, noisy, timesteps, conditioning)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return F.mse_loss(predicted.float(), target.float())


@dataclass(frozen=True)
class EncodedPictures:
    """Scaled means and standard deviations of pictures' latents, (N, C, h, w) float32 each."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Any, pictures: np.ndarray, device: torch.device) -> EncodedPictures:
        """`pictures` (N, H, W, 3) uint8, one at a time: a full-size encoder needs gigabytes."""
        weight = next(vae.parameters())
        found = []
        for picture in pictures:
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            found.append(vae.encode(pixels.to(weight)).latent_dist)
        scale = float(vae.config.scaling_factor)
        mean, std = (
            torch.cat([getattr(d, name).float() for d in found]).to(device) * scale
            for name in ("mean", "std")
        )
        return cls(mean, std)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, C, h, w) of random pictures, each drawn from its distribution."""
        chosen = below(len(self.mean), count, generator)
        noise = normal((count, *self.mean.shape[1:]), generator)
        return self.mean[chosen] + self.std[chosen] * noise.to(self.mean.device)


# device and dtype are said: a caller may have set others as torch's defaults


def normal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def below(end: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) whole numbers from 0 to `end`, without it."""
    return torch.randint(0, end, (count,), generator=generator, device="cpu")


def first_vectors(
    pipeline: Any, placeholder: Placeholder, initializer: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """(D,) float32 for each text encoder, with gradients."""
    vectors = {}
    for name in placeholder.ids:
        weight = getattr(pipeline, name).get_input_embeddings().weight.detach()
        if initializer is None:
            vector = weight.float().mean(0)
        else:
            vector = weight[one_token(pipeline, name, initializer)].float()
        vectors[name] = vector.to(device, copy=True).requires_grad_()
    return vectors


def one_token(pipeline: Any, encoder: str, word: str) -> int:
    """Its number for the text encoder of that name. Raises ValueError where it is of several."""
    tokenizer = getattr(pipeline, TOKENIZER_OF[encoder])
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    if len(tokens) != 1:
        refuse("initializer", word, "one token, such as 'object'")
    return int(tokens[0])


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Within: no weight asks for a gradient, so that nothing is kept for one, in eval mode; after:
    as it was."""
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.requires_grad_(False).eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, training in modes:
            part.training = training
