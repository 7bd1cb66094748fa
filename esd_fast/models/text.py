"""What encoding a prompt needs in every family."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esd_fast.prompts import lost_by_truncation


def say_what_is_lost(tokenizers: Sequence[Any], prompt: str | list[str]) -> None:
    """A warning for each prompt that a tokenizer's limit cuts."""
    for text in [prompt] if isinstance(prompt, str) else prompt:
        lost = max((lost_by_truncation(t, text) for t in tokenizers), key=len)
        if lost:
            warnings.warn(f"the prompt is too long for the model; lost: {lost!r}", stacklevel=3)


@contextmanager
def visiting(device: torch.device, *encoders: torch.nn.Module) -> Iterator[None]:
    """Within: text encoders are on `device`; after: where they were."""
    homes = [(encoder, next(encoder.parameters()).device) for encoder in encoders]
    away = [
        (encoder, home) for encoder, home in homes if home != device
    ]  # `to` takes a millisecond
    try:
        for encoder, _ in away:
            encoder.to(device)
        yield
    finally:
        for encoder, home in away:
            encoder.to(home)
