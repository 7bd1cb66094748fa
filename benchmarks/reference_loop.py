"""The rivals: ESD as its public scripts train it, on plain diffusers and torch, with nothing of esd_fast.

|                        | reference                    | paper                        | lora (lora_loop.py)          |
|------------------------|------------------------------|------------------------------|------------------------------|
| after                  | esd_sd, its 2026 form        | the paper's diffusers script | LECO                         |
| trains                 | the UNet's own tensors       | the UNet's own tensors       | low-rank adapters            |
| rolls out              | the frozen UNet              | the student                  | the student                  |
| on                     | erase_from, else the concept | the concept                  | erase_from, else the concept |
| scheduler              | the pipeline's               | DDIM                         | DDIM                         |
| guided steps i (of 50) | 0 to 49                      | 1 to 48                      | 1 to 49                      |
| then asked at          | timesteps[i]                 | entry 20i of the 1000 steps  | entry 20i of the 1000 steps  |
| anchor                 | erase_from, else the concept | erase_from, else null        | erase_from, else null        |
| optimizer              | Adam                         | Adam                         | AdamW                        |

    target = anchor - negative_guidance * (noise_pred_concept - noise_pred_null), all of the frozen UNet
    loss   = mean squared error of the student's prediction, in float32

One optimizer step takes one rollout, of which the last latents are used. A seed draws what the
scripts draw from it. Where an original spends more than it has to, the rival does not: prompts are
encoded once (`paper` does it in every step), frozen weights ask for no gradient, and the teacher
is asked once for each prompt, all in one batch (`paper` and LECO pair every question, the student's
too, with the empty prompt at guidance 1: twice the passes, the same numbers).

Trained tensors have the UNet's dtype. The paper's script is float32: give `paper` such a pipeline.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class LoopSettings:
    """The defaults are the reference's own; `OWN_DEFAULTS` has the others'."""

    concept: str
    erase_from: str | None = None
    train_method: str = "esd-x"
    iterations: int = 200
    learning_rate: float = 5e-5
    negative_guidance: float = 2.0
    guidance_scale: float = 3.0
    num_inference_steps: int = 50
    batch_size: int = 1
    resolution: int | None = None
    """Pixels a side; None: the model's own."""
    seed: int = 0


# What each original sets where it differs from LoopSettings. With the null anchor 1.0 pushes as far
# as 2.0 does with the concept's.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "paper": {"learning_rate": 2e-5},
    "lora": {
        "train_method": "esd-all",  # of the attention layers, which alone get adapters
        "iterations": 500,
        "learning_rate": 1e-4,
        "negative_guidance": 1.0,
    },
}


@dataclass(frozen=True)
class LoopResult:
    trained: dict[str, Tensor]
    """Copies on the CPU, by the UNet's state-dict names."""
    unet_passes: int
    """Samples that went forward through the UNet, plus those that went backward."""
    losses: list[float]


def reference(pipeline: Any, settings: LoopSettings, on_step: OnStep | None = None) -> LoopResult:
    """The frozen-rollout script: one UNet, base and student values of its trainable tensors swapped.

    The pipeline's UNet is left edited, and holds the student whenever `on_step(iteration, loss)` is
    called. On a GPU text encoder and VAE are left on the CPU: `pipeline.to(...)` before drawing.
    """
    unet = CountedUNet(pipeline.unet)
    tensors = SwappedTensors(pipeline.unet, settings.train_method)
    prompts = encode_prompts(pipeline, settings)
    put_away(pipeline)
    scheduler = copy.deepcopy(pipeline.scheduler)
    optimizer = torch.optim.Adam(tensors.student.values(), lr=settings.learning_rate)
    draws = random.Random(settings.seed)
    losses: list[float] = []

    for iteration in range(settings.iterations):
        index = draws.randint(0, settings.num_inference_steps - 1)
        noise_seed = draws.randint(0, 2**15)

        tensors.swap_in(tensors.base)
        with torch.no_grad():
            noise = draw_noise(pipeline, settings, torch.Generator().manual_seed(noise_seed))
            latents = roll_out(unet, scheduler, noise, index, prompts, prompts.student, settings)
            timestep = scheduler.timesteps[index]
            latents = scheduler.scale_model_input(latents, timestep)  # forgotten there (Euler)
            target = ask_teacher(unet, latents, timestep, prompts, "concept", settings)

        tensors.swap_in(tensors.student)
        noise_pred_student = unet.predict(latents, timestep, prompts.student)
        losses.append(learn(unet, optimizer, noise_pred_student, target))
        if on_step:
            on_step(iteration, losses[-1])

    return LoopResult(copies(tensors.student), unet.passes, losses)


