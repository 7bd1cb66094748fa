"""What the options of commands that draw say."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from esd_fast.config import (
    MOST_AT_A_TIME,
    MOST_STEPS,
    EraseConfig,
    check_count,
    check_number,
    check_resolution,
    check_seed,
)

from .loading import loading_of

if TYPE_CHECKING:
    from esd_fast.models import Model

MOST_IMAGES = 100_000  # of a prompt


def check_drawing(arguments: argparse.Namespace) -> None:
    """Raises ValueError; before anything is loaded."""
    check_count("--num-inference-steps", arguments.num_inference_steps, MOST_STEPS)
    if arguments.batch_size is not None:
        check_count("--batch-size", arguments.batch_size, MOST_AT_A_TIME)
    if arguments.guidance_scale is not None:
        check_number("--guidance-scale", arguments.guidance_scale)
    if arguments.resolution is not None:
        check_resolution("--resolution", arguments.resolution)
    check_seed("--seed", arguments.seed)


def check_images(arguments: argparse.Namespace) -> None:
    if arguments.images is not None:
        check_count("--images", arguments.images, MOST_IMAGES)


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
