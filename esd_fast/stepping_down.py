"""Where a device's memory runs out after all: once more, by a way that takes less."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .engine import least_memory, memory_for
from .parallel import Ranks

if TYPE_CHECKING:
    from .config import EraseConfig
    from .models import Model


def stepping_down(function: Callable[..., Any]) -> Callable[..., Any]:
    """For esd.run: where memory runs out it starts again, once, with all blocks checkpointed and
    half as many trajectories side by side; the result does not depend on either. Raises
    torch.OutOfMemoryError, with what would fit, where that is too much as well."""

    @functools.wraps(function)
    def wrapper(model: Model, config: EraseConfig, **settings: Any) -> Any:
        own = (settings.get("ranks") or Ranks()).own  # memory is of this process's share
        try:
            return function(model, config, **settings)
        except torch.OutOfMemoryError:
            pass  # left first: the error holds every tensor of the frames that it came through
        free_cached(model)
        lower = lower_than(config)
        if lower is None:
            raise torch.OutOfMemoryError(what_would_fit(model, own(config)))
        why = (
            f"memory ran out with checkpointing {config.checkpointing!r} and collect_batch_size "
            f"{config.collect_batch_size}; again with 'all' and {lower.collect_batch_size}"
        )
        warnings.warn(why, stacklevel=2)
        try:
            erasure = function(model, lower, **settings)
        except torch.OutOfMemoryError:
            erasure = None
        if erasure is None:
            free_cached(model)
            raise torch.OutOfMemoryError(what_would_fit(model, own(lower)))
        erasure.manifest["paths_taken"]["checkpointing"] += f" ({why})"
        return erasure

    return wrapper


def lower_than(config: EraseConfig) -> EraseConfig | None:
    """None where nothing is left to take back."""
    if config.checkpointing == "all" and config.collect_batch_size == 1:
        return None
    half = max(1, config.collect_batch_size // 2)
    return replace(config, checkpointing="all", collect_batch_size=half)


def free_cached(model: Model) -> None:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def what_would_fit(model: Model, config: EraseConfig) -> str:
    """In one line, by the plan's count."""
    free = memory_for(model, "auto")
    parts = [f"memory ran out on {model.device}"]
    if free is not None:
        parts.append(f"{free / 2**30:.1f} GiB are there for it")
    least = least_memory(model, config)
    parts.append(f"about {least / 2**30:.1f} GiB is the least that this takes")
    if config.batch_size > 1:
        single = least_memory(model, replace(config, batch_size=1))
        parts.append(f"with batch_size 1 {single / 2**30:.1f} GiB")
    return f"{', '.join(parts)}; a lower resolution, or a train_method of fewer weights, needs less"
