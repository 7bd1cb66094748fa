"""What a file of tensors is, by their names and shapes, where it is no delta of the UNet at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
TITLES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
# (names of which one is enough, what such a file is, what to do); the first that is found counts
KINDS = (
    (
        r"lora[_.](A|B|up|down|unet|te)|\.lora\.|^lora_|hada_w|lokr_",
        "it is a LoRA, not a delta",
        "load it with pipeline.load_lora_weights, or from the LoRA folder of your program",
    ),
    (
        r"^(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\.",
        "it is a whole model in the original layout",
        "use it as a model; an erasure that was merged into it is in there already",
    ),
    (
        r"^(input_blocks|middle_block|output_blocks)\.",
        "its names are those of the original code base, not of diffusers",
        "convert it to a diffusers UNet first",
    ),
    (
        r"^(emb_params|string_to_param|clip_[lg])$|^<",
        "it is a textual inversion embedding",
        "load it with pipeline.load_textual_inversion",
    ),
    (
        r"^(text_encoder\w*|text_model|te\d?)\.|\.text_model\.",
        "it is of a text encoder, which ESD never changes",
        "look for the file of the UNet",
    ),
    (
        r"^(transformer\.)?(((single|joint)_)?transformer_blocks|(joint|double|single)_blocks)\.",
        "it is for a model without a UNet (Flux, SD 3 and the like)",
        "put it on the model that it was trained on",
    ),
    (
        r"^(controlnet_|input_hint_block|zero_convs)",
        "it is a ControlNet",
        "load it as one; it erases nothing",
    ),
    (
        r"^(_orig_mod|module|unet)\.",
        "its names carry a prefix of what the UNet was wrapped in when it was saved",
        "take the prefix off (the part before the first dot) and save it again",
    ),
)


def what_it_is_for(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """(what the file is, what to do), as clauses of a sentence."""
    fitting = [TITLES.get(name, name) for name, shapes in known_unets() if fits(tensors, shapes)]
    if fitting:
        return f"it is for {' or '.join(fitting)}", "put it on a model of that kind"
    for pattern, kind, advice in KINDS:
        if any(re.search(pattern, name) for name in tensors):
            return kind, advice
    if any(
        ".attn2." in name or name.startswith(("down_blocks.", "up_blocks.")) for name in tensors
    ):
        return (
            "it is for a UNet of another shape",
            "put it on the model that it was trained on",
        )
    return "its names are of no kind known here", "is it the right file?"


def known_unets() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and {parameter: shape} of each published UNet, built without a weight."""
    import torch
    from diffusers import UNet2DConditionModel

    for file in sorted(CONFIGS.rglob("*.json")):
        config = json.loads(file.read_text())
        if config.get("_class_name") != "UNet2DConditionModel":
            continue
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        name = file.relative_to(CONFIGS).parts[0].removesuffix(".json")
        yield name, {name: p.shape for name, p in unet.named_parameters()}


def fits(tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> bool:
    return bool(tensors) and all(shapes.get(name) == t.shape for name, t in tensors.items())
