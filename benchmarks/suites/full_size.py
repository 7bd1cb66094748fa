"""An SD 1.x-shaped checkpoint (random weights, bfloat16) through the whole command line.

Does anything break at size, and what does it take? As it is, and as lean as it can (`lean`: 8-bit moments, every
block checkpointed; with the extra bitsandbytes). Beside it the reference loop, in bfloat16 too, for the same number
of samples. Each in a process of its own; memory is the resident peak of the whole process, and what it has beyond
the loaded pipeline is told.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import Settings, in_fresh_process, peak, reset_peak
from rows import Row

from esd_fast.frozen_conv import wants_channels_last

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY_TARGET = 5e9


@dataclass(frozen=True)
class Size:
    resolution: int
    steps: int  # of a trajectory
    iterations: int


QUICK = Size(64, 2, 2)
ON_CPU = Size(256, 4, 4)
ON_GPU = Size(512, 50, 200)  # what both do by default


@dataclass(frozen=True)
class Job:
    folder: str
    device: str
    size: Size


def run(settings: Settings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "sd1"
        in_fresh_process(write_checkpoint, str(checkpoint), settings.quick)
        at_size = ON_CPU if torch.device(settings.device).type == "cpu" else ON_GPU
        job = Job(str(checkpoint), settings.device, QUICK if settings.quick else at_size)
        loaded = in_fresh_process(loaded_memory, job)
        for contestant, options in CONTESTANTS.items():
            if contestant == LEAN and find_spec("bitsandbytes") is None:
                continue
            measured = command_line(job, options, Path(folder) / "out")
            yield row_of(contestant, job, {**measured, "loaded_memory_bytes": loaded})
        yield row_of("reference", job, in_fresh_process(reference, job))


def row_of(contestant: str, job: Job, measured: dict[str, Any]) -> Row:
    return Row(
        suite="full-size",
        case=f"SD 1.x, {job.size.resolution} px, {job.size.iterations} samples",
        contestant=contestant,
        device=job.device,
        dtype="bfloat16",
        repeats=1,
        samples_per_second=job.size.iterations / measured["seconds"],
        **measured,
    )


LEAN = "esd_fast, lean"
CONTESTANTS = {"esd_fast": (), LEAN: ("--optimizer", "adam8bit", "--checkpointing", "all")}


def command_line(job: Job, options: Sequence[str], output: Path) -> dict[str, Any]:
    """`esd-fast train` as a user starts it; `seconds` are those of collect and fit."""
    command = [sys.executable, "-P", "-m", "esd_fast.cli", "train", "--concept", "a red bicycle"]
    command += ["--model", job.folder, "--output", str(output), "--device", job.device]
    command += ["--dtype", "bfloat16", "--resolution", str(job.size.resolution), "--pictures", "0"]
    command += [
        "--iterations",
        str(job.size.iterations),
        "--num-inference-steps",
        str(job.size.steps),
        *options,
    ]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run(command, check=True, env=environment)
    report = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    return {
        "seconds": report["seconds"]["collect"] + report["seconds"]["fit"],
        "first_seconds": report["seconds"]["total"],
        "unet_passes": report["unet_passes"]["total"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "note": "first: process start to report; memory: the whole process",
    }


def loaded_memory(job: Job) -> int:
    """Of what the command line loads, every weight read: pages of files come as they are read."""
    from esd_fast.config import EraseConfig
    from esd_fast.esd import load_model

    begin(job)
    config = EraseConfig(concept="nothing", dtype="bfloat16", device=job.device)
    return read_all(load_model(job.folder, config).pipeline, job.device)


def begin(job: Job) -> None:
    from esd_fast.commands.console import quiet_libraries
    from esd_fast.pages import keep_pages

    keep_pages()
    quiet_libraries()
    reset_peak(job.device)


def read_all(pipeline: Any, device: str) -> int:
    """Bytes that are held then."""
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        for parameter in part.parameters():
            parameter.detach().flatten()[::1024].float().sum()  # a number of each page
    return reset_peak(device)


def reference(job: Job) -> dict[str, Any]:
    """The reference loop, for as many samples, on the same checkpoint."""
    import reference_loop
    from diffusers import StableDiffusionPipeline

    begin(job)
    started = time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(
        job.folder, dtype=torch.bfloat16, safety_checker=None
    ).to(job.device)
    settings = reference_loop.LoopSettings(
        concept="a red bicycle",
        iterations=job.size.iterations,
        num_inference_steps=job.size.steps,
        resolution=job.size.resolution,
    )
    loaded = read_all(pipeline, job.device)
    for module in pipeline.unet.modules():  # as ours, or it would take hours
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(in_fast_layout)
    begun = time.perf_counter()
    result = reference_loop.reference(pipeline, settings)
    ended = time.perf_counter()
    return {
        "seconds": ended - begun,
        "first_seconds": ended - started,
        "unet_passes": result.unet_passes,
        "peak_memory_bytes": peak(job.device),
        "loaded_memory_bytes": loaded,
        "note": "first: loading included; memory: the whole process",
    }


def in_fast_layout(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> Any:
    (pixels,) = inputs
    if wants_channels_last(pixels.device.type, pixels.dtype):
        return pixels.contiguous(memory_format=torch.channels_last)
    return None


# --- the checkpoint ---------------------------------------------------------------------------------


def write_checkpoint(folder: str, tiny: bool) -> None:
    """Every part in the shape of SD 1.x (`tiny`: of the same classes), weights random, bfloat16."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from esd_fast.models.tokenizer import CLIP_FILES

    tokenizer = CLIPTokenizer.from_pretrained(CLIP_FILES, model_max_length=77)
    width = 64 if tiny else 768
    channels = (32, 64, 64, 64) if tiny else (320, 640, 1280, 1280)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae_channels = (32, 32, 32, 32) if tiny else (128, 256, 512, 512)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=channels,
            cross_attention_dim=width,
            attention_head_dim=8,
        )
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if tiny else 2,
            sample_size=512,
        )
    pipeline = StableDiffusionPipeline(
        vae=filled(vae),
        text_encoder=filled(text_encoder),
        tokenizer=tokenizer,
        unet=filled(unet),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Off the meta device, in bfloat16, with random weights small enough to stay finite."""
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                fan_in = math.prod(parameter.shape[1:])
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def beyond_loaded(row: Row) -> int:
    """Bytes."""
    return (row.peak_memory_bytes or 0) - (row.loaded_memory_bytes or 0)


def plot(rows: Sequence[Row], figure: Figure) -> None:
    """Passes, seconds and memory, side by side."""
    shown = {
        "UNet passes": [r.unet_passes for r in rows],
        "seconds": [r.seconds for r in rows],
        "peak memory, GB": [(r.peak_memory_bytes or 0) / 1e9 for r in rows],
        "beyond the loaded, GB": [beyond_loaded(r) / 1e9 for r in rows],
    }
    names = [r.contestant for r in rows]
    for axes, (title, values) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axes.bar(names, values, color=[f"C{i}" for i in range(len(names))])
        axes.set(title=title)
        axes.tick_params(axis="x", labelrotation=30)
