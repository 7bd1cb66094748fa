"""What the algorithm needs of a text-to-image model, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from esd_fast.live import plain_module
from esd_fast.preserve import GENERAL_PROMPTS


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is asked with: `encoder_hidden_states` (B, L, D) and a family's further
    inputs, each (B, ...)."""

    encoder_hidden_states: torch.Tensor
    added_cond_kwargs: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def repeated(self, batch: int) -> Conditioning:
        """(1, ...) to (batch, ...)."""
        return Conditioning.joined([self] * batch)

    def row(self, number: int) -> Conditioning:
        """One of the B, (1, ...)."""
        return self.map(lambda tensor: tensor[number].unsqueeze(0))

    def rows(self, numbers: torch.Tensor) -> Conditioning:
        """Those of `numbers` (N,), which lie on the same device: (N, ...)."""
        return self.map(lambda tensor: tensor.index_select(0, numbers))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        added = self.added_cond_kwargs
        return Conditioning(
            change(self.encoder_hidden_states),
            None if added is None else {k: change(v) for k, v in added.items()},
        )

    def fill(self, other: Conditioning) -> None:
        """`other`'s numbers into these very tensors."""
        self.encoder_hidden_states.copy_(other.encoder_hidden_states)
        for name, value in (self.added_cond_kwargs or {}).items():
            value.copy_(other.added_cond_kwargs[name])  # type: ignore[index]

    @staticmethod
    def joined(parts: Sequence[Conditioning]) -> Conditioning:
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
    """The encoded prompts of a run: "null" (1, ...), "concept" and perhaps "erase_from" (K, ...),
    a row for each of its K concepts, the last `preserved` of which are to stay."""

    by_name: dict[str, Conditioning]
    preserved: int = 0

    def __getitem__(self, name: str) -> Conditioning:
        return self.by_name[name]

    @property
    def concepts(self) -> int:
        """K."""
        return len(self.by_name["concept"])

    @property
    def erased(self) -> int:
        """Of the K those that are erased, the first ones."""
        return self.concepts - self.preserved

    def stacked(self, names: tuple[str, ...], concepts: Sequence[int]) -> Conditioning:
        """A row for each of `concepts`, by number, of the first name, then of the second, ..."""
        return Conditioning.joined([self.of(n, k) for n in names for k in concepts])

    def of(self, name: str, concept: int) -> Conditioning:
        """(1, ...); the empty prompt is the same for all."""
        prompt = self.by_name[name]
        return prompt if len(prompt) == 1 else prompt.row(concept)


@dataclass(frozen=True)
class Described:
    """What a model's configurations say; no weight has been read."""

    pipeline_class: str
    components: frozenset[str]
    """Names of the components that are there, such as "text_encoder_2"."""
    unet: Mapping[str, Any]
    """The UNet's configuration; empty where there is no UNet. So for the others."""
    scheduler: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def prediction_type(self) -> str | None:
        """Of the UNet: "epsilon", "v_prediction"; None where only its weights can tell."""
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent's side, as diffusers' pipelines count them."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1) if self.vae else 8

    @property
    def native_resolution(self) -> int:
        """Pixels a side that the model was made for."""
        return int(self.unet["sample_size"]) * self.vae_scale_factor

    def changed(self, component: str, **values: Any) -> Described:
        """With other values in one component's configuration."""
        config = {**getattr(self, component), **values}
        return replace(self, **{component: config})  # type: ignore[arg-type]


class Family(Protocol):
    """One model family: a file in models/."""

    name: str
    """Of the family, of its folder in configs/, and in the manifest."""
    title: str
    """For people."""
    pipeline_class: str
    """Of diffusers, by name: it loads and draws."""
    load_options: ClassVar[Mapping[str, Any]]
    """Arguments of the pipeline class that its users would always give."""
    sample_sizes: ClassVar[Mapping[str, int]]
    """Latents a side of the published models, by what they predict. Where there are two, a single
    file that does not say which it is of is asked (prediction.py)."""

    def claims(self, described: Described) -> bool:
        """Whether a model with these configurations is of this family."""
        ...

    def claims_file(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether a file with these tensors, in the original layout, is of this family."""
        ...

    def recipe(self, preset: str, train_method: str) -> Mapping[str, Any]:
        """Settings whose values differ from the preset's own for this family."""
        ...

    def encode(self, pipeline: Any, prompt: str | list[str], resolution: int) -> Conditioning:
        """`prompt`, (B, ...), as the family's pipeline encodes it for pictures of `resolution`
        pixels a side; warns of what a tokenizer's limit cuts off."""
        ...

    def encode_with_gradient(
        self, pipeline: Any, prompt: str | list[str], resolution: int
    ) -> Conditioning:
        """`encode`, for whoever trains what goes into a text encoder."""
        ...


@dataclass(frozen=True)
class Model:
    """A model ready to work with. `live`: the caller's own pipeline, which stays where it is."""

    family: Family
    pipeline: Any
    source: str
    live: bool

    @property
    def unet(self) -> torch.nn.Module:
        return plain_module(self.pipeline.unet)

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

    @property
    def general_prompts(self) -> Sequence[str]:
        """What it draws besides any one concept, the most general first."""
        return general_prompts_of(self.source)

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


def general_prompts_of(source: str) -> Sequence[str]:
    """Of the model that was loaded from `source`."""
    if source != "embedded":
        return GENERAL_PROMPTS
    from esd_fast.demo.world import general_prompts

    return general_prompts()
