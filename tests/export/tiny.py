"""Small models of every family with random weights, and those of full size on the meta device."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from esd_fast.erasure import Erasure, fingerprint

GOLDEN = Path(__file__).parents[1] / "golden"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
FAMILIES = ("sd1", "sd2", "sdxl")
FULL: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (16, 16, 16, 16), "cross_attention_dim": 24},
    "sd2": {"block_out_channels": (16, 16, 16, 16), "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": (16, 16, 16),
        "cross_attention_dim": 56,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": (1, 1, 2),
    },
}
# text encoders: OpenAI's ViT-L, OpenCLIP's ViT-H without its last layer and bigG
TEXT_FULL = {
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "openclip-h": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23},
    "openclip-g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
}
TEXT_TINY = {
    "clip": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2},
    "openclip-h": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "openclip-g": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
}
ENCODERS = {"sd1": ("clip",), "sd2": ("openclip-h",), "sdxl": ("clip", "openclip-g")}


def unet(family: str, full: bool = False) -> UNet2DConditionModel:
    small = {"attention_head_dim": 4, "norm_num_groups": 8, "sample_size": 8}
    config = FULL[family] | ({} if full else TINY[family] | small)
    return UNet2DConditionModel(**{"sample_size": 64, "layers_per_block": 2} | config)


def vae(full: bool = False) -> AutoencoderKL:
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    channels = (128, 256, 512, 512) if full else (8, 8, 8, 8)
    return AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=channels,
        layers_per_block=2 if full else 1,
        latent_channels=4,
        norm_num_groups=32 if full else 4,
        sample_size=64,
    )


def text_encoder(kind: str, full: bool = False) -> Any:
    sizes = (TEXT_FULL if full else TEXT_TINY)[kind]
    config = CLIPTextConfig(
        **sizes,
        num_attention_heads=2,
        vocab_size=49408 if full else 906,
        hidden_act="quick_gelu" if kind == "clip" else "gelu",
        projection_dim=sizes["hidden_size"],
        bos_token_id=904,
        eos_token_id=905,
        pad_token_id=905,
    )
    return (CLIPTextModelWithProjection if kind == "openclip-g" else CLIPTextModel)(config)


def pipeline(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "sd-ddim" / "tokenizer")
    encoders = [text_encoder(kind).eval() for kind in ENCODERS[family]]
    velocity = family == "sd2"
    parts: dict[str, Any] = {
        "unet": unet(family).eval(),
        "vae": vae().eval(),
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if velocity else "epsilon",
        ),
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer}
        pipe = StableDiffusionXLPipeline(**parts)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for component in (pipe.unet, pipe.vae, *encoders):  # biases and norms that are no zeros
        for parameter in component.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=dtype)


@cache
def key_list(name: str) -> dict[str, tuple[int, ...]]:
    """Of an original full-size checkpoint: name -> shape (key_lists/make.py)."""
    lines = (Path(__file__).parents[1] / "key_lists" / f"{name}.txt").read_text().splitlines()
    rows = [line.split(" ") for line in lines]
    return {n: () if s == "-" else tuple(map(int, s.split("x"))) for n, s, _ in rows}


@cache
def original(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return pipeline(family, dtype=dtype)


def erasure_of(pipe: Any, word: str = "attn2", seed: int = 0, **manifest: Any) -> Erasure:
    """A small move of every parameter whose name holds `word`."""
    g = torch.Generator().manual_seed(seed)
    before = {n: p.detach() for n, p in pipe.unet.named_parameters() if word in n}
    moved = {n: p.float() + 1e-2 * torch.randn(p.shape, generator=g) for n, p in before.items()}
    told = {"concept": "cat", "method": "esd-x", "base_fingerprint": fingerprint(before)}
    return Erasure(moved, told | manifest)


def state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{c}.{n.removeprefix('text_model.')}": t.clone()
        for c in COMPONENTS
        if getattr(pipe, c, None) is not None
        for n, t in getattr(pipe, c).state_dict().items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [n for n, t in expected.items() if t.dtype != found[n].dtype or not t.equal(found[n])]
    assert not wrong


def applied(family: str, erasure: Erasure, dtype: torch.dtype = torch.float32) -> Any:
    pipe = copy.deepcopy(original(family, dtype))
    erasure.apply(pipe)
    return pipe


def pipeline_class(family: str) -> Any:
    return StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline


def read_single_file(file: Path, family: str, config: Path, dtype: torch.dtype) -> Any:
    return pipeline_class(family).from_single_file(
        file, config=str(config), local_files_only=True, torch_dtype=dtype
    )


def images(pipe: Any) -> torch.Tensor:
    # weights mapped from a file start anywhere, and oneDNN sums unaligned ones in another order
    pipe = copy.deepcopy(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        height=64,
        width=64,
        output_type="pt",
    ).images
