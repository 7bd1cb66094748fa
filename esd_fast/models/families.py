"""The families that are known, and which one a model is of."""

from __future__ import annotations

from .base import Described, Family
from .checkpoint import Checkpoint
from .refusals import refuse_by_configuration, refuse_by_keys
from .sd1 import StableDiffusion1
from .sd2 import StableDiffusion2
from .sdxl import StableDiffusionXL

FAMILIES: tuple[Family, ...] = (StableDiffusion1(), StableDiffusion2(), StableDiffusionXL())


def family_of(described: Described) -> Family:
    """By the configurations. Raises ValueError with the reason where ESD does not suit."""
    refuse_by_configuration(described)
    for family in FAMILIES:
        if family.claims(described):
            return family
    name = described.pipeline_class or "this model"
    raise ValueError(f"{name} is of no family known here ({titles()})")


def family_of_file(checkpoint: Checkpoint) -> Family:
    """By the names and shapes of a single file's tensors. Raises ValueError with the reason."""
    try:
        refuse_by_keys(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for family in FAMILIES:
        if family.claims_file(shapes):
            return family
    raise ValueError(
        f"{checkpoint.path} holds a UNet, but the text encoder of none of {titles()}; "
        "give a whole checkpoint"
    )


def titles() -> str:
    return ", ".join(family.title for family in FAMILIES)
