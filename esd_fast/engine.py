"""How a run works the UNet: fast operators in it, what is kept for the backward, and what was done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .accelerate import accelerate, is_accelerated
from .checkpointing import blocks_in_backward, checkpointed
from .config import bytes_of
from .frozen_conv import frozen_convolutions, wants_channels_last
from .kept_projections import kept_projections
from .live import parts_to_place
from .pages import page_out_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import EraseConfig
    from .memory_plan import MemoryPlan
    from .models import Model

# The embedded UNet has 5.7 million. A call through Python each way takes longer there than a
# convolution saves that keeps no input; packed weights would gain 8%, and 38 MiB more of peak.
FEWEST_WEIGHTS = 100_000_000


@dataclass(frozen=True)
class Layout:
    """What was decided of memory, before anything runs."""

    checkpointed: tuple[str, ...]
    """Blocks that run again in the backward."""
    collect_batch_size: int
    why: str


def layout_for(model: Model, config: EraseConfig, names: Sequence[str], resolution: int) -> Layout:
    """By `config.checkpointing` and, where that is "auto", by what fits `config.vram`.

    Raises ValueError where a size was given and nothing fits it.
    """
    if config.checkpointing == "none":
        return Layout((), config.collect_batch_size, "none: asked for")
    if config.checkpointing == "all":
        blocks = tuple(blocks_in_backward(model.unet, names))
        return Layout(blocks, config.collect_batch_size, f"{', '.join(blocks)}: asked for")
    memory = memory_for(model, config.vram)
    if memory is None:
        return Layout((), config.collect_batch_size, f"none: no limit on {model.device.type}")
    return fitting(model, config, resolution, memory)


def memory_for(model: Model, vram: str) -> int | None:
    """Bytes that a run may take of the device, the UNet's weights included; None: no limit."""
    if vram != "auto":
        return bytes_of(vram)
    if model.device.type != "cuda":
        return None
    from .quantized_layers import held_bytes  # what a plain run on the CPU does without

    free, _ = torch.cuda.mem_get_info(model.device)
    # what the allocator holds and does not use is free for us
    idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return free + held_bytes(model.unet) + idle


def fitting(model: Model, config: EraseConfig, resolution: int, memory: int) -> Layout:
    """The fastest choice of memory_plan.py that fits `memory` bytes."""
    plan = plan_of(model, config, resolution, memory)
    found = plan.fitting(memory)
    limit = f"{memory / 2**30:.1f} GiB"
    if found is None:
        if config.vram != "auto":
            raise ValueError(
                f"vram is {config.vram!r}, and the least that this takes is "
                f"{plan.least / 2**30:.1f} GiB; {what_needs_less(plan, memory)}"
            )
        why = f"about {plan.least / 2**30:.1f} GiB wanted, {limit} free: memory may run out"
        warnings.warn(why, stacklevel=2)
        return Layout(plan.choices[-1].checkpointed, 1, why)
    choice, together = found
    blocks = ", ".join(choice.checkpointed) or "none"
    why = f"{blocks}: {choice.total / 2**30:.1f} of {limit} planned"
    return Layout(choice.checkpointed, min(together, config.collect_batch_size), why)


def plan_of(
    model: Model, config: EraseConfig, resolution: int, enough: int | None = None
) -> MemoryPlan:
    from .memory_plan import plan_memory  # not needed where there is no limit

    return plan_memory(
        model.source,
        dict(model.unet.config),  # type: ignore[arg-type]
        config.train_method,
        resolution,
        batch_size=config.samples_a_step,
        dtype=str(model.dtype).removeprefix("torch."),
        prompts=2 if config.erase_from is None else 3,
        vae_scale_factor=model.vae_scale_factor,
        optimizer=config.optimizer,
        clipped=bool(config.max_grad_norm),
        quantize=config.quantize,
        enough=enough,
    )


def what_needs_less(plan: MemoryPlan, memory: int) -> str:
    how = plan.quantized_fitting(memory)
    quantizing = f"; quantize {how!r} would fit" if how else ""
    return (
        "a lower resolution or batch_size, or a train_method of fewer weights, needs less"
        f"{quantizing}"
    )


def least_memory(model: Model, config: EraseConfig) -> int:
    """Bytes that a run takes at least, as counted."""
    return plan_of(model, config, config.resolution or model.native_resolution).least


@contextmanager
def engaged(
    model: Model, layout: Layout, latent_size: tuple[int, int], passes: int | None = None
) -> Iterator[dict[str, str]]:
    """Within: the UNet in its fast form; after: as it was. Gives a line for each thing done or not.
    `passes`: UNet passes to come, where they are known.

    Enter it when `requires_grad` is set.
    """
    unet = model.unet
    others = [p for part in parts_to_place(model.pipeline).values() for p in part.parameters()]
    plain = (p for p in others if type(p) is torch.nn.Parameter and p.device.type == "cpu")
    paged_out = page_out_files(plain)  # others are a library's, and need not have an address
    with ExitStack() as stack:
        if is_accelerated(unet):
            paths = {"accelerate": "the caller's"}
        else:
            paths = stack.enter_context(accelerate(unet, latent_size=latent_size)).paths_taken()
        small = sum(p.numel() for p in unet.parameters()) < FEWEST_WEIGHTS
        if small:
            convolutions = "torch's own: the UNet is small"
        else:
            count = stack.enter_context(frozen_convolutions(unet))
            convolutions = f"{count} save only their weight"
            if wants_channels_last(model.device.type, model.dtype):
                convolutions += ", in channels_last"
        projections = stack.enter_context(kept_projections(unet))
        packing = "no: the UNet is small"
        if not small:
            from .packed_weights import packed_weights  # what a small one does without

            packing = str(stack.enter_context(packed_weights(unet, passes=passes)))
        stack.enter_context(checkpointed(unet, layout.checkpointed))
        yield {
            **paths,
            "attention": attention_path(unet),
            "frozen_convolutions": convolutions,
            "prompt_projections": f"{projections} kept while prompt and weight stay the same",
            "packed_weights": packing,
            "checkpointing": layout.why,
            "other_networks": f"{paged_out / 2**20:.0f} MiB in files, asked out of memory meanwhile",
        }


def attention_path(unet: Any) -> str:
    """Which attention really ran, by the processors that the UNet holds."""
    kinds = sorted({type(p).__name__ for p in unet.attn_processors.values()})
    return ", ".join("torch SDPA" if k == "AttnProcessor2_0" else k for k in kinds)
