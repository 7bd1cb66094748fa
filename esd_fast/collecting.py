"""The first half of a run alone: samples to keep, for as many second halves as one likes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from .config import EraseConfig
from .engine import engaged
from .erasure import versions
from .esd import Meter, Progress, collected, passes_of, prepare
from .graphed_steps import RunGraphs
from .live import onloading
from .models import load_model
from .parallel import Ranks, joined, together
from .parameters import TrainableSubset, only_trainable, plain_parameters, trainable_names
from .quantized_layers import quantized
from .sick_numbers import check_collected
from .stored_samples import StoredSamples, decisive_of, tensors_of
from .tensor_files import Lazy

if TYPE_CHECKING:
    from .models import Model


def collect_samples(
    model: Any = None,
    concept: str | Sequence[str] = "",
    *,
    preset: str = "fast",
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> StoredSamples:
    """What `esd_fast.erase` with the same arguments would collect; `save` writes it, and
    `erase(samples=...)` takes it, with any train_method, learning_rate or negative_guidance.

    Raises as `erase` does, and ValueError for a preset in which the student rolls out.
    """
    with joined() as ranks:
        config = ranks.whole(EraseConfig.from_preset(preset, concept, model, **settings))
        check_kept(config)
        return collect(load_model(model, config), config, ranks=ranks, on_progress=on_progress)


def check_kept(config: EraseConfig) -> None:
    if config.rollout == "student":
        raise ValueError(
            f"preset is {config.preset!r}, in which the UNet in training draws its own samples; "
            "fast and reference take stored ones"
        )


@onloading
@together
@torch.inference_mode(False)  # as in training, where the tensors are used
def collect(
    model: Model,
    config: EraseConfig,
    *,
    ranks: Ranks,
    graphs: RunGraphs | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> StoredSamples:
    """`collect_samples` on a loaded model."""
    check_kept(config)
    config = config.for_model(model)
    started = time.perf_counter()
    decisive = decisive_of(model, config)  # before any weight is put away
    ranks.check_batch(config)
    ranks.check_alike({name: repr(value) for name, value in decisive.items()})
    graphs = graphs or RunGraphs.of(config.cuda_graphs, model.unet, config.optimizer)
    names = trainable_names(model.unet, config.train_method, model.family.name)
    every = plain_parameters(model.unet)
    # the UNet as training with this method would have it: the same bits
    flagged = TrainableSubset({n: every[n] for n in names}, {}, {})
    try:
        with ExitStack() as stack:
            stack.enter_context(quantized(model.unet, names, config.quantize))
            prepared = prepare(model, config, names, graphs, ranks)
            passes = passes_of(config, len(prepared.teacher.asked), prepared.plan)
            meter = Meter(on_progress or (lambda _: None), passes, ranks)
            stack.enter_context(only_trainable(model.unet, flagged))
            stack.enter_context(engaged(model, prepared.layout, prepared.shape[1:], passes))
            samples = collected(config, prepared, prepared.plan, meter, ranks)
            check_collected(None, samples)
    finally:
        graphs.release()
    return StoredSamples(
        config=json.loads(json.dumps(dataclasses.asdict(config))),
        decisive=decisive,
        model=model.source,
        erased=sum(r.samples for r in prepared.plan.erased),
        seconds=time.perf_counter() - started,
        unet_passes=passes,
        versions=versions(),
        tensors={name: Lazy.of(tensor) for name, tensor in tensors_of(samples).items()},
    )
