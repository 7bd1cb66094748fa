"""The embedded model: a small Stable Diffusion of emoji, trained by this project from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esd_fast.parameters import canonical_method

# The preset `fast` on this model, chosen by small trials (README says how far): a model this small
# needs, and bears, a larger learning rate than Stable Diffusion does.
RECIPE: dict[str, Any] = {
    "train_method": "esd-x-strict",
    "learning_rate": 2e-3,
    # beyond the concept: what is learnt from "flat style" alone has to carry over to
    # "a frog in flat style", and pictures are drawn with guidance, which brings back what is left
    "negative_guidance": 4.0,
    # without it the same push takes a tenth of the other objects along
    "keep_vocabulary": 1.0,
    "guidance_scale": 1.0,
    # short trajectories, and so more of them: more objects are seen in an erased style
    "num_inference_steps": 10,
    "collect_batch_size": 2,  # more side by side is no faster on a CPU, and would be a run's peak
}
# ... and of other train methods, chosen by `benchmarks/erasure_table.py --sweep`
BY_METHOD: dict[str, dict[str, Any]] = {
    "esd-x": {"learning_rate": 1e-3},
    "esd-u": {"learning_rate": 1e-4},
}


def recipe(train_method: object = None) -> dict[str, Any]:
    """The values of the preset `fast` on this model, where `train_method` was asked for or none."""
    if not isinstance(train_method, str):  # whatever else it is, is refused later
        return RECIPE
    return {**RECIPE, **BY_METHOD.get(canonical_method(train_method), {})}


def model_path() -> Path:
    """The folder that StableDiffusionPipeline.from_pretrained loads; it holds the judges too."""
    return Path(__file__).parent / "model"


def is_embedded(model: Any) -> bool:
    """Whether `model` (None, a path, a live pipeline) is the embedded one."""
    if model is None:
        return True
    config = getattr(model, "config", {})
    source = config.get("_name_or_path") if hasattr(config, "get") else None
    path = model if isinstance(model, (str, Path)) else source
    return path is not None and Path(str(path)) == model_path()
