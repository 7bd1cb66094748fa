"""The table of original names, against lists that are not diffusers' and against its readers."""

from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from esd_fast.export.base import ema_key, unet_keys
from esd_fast.export.original_layout import UNET, VAE, unet_names, whole_original
from esd_fast.tensor_files import Lazy

from . import tiny

LISTS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
# in such files, and no weight that a diffusers folder has
TRAINING = (
    *("alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
)
ABSENT = {
    "sd1": {*TRAINING, "cond_stage_model.transformer.text_model.embeddings.position_ids"},
    "sd2": {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"},
    "sdxl": {
        *TRAINING,
        *("edm_vpred.sigma_max", "edm_vpred.sigma_min", "v_pred", "ztsnr"),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    },
}


def lazies(module: torch.nn.Module) -> dict[str, Lazy]:
    return {n: Lazy.of(t) for n, t in module.state_dict().items()}


def components(family: str, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    modules: dict[str, Any] = {"unet": tiny.unet(family, full), "vae": tiny.vae(full)}
    for name, kind in zip(("text_encoder", "text_encoder_2"), tiny.ENCODERS[family], strict=False):
        modules[name] = tiny.text_encoder(kind, full)
    return modules, {
        "text_encoder": modules["text_encoder"].config.to_dict(),
        "scheduler": {"prediction_type": "epsilon"},
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_size_names_and_shapes(family: str) -> None:
    with torch.device("meta"):
        modules, configs = components(family, full=True)
    ours = whole_original({n: lazies(m) for n, m in modules.items()}, configs)
    theirs = tiny.key_list(LISTS[family])
    absent = {
        n for n in theirs if n in ABSENT[family] or (".resblocks.23." in n and family == "sd2")
    }
    assert ABSENT[family] <= absent
    assert ours.keys() == theirs.keys() - absent
    assert {n: t.shape for n, t in ours.items()} == {n: theirs[n] for n in ours}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_size_unet_both_ways(family: str) -> None:
    """diffusers' converter takes the independent list to its own names, ours takes them back."""
    theirs = {n: s for n, s in tiny.key_list(LISTS[family]).items() if n.startswith(UNET)}
    keys = unet_keys({n: Lazy(torch.float32, s, torch.empty) for n, s in theirs.items()})
    with torch.device("meta"):
        expected = tiny.unet(family, full=True).state_dict()
    assert keys.keys() == expected.keys()
    assert {n: theirs[k] for n, k in keys.items()} == {
        n: tuple(t.shape) for n, t in expected.items()
    }
    assert {n: UNET + o for n, o in unet_names(list(expected)).items()} == keys


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_diffusers_converters_take_every_value_back(family: str) -> None:
    torch.manual_seed(0)
    modules, configs = components(family, full=False)
    lazy = whole_original({n: lazies(m) for n, m in modules.items()}, configs)
    whole = {n: t.read() for n, t in lazy.items()}
    for name, tensor in lazy.items():
        assert (whole[name].shape, whole[name].dtype) == (tensor.shape, tensor.dtype)
    back = {
        "unet": convert_ldm_unet_checkpoint(dict(whole), dict(modules["unet"].config)),
        "vae": convert_ldm_vae_checkpoint(dict(whole), dict(modules["vae"].config)),
    }
    if family == "sd2":
        back["text_encoder"] = convert_open_clip_checkpoint(modules["text_encoder"], whole)
    else:
        back["text_encoder"] = convert_ldm_clip_checkpoint(whole)
    if family == "sdxl":
        back["text_encoder_2"] = convert_open_clip_checkpoint(
            modules["text_encoder_2"], whole, prefix="conditioner.embedders.1.model."
        )
    for name, module in modules.items():
        expected = module.state_dict()
        found = back[name]
        if name == "text_encoder":
            found = {n.removeprefix("text_model."): t for n, t in found.items()}
            expected = {n.removeprefix("text_model."): t for n, t in expected.items()}
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[n], t) for n, t in expected.items()), name


def test_ema_names() -> None:
    """As sd-mecha lists them for SD 1: model_ema.diffusion_modelinput_blocks100emb_layers1bias."""
    key = UNET + "input_blocks.10.0.emb_layers.1.bias"
    assert ema_key(key) == "model_ema.diffusion_modelinput_blocks100emb_layers1bias"


def test_first_releases_names_of_the_vae() -> None:
    """The SD 1.5 folder on the hub still has them."""
    old = {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value",
           "to_out.0": "proj_attn"}  # fmt: skip
    model = tiny.vae()
    plain = whole_original_vae(lazies(model))
    aged = {}
    for name, tensor in lazies(model).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        aged[name] = tensor
    assert aged.keys() != model.state_dict().keys()
    assert whole_original_vae(aged) == plain


def whole_original_vae(tensors: dict[str, Lazy]) -> dict[str, tuple[int, ...]]:
    from esd_fast.export.original_layout import vae_original

    return {VAE + n: t.shape for n, t in vae_original(tensors).items()}


@pytest.mark.parametrize(
    "name", ["down_blocks.0.motion_modules.0.proj_in.weight", "encoder_hid_proj.weight",
             "down_blocks.0.resnets.0.spatial_conv.weight"],
)  # fmt: skip
def test_what_has_no_place_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no place in Stable Diffusion's original layout"):
        unet_names([name])
