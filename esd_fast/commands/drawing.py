"""What the options of commands that draw say."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, check_count, check_number, refuse

from .loading import loading_of

if TYPE_CHECKING:
    from esd_fast.models import Model


def check_drawing(arguments: argparse.Namespace) -> None:
    """Raises ValueError; before anything is loaded."""
    check_count("--num-inference-steps", arguments.num_inference_steps)
    if arguments.batch_size is not None:
        check_count("--batch-size", arguments.batch_size)
    if arguments.guidance_scale is not None:
        check_number("--guidance-scale", arguments.guidance_scale)
    if not 0 <= arguments.seed < 2**63:
        refuse("--seed", arguments.seed, "from 0 and below 2**63")


def place_of(arguments: argparse.Namespace) -> EraseConfig:
    """The settings that loading a model needs, checked by the rules that training uses."""
    return EraseConfig(
        concept="none",
        dtype=arguments.dtype,
        device=arguments.device,
        resolution=arguments.resolution,
        **dataclasses.asdict(loading_of(arguments)),
    )


def drawing_settings(arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What `esd_fast.generate.pictures` takes. Raises ValueError for a size that the model cannot
    draw."""
    from esd_fast.evaluation.proof import GUIDANCE_EMBEDDED, GUIDANCE_OTHERS

    embedded = model.source == "embedded"
    scale = arguments.guidance_scale
    if scale is None:
        scale = GUIDANCE_EMBEDDED if embedded else GUIDANCE_OTHERS
    model.latent_shape(arguments.resolution)
    return {
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": scale,
        "resolution": arguments.resolution,
        "batch_size": arguments.batch_size or (64 if embedded else 1),
    }
