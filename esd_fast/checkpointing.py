"""Gradient checkpointing of chosen blocks: less is kept for the backward, more computed twice.

diffusers can only switch all of a UNet. Blocks differ: the outer ones keep most (their pictures
are large) and are cheap to run again; those before the first trained weight keep nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AFTER_BLOCKS = ("conv_norm_out.", "conv_out.")


def blocks_of(unet: Any) -> dict[str, torch.nn.Module]:
    """A diffusers UNet's blocks by name, in the order of the forward."""
    down = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    up = {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    return down | ({} if unet.mid_block is None else {"mid_block": unet.mid_block}) | up


def blocks_in_backward(unet: Any, trainable: Iterable[str]) -> list[str]:
    """The blocks that gradients pass on their way to the parameters named in `trainable`: from
    the first block that holds one of them to the last of all."""
    order = list(blocks_of(unet))

    def place(name: str) -> int:
        if name.startswith(AFTER_BLOCKS):
            return len(order)
        holding = (i for i, block in enumerate(order) if name.startswith(block + "."))
        return next(holding, 0)  # in no block: conv_in and the embeddings, which all blocks follow

    return order[min((place(n) for n in trainable), default=len(order)) :]


@contextmanager
def checkpointed(unet: Any, blocks: Iterable[str]) -> Iterator[None]:
    """Within: the named blocks keep the inputs of their layers alone, and run them again in the
    backward; after: every module as it was.

    For eval mode: dropout would draw anew the second time. The backward belongs within too.
    """
    there = blocks_of(unet)
    chosen = list(blocks)
    for name in chosen:
        if name not in there:
            raise ValueError(f"block {name!r} is unknown; this UNet has {', '.join(there)}")
    modules = [
        m for b in chosen for m in there[b].modules() if hasattr(m, "gradient_checkpointing")
    ]
    before = [(m, {k: m.__dict__[k] for k in SWITCHES if k in m.__dict__}) for m in modules]
    try:
        for module in modules:
            module.__dict__.update(dict(zip(SWITCHES, (True, run_again), strict=True)))
        yield
    finally:
        for module, values in before:
            for name in SWITCHES:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)


# what diffusers' blocks ask; plain attributes, set on these instances only
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")


def run_again(module: torch.nn.Module, *arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    # nothing random runs in eval mode; saving the generator's state would stop a GPU every time
    return checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=False)
