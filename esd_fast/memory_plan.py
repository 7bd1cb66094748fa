"""What an erasure needs of memory, from the UNet's configuration alone.

The fit step and the collecting forward run on the meta device, where tensors have shapes and no
numbers; what autograd keeps and what is alive at the worst moment is counted (memory_count.py).
Not counted: the text encoder, which leaves before anything else comes, and operators' workspace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .checkpointing import blocks_in_backward, blocks_of, checkpointed
from .collect import predict_noise
from .frozen_conv import frozen_convolutions
from .memory_count import FlashOnMeta, LiveBytes, MetaShapes, SavedBytes
from .models.base import Conditioning
from .models.folder_check import loading
from .optimizers import OPTIMIZERS, state_bytes
from .parameters import PART_BYTES, trainable_names
from .quantize import QUANTIZERS
from .quantized_layers import Spared, spared_by

TOKENS = 77  # of CLIP's text encoders
MASTER, GRADIENT = 4, 4  # bytes a trained weight, float32
# An allowance, not measured: the CUDA context, cuBLAS's and cuDNN's workspaces ...
LIBRARIES = 768 * 2**20
# ... and what the caching allocator loses to rounding and gaps, of what comes and goes.
SLACK = 0.1
COLLECT_BATCHES = (4, 2, 1)  # the default first


@dataclass(frozen=True)
class Choice:
    """One way to run the fit step; bytes."""

    checkpointed: tuple[str, ...]
    frozen_convolutions: bool
    activations: int
    """Kept for the backward when the forward is done."""
    workspace: int
    """What the worst moment of forward and backward has beyond `activations`, gradients in the
    UNet's dtype included."""
    flops: float
    """Of one step, recomputing included, as a multiple of the plain step's. Seconds differ."""
    total: int
    """The peak of the fit phase, everything that is held included."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes; what is held throughout, then the moments on top of it."""

    model: str
    method: str
    resolution: int
    batch_size: int
    dtype: str
    parameters: int
    trained: int
    weights: int
    masters_and_frozen: int
    """At most: copies of weights that came from half precision take half (exact_copies.py)."""
    optimizer_name: str
    optimizer: int
    """Its state: two moments of every trained weight."""
    gradients: int
    """Float32, of the masters that the optimizer moves at a time (TrainableSubset.in_parts)."""
    adam_workspace: int
    """What torch's Adam takes on CUDA while it works, were it not fused (a root for each second
    moment, all at once); nothing where it is, nor with 8 bits."""
    libraries: int
    collect: dict[int, int]
    """By `collect_batch_size`, the peak of collecting, everything that is held included."""
    choices: tuple[Choice, ...]
    quantize: str | None = None
    """Of the frozen weights; `weights` are then those that are so."""
    whole: int = 0
    """With quantized weights the peak before and after, when the model is on the device whole:
    beside the first weight that is quantized, and beside the copies that an Erasure reverts to."""
    least_quantized: dict[str, int] = dataclasses.field(default_factory=dict)
    """By format, the least that this takes with frozen weights quantized, where they are not."""

    @property
    def least(self) -> int:
        """The least that this takes."""
        return max(min(c.total for c in self.choices), min(self.collect.values()), self.whole)

    def quantized_fitting(self, memory: int) -> str | None:
        """The first format, of most bits, with which it would fit `memory` bytes."""
        return next((how for how, least in self.least_quantized.items() if least <= memory), None)

    def fitting(self, memory: int) -> tuple[Choice, int] | None:
        """The choice with the fewest FLOPs that fits `memory` bytes, and the largest
        `collect_batch_size` that does; None where nothing fits."""
        choices = [c for c in self.choices if c.total <= memory]
        batches = [size for size, total in self.collect.items() if total <= memory]
        if not choices or not batches or self.whole > memory:
            return None
        return min(choices, key=lambda c: (c.flops, c.total)), max(batches)


@dataclass(frozen=True)
class Step:
    """A fit step as counted."""

    activations: int
    peak: int
    flops: int
    kept_in: dict[str, int]
    """Bytes of the activations by block."""
    flops_of: dict[str, int]
    """Of the forward, by block."""


