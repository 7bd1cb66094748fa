"""What the algorithm needs of a text-to-image model, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is asked with: `encoder_hidden_states` (B, L, D) and a family's further
    inputs, each (B, ...)."""

    encoder_hidden_states: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] | None = None

    def repeated(self, batch: int) -> Conditioning:
        """(1, ...) to (batch, ...)."""
        return Conditioning.joined([self] * batch)

    @staticmethod
    def joined(parts: list[Conditioning]) -> Conditioning:
        added = parts[0].added_cond_kwargs
        return Conditioning(
            torch.cat([p.encoder_hidden_states for p in parts]),
            None
            if added is None
            else {
                k: torch.cat([p.added_cond_kwargs[k] for p in parts])  # type: ignore[index]
                for k in added
            },
        )


@dataclass(frozen=True)
class PromptSet:
    """The encoded prompts of a run: "null", "concept" and perhaps "erase_from", (1, ...) each."""

    by_name: dict[str, Conditioning]

    def __getitem__(self, name: str) -> Conditioning:
        return self.by_name[name]

    def stacked(self, names: tuple[str, ...], batch: int) -> Conditioning:
        """`batch` rows of the first name, then of the second, ..."""
        return Conditioning.joined([self.by_name[n] for n in names for _ in range(batch)])


class Family(Protocol):
    """One model family: a file in models/."""

    name: str

    def claims(self, pipeline_class: str, unet_config: dict[str, Any]) -> bool: ...

    def load(self, source: str, dtype: torch.dtype) -> Any: ...

    def encode(self, pipeline: Any, prompt: str | list[str], resolution: int) -> Conditioning: ...


@dataclass(frozen=True)
class Model:
    """A model ready to work with. `live`: the caller's own pipeline, which stays where it is."""

    family: Family
    pipeline: Any
    source: str
    live: bool

    @property
    def unet(self) -> torch.nn.Module:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return next(self.unet.parameters()).dtype

    @property
    def vae_scale_factor(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    @property
    def native_resolution(self) -> int:
        """Pixels a side that the model was made for."""
        return int(self.pipeline.unet.config.sample_size) * self.vae_scale_factor

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        pixels = resolution or self.native_resolution
        halvings = 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        multiple = self.vae_scale_factor * halvings
        if pixels % multiple:
            raise ValueError(
                f"resolution is {pixels}; this model needs a multiple of {multiple}, "
                f"its own is {self.native_resolution}"
            )
        side = pixels // self.vae_scale_factor
        return int(self.pipeline.unet.config.in_channels), side, side