def paper(pipeline: Any, settings: LoopSettings, on_step: OnStep | None = None) -> LoopResult:
    """The paper's algorithm as its diffusers script has it: the student itself rolls out.

    `pipeline` and `on_step` as for `reference`.
    """
    unet = CountedUNet(pipeline.unet)
    tensors = SwappedTensors(pipeline.unet, settings.train_method)
    prompts = encode_prompts(pipeline, settings)
    put_away(pipeline)
    scheduler = ddim_scheduler(pipeline)
    optimizer = torch.optim.Adam(tensors.student.values(), lr=settings.learning_rate)
    draws = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []

    for iteration in range(settings.iterations):
        index = int(torch.randint(1, settings.num_inference_steps - 1, (1,), generator=draws))

        tensors.swap_in(tensors.student)
        with torch.no_grad():
            noise = draw_noise(pipeline, settings, draws)
            latents = roll_out(unet, scheduler, noise, index, prompts, prompts.concept, settings)
            timestep = training_timestep(scheduler, index, settings, latents.device)
            tensors.swap_in(tensors.base)
            target = ask_teacher(unet, latents, timestep, prompts, "null", settings)

        tensors.swap_in(tensors.student)
        noise_pred_student = unet.predict(latents, timestep, prompts.student)
        losses.append(learn(unet, optimizer, noise_pred_student, target))
        if on_step:
            on_step(iteration, losses[-1])

    return LoopResult(copies(tensors.student), unet.passes, losses)


# --- what the loops share ---------------------------------------------------------------------------


class CountedUNet:
    """The UNet, and how many samples went through it: forward is one pass, backward one more."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.passes = 0

    def predict(self, latents: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        self.passes += len(latents)
        prediction: Tensor = self.unet(
            latents, timestep, encoder_hidden_states=embeddings, return_dict=False
        )[0]
        return prediction

    def backward(self, loss: Tensor, samples: int) -> None:
        self.passes += samples
        loss.backward()


TRAIN_METHODS: dict[str, Callable[[str], bool]] = {
    "esd-x": lambda module: "attn2" in module,
    "esd-x-strict": lambda module: "attn2.to_k" in module or "attn2.to_v" in module,
    "esd-u": lambda module: "attn2" not in module,
    "esd-all": lambda _: True,
    "selfattn": lambda module: "attn1" in module,
}
ALIASES = {
    "xattn": "esd-x",
    "xattn-strict": "esd-x-strict",
    "noxattn": "esd-u",
    "full": "esd-all",
}


def selects(train_method: str) -> Callable[[str], bool]:
    """By module name: is it trained?"""
    method = ALIASES.get(train_method, train_method)
    if method not in TRAIN_METHODS:
        known = ", ".join([*TRAIN_METHODS, *ALIASES])
        raise ValueError(f"train_method is {train_method!r}; the loops know {known}")
    return TRAIN_METHODS[method]


class SwappedTensors:
    """Base and student values of the trainable tensors; the one UNet holds either."""

    def __init__(self, unet: Any, train_method: str) -> None:
        unet.requires_grad_(False)
        self.places = {
            f"{module_name}.{name}": (module, name)
            for module_name, module in unet.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and selects(train_method)(module_name)
            for name, _ in module.named_parameters(recurse=False)
        }
        self.base = {n: getattr(module, name) for n, (module, name) in self.places.items()}
        self.student = {n: nn.Parameter(p.detach().clone()) for n, p in self.base.items()}

    def swap_in(self, values: dict[str, nn.Parameter]) -> None:
        for full_name, (module, name) in self.places.items():
            setattr(module, name, values[full_name])


@dataclass(frozen=True)
class Prompts:
    """Embeddings, (batch, tokens, width) each."""

    null: Tensor
    concept: Tensor
    erase_from: Tensor | None

    @property
    def student(self) -> Tensor:
        """What the student is trained on."""
        return self.concept if self.erase_from is None else self.erase_from


@torch.no_grad()
def encode_prompts(pipeline: Any, settings: LoopSettings) -> Prompts:
    def encode(prompt: str) -> Tensor:
        embeddings: Tensor = pipeline.encode_prompt(
            prompt, pipeline.unet.device, settings.batch_size, do_classifier_free_guidance=False
        )[0]
        return embeddings.to(pipeline.unet.dtype)

    erase_from = None if settings.erase_from is None else encode(settings.erase_from)
    return Prompts(encode(""), encode(settings.concept), erase_from)


def put_away(pipeline: Any) -> None:
    """Text encoder and VAE leave the GPU: training has no use for them."""
    if pipeline.unet.device.type == "cuda":
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
            if module is not None:
                module.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()


def draw_noise(pipeline: Any, settings: LoopSettings, generator: torch.Generator) -> Tensor:
    """(batch, channels, height, width); from the CPU's generator, so the same on every device."""
    config = pipeline.unet.config
    pixels = settings.resolution or config.sample_size * pipeline.vae_scale_factor
    side = pixels // pipeline.vae_scale_factor
    noise = torch.randn((settings.batch_size, config.in_channels, side, side), generator=generator)
    return noise.to(pipeline.unet.device, pipeline.unet.dtype)


