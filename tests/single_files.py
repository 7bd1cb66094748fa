"""Checkpoints in the original layout, made of small pipelines: diffusers' names turned back.

A table of its own, so that what reads them is compared with something.
"""

import re
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original(pipe: Any) -> Tensors:
    """All of a pipeline's weights as its original code base saves them."""
    xl = hasattr(pipe, "text_encoder_2")
    linear = pipe.unet.config.use_linear_projection
    found = {f"model.diffusion_model.{n}": t for n, t in unet(pipe.unet).items()}
    found |= {f"first_stage_model.{n}": t for n, t in vae(pipe.vae).items()}
    if xl:
        found |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        found |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif linear:
        found |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        found |= clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return found


def unet(model: Any) -> Tensors:
    state, layers = model.state_dict(), model.config.layers_per_block

    def renamed(name: str) -> str:
        for ours, theirs in UNET_ENDS.items():
            if name.startswith(ours + "."):
                return theirs + name.removeprefix(ours)
        side, block, kind, number, rest = re.fullmatch(
            r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(\w+)\.(\d+)\.(.+)", name
        ).groups()  # type: ignore[union-attr]
        part, _, end = rest.rpartition(".")
        inner = f"{RESNET[part]}.{end}" if kind == "resnets" else rest
        if side == "mid_block":
            place = {"resnets": 2 * int(number), "attentions": 1}[kind]
            return f"middle_block.{place}.{inner}"
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{end}"
        if kind == "upsamplers":
            attends = any(n.startswith(f"up_blocks.{block}.attentions.") for n in state)
            return f"output_blocks.{first + layers}.{2 if attends else 1}.conv.{end}"
        blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
        index = first + int(number) + (side == "down_blocks")
        return f"{blocks}.{index}.{0 if kind == 'resnets' else 1}.{inner}"

    return {renamed(n): t for n, t in state.items()}


def vae(model: Any) -> Tensors:
    ups = len(model.config.up_block_types)
    found = {}
    for name, tensor in model.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{ups - 1 - int(m[1])}.block.", new
        )
        new = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda m: f"up.{ups - 1 - int(m[1])}.upsample.",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions.0." in new:
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.").replace(
                "group_norm", "norm"
            )
            new = new.replace("to_out.0", "proj_out").replace("attn_1.to_", "attn_1.")
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # once a 1x1 convolution
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[new] = tensor
    return found


def clip(model: Any, prefix: str) -> Tensors:
    state = {n.removeprefix("text_model."): t for n, t in model.state_dict().items()}
    found = {f"{prefix}text_model.{n}": t for n, t in state.items()}
    # older transformers saved it
    found[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found


def open_clip(model: Any, prefix: str) -> Tensors:
    state = {n.removeprefix("text_model."): t for n, t in model.state_dict().items()}
    renames = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.": "attn.",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {"logit_scale": torch.ones(())}
    if "text_projection.weight" in state:
        found["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name, tensor in state.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue  # behind the queries, in one matrix
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            name, tensor = name.replace(".q_proj.", ".in_proj_"), torch.cat(parts)
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return {prefix + n: t for n, t in found.items()}


def with_averages(tensors: Tensors, change: float = 0.5) -> Tensors:
    """As a training run saves itself: the UNet's running average beside it, under flat names."""
    averages = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): t * change
        for n, t in tensors.items()
        if n.startswith("model.diffusion_model.")
    }
    return tensors | averages | {"model_ema.decay": torch.tensor(0.9999)}