def plan_memory(
    name: str,
    unet_config: dict[str, Any],
    method: str,
    resolution: int,
    *,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    prompts: int = 2,
    vae_scale_factor: int = 8,
    optimizer: str = "adam",
    fused_adam: bool = True,
    clipped: bool = False,
    quantize: str | None = None,
    enough: int | None = None,
) -> MemoryPlan:
    """Count every choice for the UNet of `unet_config`; takes seconds, and a few megabytes.

    `prompts`: predicted for a sample while collecting (3 with `erase_from`). `fused_adam`: as
    make_optimizer has it on CUDA. `clipped`: to a max_grad_norm, which is of all gradients at once.
    `quantize`: the format of frozen weights, of QUANTIZERS; it changes nothing of what is kept for
    the backward, since those of layers that are frozen keep nothing but their weight anyway.
    `enough`: bytes; what is slower than the first choice within them is not counted. Raises
    ValueError where the method selects nothing, or nothing to quantize is left, or the resolution
    does not suit.
    """
    side = latent_side(unet_config, resolution, vae_scale_factor)
    unet = on_meta(unet_config, getattr(torch, dtype))
    family = "sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd"
    names = trainable_names(unet, method, family)
    sizes = {n: p.numel() for n, p in unet.named_parameters()}
    every, trained = sum(sizes.values()), sum(sizes[n] for n in names)
    itemsize = getattr(torch, dtype).itemsize
    weights = every * itemsize
    masters = trained * (itemsize + (0 if dtype == "float32" else MASTER))
    state, gradients = sum(state_bytes(optimizer, sizes[n]) for n in names), trained * GRADIENT
    parameters_own = trained * itemsize if dtype != "float32" else 0  # there until their turn
    if parameters_own and not clipped and dtype != "float16":  # nor scaled
        largest = GRADIENT * max(sizes[n] for n in names)
        gradients = min(gradients, max(PART_BYTES, largest))
    else:
        parameters_own = 0
    adam_workspace = 0 if fused_adam or OPTIMIZERS[optimizer].bits == 8 else gradients

    spared = {how: found for how in QUANTIZERS if (found := spared_by(how, unet, names))}
    if quantize is not None and quantize not in spared:
        raise ValueError(f"quantize is {quantize!r}, and {method!r} leaves no layer to quantize")

    def total(held: int, passing: int, by: Spared | None = None) -> int:
        if by is not None:
            held, passing = held - by.held, passing + by.largest
        return held + LIBRARIES + round(passing * (1 + SLACK))

    def whole(by: Spared) -> int:
        return weights + LIBRARIES + max(by.first, trained * itemsize)

    chosen = None if quantize is None else spared[quantize]
    for parameter_name, parameter in unet.named_parameters():
        parameter.requires_grad_(parameter_name in set(names))
    shapes = MetaShapes()
    plain = count_step(unet, side, batch_size, lean=False, shapes=shapes)
    choices, least_passing = [], 0
    for blocks, lean, step in chain(
        [((), False, plain)], lean_steps(unet, names, side, batch_size, shapes)
    ):
        # the backward, or Adam at work
        passing = max(step.peak, parameters_own + gradients + adam_workspace)
        least_passing = min(passing, least_passing or passing)
        choices.append(
            Choice(
                checkpointed=blocks,
                frozen_convolutions=lean,
                activations=step.activations,
                workspace=step.peak - step.activations,
                flops=step.flops / plain.flops,
                total=total(weights + masters + state, passing, chosen),
            )
        )
        if enough is not None and lean and choices[-1].total <= enough:
            break
    # no optimizer has state yet where everything is collected first
    collecting = {n: count_forward(unet, side, n * prompts, shapes) for n in COLLECT_BATCHES}
    return MemoryPlan(
        model=name,
        method=method,
        resolution=resolution,
        batch_size=batch_size,
        dtype=dtype,
        parameters=every,
        trained=trained,
        weights=weights - (chosen.held if chosen else 0),
        masters_and_frozen=masters,
        optimizer_name=optimizer,
        optimizer=state,
        gradients=gradients,
        adam_workspace=adam_workspace,
        libraries=LIBRARIES,
        collect={n: total(weights + masters, peak, chosen) for n, peak in collecting.items()},
        choices=tuple(choices),
        quantize=quantize,
        whole=whole(chosen) if chosen else 0,
        least_quantized={}
        if quantize
        else {
            how: max(
                total(weights + masters + state, least_passing, by),
                total(weights + masters, min(collecting.values()), by),
                whole(by),
            )
            for how, by in spared.items()
        },
    )


