"""ESD with low-rank adapters in the manner of LECO; reference_loop.py's table says how it differs.

Adapters sit on the Linear layers of the attention blocks, self and cross (LECO's default); of those
`train_method` takes its own, so "esd-x" means cross-attention alone. They are float32, whatever the
UNet is: AdamW's steps would be lost on bfloat16 ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from reference_loop import (
    CountedUNet,
    LoopResult,
    LoopSettings,
    OnStep,
    ask_teacher,
    ddim_scheduler,
    draw_noise,
    encode_prompts,
    learn,
    put_away,
    roll_out,
    selects,
    training_timestep,
)
from torch import Tensor, nn
from torch.nn import functional as F


def lora(
    pipeline: Any,
    settings: LoopSettings,
    rank: int = 4,
    alpha: float = 1.0,
    on_step: OnStep | None = None,
) -> LoopResult:
    """Trains adapters, then merges them: the pipeline's UNet is left edited, under its own names.

    While `on_step(iteration, loss)` is called the adapters are on: predictions are the student's,
    though the UNet's weights move at the end only. On a GPU, as for `reference`.
    """
    draws = torch.Generator().manual_seed(settings.seed)
    unet = CountedUNet(pipeline.unet)
    adapters = Adapters(pipeline.unet, settings.train_method, rank, alpha, draws)
    prompts = encode_prompts(pipeline, settings)
    put_away(pipeline)
    scheduler = ddim_scheduler(pipeline)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=settings.learning_rate)
    losses: list[float] = []

    for iteration in range(settings.iterations):
        index = int(torch.randint(1, settings.num_inference_steps, (1,), generator=draws))

        with torch.no_grad():
            noise = draw_noise(pipeline, settings, draws)
            latents = roll_out(unet, scheduler, noise, index, prompts, prompts.student, settings)
            timestep = training_timestep(scheduler, index, settings, latents.device)
            adapters.switch(on=False)
            target = ask_teacher(unet, latents, timestep, prompts, "null", settings)
            adapters.switch(on=True)

        noise_pred_student = unet.predict(latents, timestep, prompts.student)
        losses.append(learn(unet, optimizer, noise_pred_student, target))
        if on_step:
            on_step(iteration, losses[-1])

    return LoopResult(adapters.merge(), unet.passes, losses)


class Adapter(nn.Module):
    """Adds alpha / rank * up(down(x)) to what a Linear layer makes of x, as a forward hook of it.

    A hook, so that the layers keep their place and their names in the UNet.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, draws: torch.Generator) -> None:
        super().__init__()
        down = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=draws)
        device = layer.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.scale = alpha / rank
        self.on = True

    def forward(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not self.on:
            return output
        (x,) = inputs
        # the small matrices go to x's dtype, not x to theirs: x is what takes memory
        low = F.linear(x, self.down.to(x.dtype))
        return output + self.scale * F.linear(low, self.up.to(x.dtype))


class Adapters:
    """All adapters of a UNet; nothing else in it asks for gradients."""

    def __init__(
        self, unet: Any, train_method: str, rank: int, alpha: float, draws: torch.Generator
    ) -> None:
        unet.requires_grad_(False)
        self.layers: dict[str, nn.Linear] = {
            f"{block_name}.{name}": layer
            for block_name, block in unet.named_modules()
            if isinstance(block, Attention)
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and selects(train_method)(f"{block_name}.{name}")
        }
        self.adapters = [Adapter(layer, rank, alpha, draws) for layer in self.layers.values()]
        self.hooks = [
            layer.register_forward_hook(adapter)
            for layer, adapter in zip(self.layers.values(), self.adapters, strict=True)
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters()]

    def switch(self, on: bool) -> None:
        for adapter in self.adapters:
            adapter.on = on

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Takes the adapters off and adds them to the weights; copies of those weights, by name."""
        merged: dict[str, Tensor] = {}
        for hook in self.hooks:
            hook.remove()
        for (name, layer), adapter in zip(self.layers.items(), self.adapters, strict=True):
            layer.weight.copy_(layer.weight.float() + adapter.scale * adapter.up @ adapter.down)
            merged[f"{name}.weight"] = layer.weight.detach().to("cpu", copy=True)
        return merged
