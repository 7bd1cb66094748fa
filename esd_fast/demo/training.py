"""The one training loop of the builder: cosine decay, EMA, resumable, reproducible."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one stage trains."""

    steps: int
    learning_rate: float
    warmup: int = 50
    weight_decay: float = 0.01
    ema_decay: float = 0.0  # 0: the last weights are the result
    checkpoint_every: int = 200


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, int, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    seed: int = 0,
) -> nn.Module:
    """Train `model` and return its EMA (or itself), in eval mode.

    `loss_of(model, step, generator)` draws its batch from the generator, which is seeded by the
    step: a run that was stopped and resumed sees the batches that an unbroken one sees.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, schedule))
    average = copy.deepcopy(model).requires_grad_(False) if schedule.ema_decay else model
    checkpoint, start = folder / f"{name}.checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        rate.load_state_dict(saved["rate"])
        start = saved["step"]
    model.train()
    bar = tqdm(range(start, schedule.steps), desc=name, initial=start, total=schedule.steps)
    smooth = math.nan
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_of(model, step, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        if schedule.ema_decay:
            follow(average, model, min(schedule.ema_decay, (step + 1) / (step + 10)))
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % schedule.checkpoint_every == 0:
            state: dict[str, Any] = {
                "model": model,
                "average": average,
                "optimizer": optimizer,
                "rate": rate,
            }
            save_atomically(
                {k: v.state_dict() for k, v in state.items()} | {"step": step + 1}, checkpoint
            )
    return average.eval().requires_grad_(False)


def cosine(step: int, schedule: Schedule) -> float:
    warm = min(1.0, (step + 1) / schedule.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / schedule.steps)))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    ours: list[torch.Tensor] = list(average.parameters())
    theirs: list[torch.Tensor] = list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mean, now in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(now)


def save_atomically(state: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)