def lean_steps(
    unet: Any, names: Sequence[str], side: int, batch_size: int, shapes: MetaShapes
) -> Iterator[tuple[tuple[str, ...], bool, Step]]:
    """Frozen convolutions, then with ever more blocks checkpointed: those first that let go of
    the most bytes for a FLOP of running again."""
    none = count_step(unet, side, batch_size, shapes=shapes)
    yield (), True, none
    order = blocks_in_backward(unet, names)
    if not order:
        return
    full = count_step(unet, side, batch_size, order, shapes=shapes)

    def worth(block: str) -> float:
        gained = none.kept_in.get(block, 0) - full.kept_in.get(block, 0)
        return gained / max(1, none.flops_of[block])

    chosen = sorted(order, key=worth, reverse=True)
    for count in range(1, len(chosen)):
        blocks = chosen[:count]
        yield tuple(blocks), True, count_step(unet, side, batch_size, blocks, shapes=shapes)
    yield tuple(chosen), True, full


def count_step(
    unet: Any,
    side: int,
    batch_size: int,
    blocks: Sequence[str] = (),
    lean: bool = True,
    shapes: MetaShapes | None = None,
) -> Step:
    """Forward and backward of the fit step with `blocks` checkpointed; `lean`: with frozen
    convolutions. The loss keeps as much as one prediction, and is left out."""
    saved, live = SavedBytes(unet.parameters()), LiveBytes(unet.parameters(), shapes)
    flops_of: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(checkpointed(unet, blocks))
        if lean:
            stack.enter_context(frozen_convolutions(unet))
        stack.enter_context(by_block(unet, saved, live, flops_of))
        stack.enter_context(live)
        with saved.watching():
            prediction = predict_noise(unet, *inputs_of(unet, side, batch_size))
        kept_in = saved.by_section()
        torch.autograd.backward(prediction, torch.empty_like(prediction))
    for parameter in unet.parameters():
        parameter.grad = None
    return Step(sum(kept_in.values()), live.peak, live.flops, kept_in, flops_of)


@torch.no_grad()
def count_forward(unet: Any, side: int, passes: int, shapes: MetaShapes) -> int:
    """The most that is alive in a forward of `passes` samples that keeps nothing; bytes."""
    live = LiveBytes(unet.parameters(), shapes)
    with live:
        predict_noise(unet, *inputs_of(unet, side, passes))
    return live.peak


@contextmanager
def by_block(
    unet: Any, saved: SavedBytes, live: LiveBytes, flops_of: dict[str, int]
) -> Iterator[None]:
    """Within: saved tensors are told which block saved them, `flops_of` what each block's forward
    took."""

    def entering(name: str) -> None:
        saved.section = name
        flops_of[name] = -live.flops

    def leaving(name: str) -> None:
        saved.section = ""
        flops_of[name] += live.flops

    with ExitStack() as hooks:
        for name, block in blocks_of(unet).items():
            before = block.register_forward_pre_hook(lambda *_, name=name: entering(name))
            after = block.register_forward_hook(lambda *_, name=name: leaving(name))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


def on_meta(unet_config: dict[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    with loading("the model"), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    for module in unet.modules():
        if hasattr(module, "set_processor"):  # attention
            module.forward = with_flash(module.forward)
    # diffusers' own `to` warns of a dtype that goes wrong with real weights
    return torch.nn.Module.to(unet, dtype=dtype).requires_grad_(False).eval()


def with_flash(forward: Callable[..., Any]) -> Callable[..., Any]:
    # on each module: blocks that run again in the backward must find it as well
    def attend(*arguments: Any, **named: Any) -> Any:
        with FlashOnMeta():
            return forward(*arguments, **named)

    return attend


def inputs_of(
    unet: Any, side: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents (B, C, side, side), timesteps (B,) and conditioning of the right shapes, zeros."""
    config, weight = unet.config, next(unet.parameters())

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(batch_size, *shape, dtype=weight.dtype, device=weight.device)

    added = None
    if config.addition_embed_type == "text_time":
        times = 6 * config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - times
        added = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
    conditioning = Conditioning(zeros(TOKENS, config.cross_attention_dim), added)
    return zeros(config.in_channels, side, side), timesteps, conditioning


def latent_side(unet_config: dict[str, Any], resolution: int, vae_scale_factor: int) -> int:
    multiple = vae_scale_factor * 2 ** (len(unet_config["block_out_channels"]) - 1)
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"resolution is {resolution}; this model needs a multiple of {multiple}")
    return resolution // vae_scale_factor


def as_dict(plan: MemoryPlan) -> dict[str, Any]:
    return dataclasses.asdict(plan)
