"""Names (and the few reshaped tensors) of Stable Diffusion's original single files.

diffusers reads that layout and has no writer of it. Sources: CompVis' latent-diffusion and
Stability's generative-models, whose modules the names are; diffusers.loaders.single_file_utils
reads them back. Names here are those within a component; PREFIXES says where it sits in a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from esd_fast.tensor_files import Lazy

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_SD1, OPENCLIP_SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_SDXL, OPENCLIP_SDXL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_names(names: list[str]) -> dict[str, str]:
    """diffusers' name -> the original one, for every name of one whole UNet.

    Raises ValueError for a UNet with parts that the original layout has no place for.
    """
    layers = 1 + max(
        (int(m[1]) for n in names if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", n))),
        default=0,
    )
    attended = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    return {name: unet_name(name, layers, attended) for name in names}


def unet_name(name: str, layers: int, attended: set[str]) -> str:
    """`layers`: ResNets of a down block; `attended`: numbers of the up blocks with attention."""
    module, _, parameter = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{parameter}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        place = 2 * index if kind == "resnets" else 2 * index + 1  # they take turns
        return f"middle_block.{place}.{inner(kind, rest)}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind in ("resnets", "attentions"):
            # input block 0 is conv_in, and a downsampler is a block of its own; output blocks
            # hold one layer more, and the upsampler with it
            place = block * (layers + 1) + index + (1 if side == "down" else 0)
            blocks = "input_blocks" if side == "down" else "output_blocks"
            return f"{blocks}.{place}.{0 if kind == 'resnets' else 1}.{inner(kind, rest)}"
        if kind == "downsamplers" and rest.startswith("conv."):
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers" and rest.startswith("conv."):
            place = (block + 1) * (layers + 1) - 1
            return f"output_blocks.{place}.{2 if match[2] in attended else 1}.{rest}"
    raise ValueError(f"{name} has no place in Stable Diffusion's original layout")


def inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    module, _, parameter = rest.rpartition(".")
    if module not in RESNET:
        raise ValueError(f"a ResNet's {rest} has no place in Stable Diffusion's original layout")
    return f"{RESNET[module]}.{parameter}"


# ------------------------------------------------------------------------------- autoencoder

# diffusers' present names and those of its first releases, which older folders hold
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def vae_original(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A diffusers AutoencoderKL's tensors under their original names."""
    ups = 1 + max(
        (int(m[1]) for n in tensors if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", n))),
        default=0,
    )
    return {
        vae_name(name, ups): as_convolution(tensor)
        if ".attentions." in name and len(tensor.shape) == 2
        else tensor
        for name, tensor in tensors.items()
    }


def vae_name(name: str, ups: int) -> str:
    """`ups`: how many up blocks the decoder has; the original counts them from the other end."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    side, _, rest = name.partition(".")
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest):
        return f"{side}.mid.attn_1.{VAE_ATTENTION[match[1]]}.{match[2]}"
    rest = re.sub(r"^mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.resnets", r"down.\1.block", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", rest)
    rest = re.sub(
        r"^up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
        lambda m: f"up.{ups - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
        rest,
    )
    rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "_blocks." in rest:
        raise ValueError(f"{name} has no place in Stable Diffusion's original layout")
    return f"{side}.{rest}"


def as_convolution(tensor: Lazy) -> Lazy:
    """(C, C) as the 1x1 kernel (C, C, 1, 1)."""
    return Lazy(tensor.dtype, (*tensor.shape, 1, 1), lambda: tensor.read()[:, :, None, None])


# ----------------------------------------------------------------------------- text encoders


def clip_original(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """OpenAI's text encoder is kept under transformers' names, with the part that transformers
    dropped in 5.6."""
    whole = "text_model."
    return {n if n.startswith(whole) else whole + n: t for n, t in tensors.items()}


OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def openclip_original(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A text encoder of SD 2 or SDXL's second under OpenCLIP's names: queries, keys and values in
    one matrix, the projection transposed.

    OpenCLIP's `logit_scale`, and with SD 2 the last layer and `text_projection`, are in no
    diffusers folder: nothing reads them to make a picture.
    """
    plain = {n.removeprefix("text_model."): t for n, t in tensors.items()}
    found: dict[str, Lazy] = {}
    for name, tensor in plain.items():
        if name == "embeddings.position_ids":
            continue  # 0, 1, 2, ...: transformers' own, once saved
        if name in OPENCLIP:
            found[OPENCLIP[name]] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = transposed(tensor)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, module, parameter = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if module in OPENCLIP_LAYER:
                found[f"{block}.{OPENCLIP_LAYER[module]}.{parameter}"] = tensor
            elif module == "self_attn.q_proj":
                parts = [
                    plain[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
                ]
                found[f"{block}.attn.in_proj_{parameter}"] = joined(parts)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                raise ValueError(f"{name} is unknown in OpenCLIP's layout")
        else:
            raise ValueError(f"{name} is unknown in OpenCLIP's layout")
    return found


def transposed(tensor: Lazy) -> Lazy:
    return Lazy(tensor.dtype, tensor.shape[::-1], lambda: tensor.read().t().contiguous())


def joined(parts: list[Lazy]) -> Lazy:
    """One below the other."""
    import torch

    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return Lazy(parts[0].dtype, shape, lambda: torch.cat([p.read() for p in parts]))


def whole_original(
    components: Mapping[str, Mapping[str, Lazy]], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Lazy]:
    """Every tensor of a diffusers pipeline under its name in one original file.

    `components` by name: unet, vae, text_encoder and, with SDXL, text_encoder_2; `configs`: their
    configurations and the scheduler's.
    """
    import torch

    unet, text = components["unet"], components["text_encoder"]
    names = unet_names(list(unet))
    parts = {UNET: {names[n]: t for n, t in unet.items()}, VAE: vae_original(components["vae"])}
    if "text_encoder_2" in components:
        parts[CLIP_SDXL] = clip_original(text)
        parts[OPENCLIP_SDXL] = openclip_original(components["text_encoder_2"])
    elif configs["text_encoder"].get("hidden_act") == "gelu":  # OpenAI's has quick_gelu
        parts[OPENCLIP_SD2] = openclip_original(text)
    else:
        parts[CLIP_SD1] = clip_original(text)
    whole = {prefix + n: t for prefix, part in parts.items() for n, t in part.items()}
    scheduler = configs["scheduler"]
    if "text_encoder_2" in components and scheduler.get("prediction_type") == "v_prediction":
        # by these empty tensors ComfyUI and Forge know such an SDXL
        whole["v_pred"] = Lazy.of(torch.empty(0))
        if scheduler.get("rescale_betas_zero_snr"):
            whole["ztsnr"] = Lazy.of(torch.empty(0))
    return whole
