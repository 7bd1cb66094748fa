"""Optimizers by name, over the float32 masters of the trainable subset."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Of AdamW where none is said: the default of torch, of bitsandbytes, and of the training scripts
# of diffusers and kohya alike.
WEIGHT_DECAY = 1e-2
# torch's fused Adam goes over each tensor once (on one core 2.4 times faster than its plain one)
# and needs no room of its own: on CUDA the plain one takes the roots of all second moments at once.
FUSED_ON = ("cuda", "cpu")
# 8 bits by bitsandbytes: the library of the field's scripts (`--use_8bit_adam`, `AdamW8bit`), with
# kernels for CUDA and a way through torch on the CPU. torchao's runs through torch.compile: as
# exact, but the first step then took 41 s for four shapes on one core, longer than an erasure.
EXTRA = "bitsandbytes"
EIGHT_BIT_ON = ("cuda", "cpu")
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # weights of a tensor; smaller ones stay in 32 bits


@dataclass(frozen=True)
class Kind:
    """What is known of an optimizer before anything is imported."""

    name: str  # of its class, in torch.optim or bitsandbytes.optim
    decays: bool  # takes weight_decay, decoupled
    bits: int  # of each of its two moments


OPTIMIZERS = {
    "adam": Kind("Adam", decays=False, bits=32),
    "adamw": Kind("AdamW", decays=True, bits=32),
    "adam8bit": Kind("Adam8bit", decays=False, bits=8),
    "adamw8bit": Kind("AdamW8bit", decays=True, bits=8),
}


def check_installed(name: str) -> None:
    """Raises ValueError, with what to install, where the library of optimizer `name` is not."""
    if OPTIMIZERS[name].bits == 8 and importlib.util.find_spec(EXTRA) is None:
        raise ValueError(
            f"optimizer is {name!r}, which needs {EXTRA} (the extra of that name): "
            f"pip install {EXTRA}; 'adam' and 'adamw' need nothing more"
        )


def why_not_capturable(name: str) -> str:
    """Why no CUDA graph can hold a step of optimizer `name`; empty where one can."""
    if OPTIMIZERS[name].bits == 32:
        return ""
    return f"{name}: {EXTRA} counts steps on the host, and waits for the card after each tensor"


def make_optimizer(
    name: str,
    masters: Iterable[torch.Tensor],
    learning_rate: float,
    *,
    weight_decay: float | None = None,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer `name` of OPTIMIZERS with its default betas and epsilon, over float32 tensors
    on one device.

    `weight_decay` is AdamW's, None: WEIGHT_DECAY. `capturable`: its step can be part of a CUDA
    graph. No state is allocated before the first step. Raises ValueError where the library is
    missing, does not run on the device, or cannot be captured.
    """
    import torch

    kind, parameters = OPTIMIZERS[name], list(masters)
    device = parameters[0].device.type
    settings: dict[str, Any] = {"lr": learning_rate}
    if kind.decays:
        settings["weight_decay"] = WEIGHT_DECAY if weight_decay is None else weight_decay
    if kind.bits == 32:
        settings["fused"] = device in FUSED_ON or None  # None: as torch sees fit
        return getattr(torch.optim, kind.name)(parameters, **settings, capturable=capturable)
    check_installed(name)
    if capturable:
        raise ValueError(f"capturable: no CUDA graph can hold {why_not_capturable(name)}")
    if device not in EIGHT_BIT_ON:
        raise ValueError(
            f"optimizer is {name!r}, the model is on {device}; it must be on "
            f"{' or '.join(EIGHT_BIT_ON)}"
        )
    import bitsandbytes

    return getattr(bitsandbytes.optim, kind.name)(parameters, **settings)


def described(optimizer: torch.optim.Optimizer) -> str:
    """What really steps, such as "AdamW (fused), weight_decay 0.01"."""
    group = optimizer.param_groups[0]
    if type(optimizer).__module__.startswith(EXTRA):
        how = EXTRA
    elif group.get("fused"):
        how = "fused"
    else:
        how = f"not fused on {group['params'][0].device.type}"
    decay = f", weight_decay {group['weight_decay']:g}" if group["weight_decay"] else ""
    return f"{type(optimizer).__name__} ({how}){decay}"


def state_bytes(name: str, weights: int) -> int:
    """What optimizer `name` keeps of a tensor of so many weights: two moments, and where these
    have 8 bits a float32 scale for every block of each."""
    if OPTIMIZERS[name].bits == 32 or weights < EIGHT_BIT_FROM:
        return 2 * 4 * weights
    return 2 * (weights + 4 * math.ceil(weights / EIGHT_BIT_BLOCK))