def ddim_scheduler(pipeline: Any) -> Any:
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


def roll_out(
    unet: CountedUNet,
    scheduler: Any,
    noise: Tensor,
    steps: int,
    prompts: Prompts,
    condition: Tensor,
    settings: LoopSettings,
) -> Tensor:
    """Latents after `steps` scheduler steps with classifier-free guidance, from pure noise."""
    scheduler.set_timesteps(settings.num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    embeddings = torch.cat([prompts.null, condition])
    for timestep in scheduler.timesteps[:steps]:
        both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        noise_pred_null, noise_pred = unet.predict(both, timestep, embeddings).chunk(2)
        guided = noise_pred_null + settings.guidance_scale * (noise_pred - noise_pred_null)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def training_timestep(
    scheduler: Any, index: int, settings: LoopSettings, device: torch.device
) -> Tensor:
    """Where `index` inference steps end, on the full training schedule: entry 20 * index of 50."""
    steps = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(steps, device=device)
    timestep: Tensor = scheduler.timesteps[steps * index // settings.num_inference_steps]
    return timestep


@torch.no_grad()
def ask_teacher(
    unet: CountedUNet,
    latents: Tensor,
    timestep: Tensor,
    prompts: Prompts,
    anchor: Literal["concept", "null"],
    settings: LoopSettings,
) -> Tensor:
    """The target, from the frozen UNet's predictions: one batch, each prompt once."""
    asked = [prompts.null, prompts.concept]
    if prompts.erase_from is not None:
        asked.append(prompts.erase_from)
    predictions = unet.predict(torch.cat([latents] * len(asked)), timestep, torch.cat(asked))
    noise_pred_null, noise_pred_concept, *rest = predictions.chunk(len(asked))
    if rest:
        (noise_pred_anchor,) = rest
    else:
        noise_pred_anchor = noise_pred_concept if anchor == "concept" else noise_pred_null
    return noise_pred_anchor - settings.negative_guidance * (noise_pred_concept - noise_pred_null)


def learn(
    unet: CountedUNet, optimizer: torch.optim.Optimizer, noise_pred_student: Tensor, target: Tensor
) -> float:
    """One optimizer step; returns the loss."""
    loss = F.mse_loss(noise_pred_student.float(), target.float())
    unet.backward(loss, samples=len(target))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def copies(tensors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
