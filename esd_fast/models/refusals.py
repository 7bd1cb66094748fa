"""Models that cannot be erased from here, by name and with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .base import Described

# UNets that are given more than noise, by the channels that they take
WIDER = {
    9: "an inpainting model (noise, a masked picture and the mask)",
    8: "a model that edits a picture by instruction (noise and the picture)",
    7: "an upscaler (noise and a small picture)",
    5: "a model guided by depth (noise and a depth map)",
}
PLAIN_MODEL = "ESD needs a plain text-to-image model; the base that it was made from would do"
TRANSFORMER = (
    "a diffusion transformer (as SD3, Flux and PixArt are); there is no UNet whose "
    "cross-attention could be trained here"
)
REFINER = (
    "the SDXL refiner: it only finishes pictures of the base model, so the concept has to be "
    "erased from SDXL base"
)
DISTILLED = (
    "this UNet embeds its guidance (a turbo or LCM distillation): it has no prediction without "
    "guidance to push away from; erase from the model that it was distilled from"
)


def refuse_by_configuration(described: Described) -> None:
    """ValueError for a known kind of model that ESD does not suit."""
    unet, name = described.unet, described.pipeline_class or "this model"
    if not unet:
        if "transformer" in described.components:
            raise ValueError(f"{name} is {TRANSFORMER}")
        raise ValueError(f"{name} has no UNet; it is of no family known here")
    refuse_channels(unet.get("in_channels"), unet.get("out_channels"))
    if unet.get("time_cond_proj_dim"):
        raise ValueError(DISTILLED)
    extra = unet.get("encoder_hid_dim_type") or unet.get("class_embed_type")
    if extra or unet.get("num_class_embeds"):
        raise ValueError(
            f"this UNet is asked with more than text ({extra or 'a class or a noise level'}), as "
            f"unCLIP models and upscalers are; {PLAIN_MODEL}"
        )
    xl = unet.get("addition_embed_type") == "text_time"
    if (
        xl
        and "text_encoder_2" in described.components
        and "text_encoder" not in described.components
    ):
        raise ValueError(f"{name} is {REFINER}")


def refuse_channels(taken: Any, given: Any) -> None:
    if taken != given:
        kind = WIDER.get(taken, "no plain text-to-image model")
        raise ValueError(
            f"this UNet takes {taken} channels and gives {given}: {kind}; {PLAIN_MODEL}"
        )


# What else a file may be, by the beginning of a tensor's name; the first that is found is told.
OTHER_FILES = {
    "lora_": "a LoRA, not a model; give the model, and merge the LoRA into it first if it is wanted",
    "control_model.": "a ControlNet",
    "double_blocks.": f"Flux or a kin of it, {TRANSFORMER}",
    "model.diffusion_model.double_blocks.": f"Flux or a kin of it, {TRANSFORMER}",
    "joint_blocks.": f"Stable Diffusion 3, {TRANSFORMER}",
    "model.diffusion_model.joint_blocks.": f"Stable Diffusion 3, {TRANSFORMER}",
    "edm_mean": "Playground v2.5, whose noise levels are those of EDM; give its diffusers folder",
    "down_blocks.": "a UNet, or an erasure, under diffusers' names, without text encoder and VAE; "
    "give a diffusers folder, or a whole checkpoint in the original layout",
    "mid_block.": "part of a UNet under diffusers' names, such as an erasure; give the model itself",
    "up_blocks.": "part of a UNet under diffusers' names, such as an erasure; give the model itself",
    "decoder.": "a VAE",
    "emb_params": "a textual inversion",
}


def refuse_by_keys(tensors: Mapping[str, Any]) -> None:
    """ValueError for a file that holds no model of these families, by its tensors' names and
    shapes."""
    names = tensors.keys()
    for beginning, what in OTHER_FILES.items():
        if has(names, beginning):
            raise ValueError(f"the file holds {what}")
    if not has(names, "model.diffusion_model.input_blocks."):
        if has(names, "model.diffusion_model."):
            raise ValueError(f"the file holds {named_by_diffusers(tensors)}, {TRANSFORMER}")
        some = ", ".join(list(names)[:3]) or "none"
        raise ValueError(
            "the file holds no UNet in the original layout (tensors model.diffusion_model.*); "
            f"its {len(names)} tensors begin with {some}"
        )
    if "model.diffusion_model.time_embed.cond_proj.weight" in names:
        raise ValueError(DISTILLED)
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4:
        refuse_channels(first.shape[1], 4)
    if has(names, "conditioner.embedders.0.model."):
        raise ValueError(f"the file holds {REFINER}")


def has(names: Iterable[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)


def named_by_diffusers(tensors: Mapping[str, Any]) -> str:
    """What diffusers takes the file for."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(dict(tensors))
    except (AttributeError, KeyError, IndexError, ValueError):
        kind = "v1"
    return "an unknown model" if kind == "v1" else f"{kind} (as diffusers calls it)"  # its default
