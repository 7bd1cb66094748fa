"""Whether a single file's UNet predicts noise or velocity, which its tensors' shapes do not say."""

from __future__ import annotations

import re
from typing import Any

import torch

from esd_fast.collect import predict_noise

from .base import Conditioning, Family
from .checkpoint import Checkpoint

EPSILON, VELOCITY = "epsilon", "v_prediction"


def declared(checkpoint: Checkpoint) -> str | None:
    """What the file says of itself: by a marker among its tensors, by the metadata that trainers
    write (modelspec, sd-scripts), or in a configuration of the original code base beside it."""
    if "v_pred" in checkpoint.tensors:
        return VELOCITY
    said = checkpoint.metadata.get("modelspec.prediction_type", "")
    if said in ("epsilon", "v"):
        return EPSILON if said == "epsilon" else VELOCITY
    if "ss_v_parameterization" in checkpoint.metadata:
        return VELOCITY if checkpoint.metadata["ss_v_parameterization"] == "True" else EPSILON
    beside = checkpoint.path.with_suffix(".yaml")
    if beside.is_file():
        velocity = re.search(
            r"^\s*parameterization:\s*[\"']?v\b", beside.read_text(errors="replace"), re.MULTILINE
        )
        return VELOCITY if velocity else EPSILON  # noise is that code's default
    return None


def has_zero_snr(checkpoint: Checkpoint) -> bool:
    """Whether the file says that it was trained down to pure noise (zero terminal SNR)."""
    return (
        "ztsnr" in checkpoint.tensors
        or checkpoint.metadata.get("ss_zero_terminal_snr", "") == "True"
    )


def settle(family: Family, pipeline: Any) -> None:
    """Let the UNet show what it predicts, and take the published model's settings for it."""
    found = asked(pipeline.unet, family.encode(pipeline, "", max(family.sample_sizes.values()) * 8))
    pipeline.scheduler = pipeline.scheduler.from_config(
        pipeline.scheduler.config, prediction_type=found
    )
    pipeline.unet.register_to_config(sample_size=family.sample_sizes[found])


@torch.no_grad()
def asked(unet: Any, null: Conditioning) -> str:
    """What the UNet itself shows on pure noise x at the last timestep, where x is all but the
    noise: a noise predictor gives x back, v = alpha * noise - sigma * picture is next to free of
    it. `null`: the empty prompt. Raises ValueError where the answer is not finite."""
    weight = next(unet.parameters())
    side = min(int(unet.config.sample_size), 32)
    shape = (1, unet.config.in_channels, side, side)
    # device and dtype are said: a caller may have set others as torch's defaults
    draw = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    last = torch.tensor(999, device=weight.device)
    answer = predict_noise(unet, noise.to(weight), last, null)
    likeness = torch.corrcoef(torch.stack([answer.float().cpu().flatten(), noise.flatten()]))[0, 1]
    if not likeness.isfinite():
        raise ValueError(
            f"the UNet's answer to noise is not finite in {str(weight.dtype).removeprefix('torch.')}"
            ", so it does not show what it predicts; say so: prediction_type"
        )
    return EPSILON if likeness > 0.5 else VELOCITY
