"""Small pipelines for the tests of the core, and how results are compared.

Imported relatively (`from . import pipelines`): tests is a package.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from esd_fast.config import EraseConfig
from esd_fast.erasure import Erasure
from esd_fast.esd import run
from esd_fast.fit import FitStep
from esd_fast.models import load_model
from esd_fast.plan import Rollout, plan_rollouts
from esd_fast.schedules import scheduler_for

GOLDEN = Path(__file__).parent / "golden"
SHAPE = (4, 8, 8)  # of one sample's latents in every golden pipeline
SHORT: dict[str, Any] = {"iterations": 4, "num_inference_steps": 4, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise equality and 1e-5 need a fixed order of sums. Modules take it by assignment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def read_pipeline(name: str, dtype: torch.dtype) -> Any:
    return DiffusionPipeline.from_pretrained(GOLDEN / name, local_files_only=True, dtype=dtype)


def pipeline(name: str = "sd-ddim", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of a golden pipeline; every test so also shows that deep copies work."""
    return copy.deepcopy(read_pipeline(name, dtype))


def golden_run(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    return settings, load_file(GOLDEN / f"{name}.safetensors")


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of a UNet's state, by name."""
    unet = getattr(model, "unet", model)
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def assert_same_weights(model: Any, expected: dict[str, Tensor]) -> None:
    """Bit for bit, NaN and -0 included."""
    now = weights(model)
    assert now.keys() == expected.keys()
    changed = [n for n, value in now.items() if not same_bits(value, expected[n])]
    assert not changed


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||, in float64."""
    ours, truth = ours.double(), truth.double()
    return ((ours - truth).norm() / truth.norm()).item()


def worst_move(
    start: dict[str, Tensor], ours: dict[str, Tensor], truth: dict[str, Tensor]
) -> float:
    """The farthest tensor by ||our move - its move|| / ||its move||.

    Adam divides by the gradient's size, so weights would hide what moves show.
    """
    assert ours.keys() == truth.keys() <= start.keys()
    return max(
        relative(ours[n].double() - start[n].double(), truth[n].double() - start[n].double())
        for n in truth
    )


@dataclass
class Watched:
    """A run of the package, and all that could be seen of it."""

    erasure: Erasure
    config: EraseConfig
    rollouts: list[Rollout]
    timesteps: Tensor
    start: dict[str, Tensor]
    steps: list[FitStep] = field(default_factory=list)


def watched_run(pipe: Any, config: EraseConfig, rollouts: list[Rollout] | None = None) -> Watched:
    """Run `config` on `pipe` (left erased), by default with the rollouts its seed plans."""
    timesteps = scheduler_for(pipe.scheduler, config).timesteps
    planned = rollouts or plan_rollouts(config, timesteps, SHAPE)
    start, steps = weights(pipe), list[FitStep]()
    erasure = run(load_model(pipe, config), config, rollouts=rollouts, on_step=steps.append)
    return Watched(erasure, config, planned, timesteps, start, steps)
