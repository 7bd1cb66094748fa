"""`esd-fast plan`: what an erasure would need of memory, and how to run it on a given card."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from esd_fast.config import Loading
from esd_fast.terminal import tell

from .console import quiet_libraries
from .loading import loading_of

if TYPE_CHECKING:
    from esd_fast.memory_plan import Choice, MemoryPlan


def plan(arguments: argparse.Namespace) -> int:
    """Exit code 0; 1 where nothing fits `--vram`."""
    from esd_fast.config import MOST_AT_A_TIME, bytes_of, check_count, check_resolution
    from esd_fast.parameters import canonical_method, check_method
    from esd_fast.quantize import check_quantize

    check_method(arguments.train_method)
    if arguments.quantize is not None:
        check_quantize(arguments.quantize, arguments.train_method)
    check_count("--batch-size", arguments.batch_size, MOST_AT_A_TIME)
    if arguments.resolution is not None:
        check_resolution("--resolution", arguments.resolution)
    vram = None if arguments.vram is None else bytes_of(arguments.vram)
    loading = loading_of(arguments)
    quiet_libraries()
    from esd_fast.memory_plan import plan_memory

    config, scale = described_unet(arguments.model, loading)
    made = plan_memory(
        arguments.model,
        config,
        canonical_method(arguments.train_method),
        arguments.resolution or int(config["sample_size"]) * scale,
        batch_size=arguments.batch_size * (2 if arguments.preserve else 1),
        dtype=arguments.dtype,
        vae_scale_factor=scale,
        optimizer=arguments.optimizer,
        quantize=arguments.quantize,
    )
    tell(json.dumps(as_json(made, vram), indent=1) if arguments.json else as_text(made, vram))
    return 0 if vram is None or made.fitting(vram) else 1


def described_unet(model: str, loading: Loading | None = None) -> tuple[dict[str, Any], int]:
    """The UNet's configuration and the pixels of a latent's side, of a family's name, a diffusers
    folder, a single file or a hub id. No weight is read."""
    from esd_fast.models import FAMILIES, look_at
    from esd_fast.models.folder import described_at
    from esd_fast.models.single_file import CONFIGS

    packaged = model in [family.name for family in FAMILIES]
    described = (
        described_at(str(CONFIGS / model))
        if packaged
        else look_at(model, loading or Loading()).described
    )
    return dict(described.unet), described.vae_scale_factor


def as_json(made: MemoryPlan, vram: int | None) -> dict[str, Any]:
    from esd_fast.memory_plan import as_dict

    told = as_dict(made)
    if vram is not None:
        fit = made.fitting(vram)
        told["vram"] = vram
        told["fits"] = fit and {
            "choice": made.choices.index(fit[0]),
            "collect_batch_size": fit[1],
            "peak": max(fit[0].total, made.collect[fit[1]], made.whole),
        }
    return told


def as_text(made: MemoryPlan, vram: int | None) -> str:
    held = {
        f"weights{f' ({made.quantize})' if made.quantize else ''}": made.weights,
        "masters and frozen copies": made.masters_and_frozen,
        f"{made.optimizer_name}'s state": made.optimizer,
        "gradients, float32": made.gradients,
        "libraries (an allowance)": made.libraries,
    }
    heading = (
        f"{made.model}, {made.method}, {made.resolution} px, batch {made.batch_size}, "
        f"{made.dtype}: {made.trained / 1e6:.1f} of {made.parameters / 1e6:.1f} million weights "
        "train"
    )
    lines = [
        heading,
        "",
        *(f"{name:<28}{mebibytes(size)}" for name, size in held.items()),
        "",
        *(
            [f"{'peak before and after, weights whole':<40}{mebibytes(made.whole)}"]
            if made.quantize
            else []
        ),
        *(
            f"{f'peak of collecting, {size} at a time':<40}{mebibytes(total)}"
            for size, total in made.collect.items()
        ),
        "",
        f"{'checkpointed blocks':<40}{'activations':>13}{'workspace':>13}{'peak':>13}{'FLOPs':>8}",
        *(
            f"{short:<40}{mebibytes(c.activations)}{mebibytes(c.workspace)}{mebibytes(c.total)}"
            f"{c.flops:>7.2f}x"
            for c, short in zip(made.choices, names_of(made.choices), strict=True)
        ),
    ]
    if vram is not None:
        lines += ["", verdict(made, vram)]
    return "\n".join(lines)


def names_of(choices: tuple[Choice, ...]) -> list[str]:
    """Each row adds one block to the row before."""
    names = []
    for choice in choices:
        if not choice.checkpointed:
            names.append("none" if choice.frozen_convolutions else "none, torch's convolutions")
        else:
            last = choice is choices[-1]
            names.append(f"+ {choice.checkpointed[-1]}" + (" (all)" if last else ""))
    return names


def verdict(made: MemoryPlan, vram: int) -> str:
    fit = made.fitting(vram)
    if fit is None:
        how = made.quantized_fitting(vram)
        return (
            f"does not fit {vram / 2**30:g} GB: the least is {made.least / 2**30:.1f} GiB; a lower "
            "resolution or batch size, or a method that trains fewer weights, needs less"
            + (f"; --quantize {how} would fit" if how else "")
        )
    choice, batch = fit
    blocks = ", ".join(choice.checkpointed) or "nothing"
    peak = max(choice.total, made.collect[batch], made.whole)
    return (
        f"fits {vram / 2**30:g} GB: checkpoint {blocks}; collect {batch} at a time; "
        f"peak {peak / 2**30:.1f} GiB, {choice.flops:.2f} times the FLOPs of a plain step"
    )


def mebibytes(size: int) -> str:
    return f"{size / 2**20:>9,.0f} MiB"
