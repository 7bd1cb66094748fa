"""Write the key lists beside this file: python make.py FOLDER_OF_UNPACKED_WHEELS

What the original layout's full-size checkpoints hold (name, shape, dtype), said by code that is not
diffusers: sd-mecha's tables (SD 1.5 and SDXL; MIT), and Stability's own classes as
stable-diffusion-sdkit and open-clip-torch package them, built on the meta device (SD 2.1; MIT).
The folder holds the three wheels unpacked, in folders sd_mecha, stable_diffusion_sdkit and
open_clip_torch; einops and torchvision must be importable.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
MECHA = "sd_mecha/sd_mecha/extensions/builtin/model_configs"
# v2-inference-v.yaml of the stablediffusion repository
SD21_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 1024,
    "legacy": False,
}
AUTOENCODER: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
Rows = Iterable[tuple[str, Iterable[int], str]]


def from_mecha(file: Path, leave_out: tuple[str, ...]) -> Rows:
    """A line of its YAML is `    NAME: {shape: [..], dtype: float32, ..}`."""
    import yaml

    for part, keys in yaml.safe_load(file.read_text())["components"].items():
        if part not in leave_out:
            for name, told in keys.items():
                yield name, told["shape"], told["dtype"]


def of_module(prefix: str, module: torch.nn.Module) -> Rows:
    for name, tensor in module.state_dict().items():
        yield prefix + name, tensor.shape, str(tensor.dtype).removeprefix("torch.")


def sd21(folder: Path) -> Rows:
    sys.path[:0] = [str(folder / "stable_diffusion_sdkit"), str(folder / "open_clip_torch")]
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from open_clip.model import CLIPTextCfg, _build_text_tower

    config = json.loads(
        (folder / "open_clip_torch/open_clip/model_configs/ViT-H-14.json").read_text()
    )
    with torch.device("meta"):
        yield from of_module("model.diffusion_model.", UNetModel(**SD21_UNET))
        yield from of_module("first_stage_model.encoder.", Encoder(**AUTOENCODER))
        yield from of_module("first_stage_model.decoder.", Decoder(**AUTOENCODER))
        yield from of_module("first_stage_model.quant_conv.", torch.nn.Conv2d(8, 8, 1))
        yield from of_module("first_stage_model.post_quant_conv.", torch.nn.Conv2d(4, 4, 1))
        text = _build_text_tower(config["embed_dim"], CLIPTextCfg(**config["text_cfg"]))
    yield from of_module("cond_stage_model.model.", text)
    yield "cond_stage_model.model.logit_scale", (), "float32"  # CLIP's own parameter


def write(name: str, rows: Rows) -> None:
    lines = sorted(
        f"{key} {'x'.join(map(str, shape)) or '-'} {dtype}" for key, shape, dtype in rows
    )
    (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(name, len(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the key lists beside this file")
    parser.add_argument("wheels", type=Path)
    wheels = parser.parse_args().wheels
    write("sd15", from_mecha(wheels / MECHA / "sd1-ldm.yaml", ("ema",)))
    write("sd21", sd21(wheels))
    write("sdxl", from_mecha(wheels / MECHA / "sdxl-sgm.yaml", ()))
