"""Memory that runs out: once more by a way that takes less, or a stop that says what would fit."""

import warnings
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast import collect, fit, stepping_down
from esd_fast.cli import one_line
from esd_fast.engine import least_memory, plan_of
from esd_fast.models import load_model

from . import pipelines
from .pipelines import SHORT, assert_same_weights, same_bits

one_thread = pipelines.one_thread
ROWS = 8  # of four trajectories' forward


def running_out(monkeypatch: Any, pipe: Any, most_rows: int, checkpointed: bool) -> None:
    """As a card would: for forwards of more rows, for fit steps that keep everything."""
    plain = collect.predict_noise
    block = pipe.unet.mid_block.attentions[0]

    def collecting(unet: Any, latents: Any, *rest: Any) -> Any:
        if len(latents) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return plain(unet, latents, *rest)

    def fitting(unet: Any, latents: Any, *rest: Any) -> Any:
        if checkpointed or not getattr(block, "gradient_checkpointing", False):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return plain(unet, latents, *rest)

    monkeypatch.setattr(collect, "predict_noise", collecting)
    monkeypatch.setattr(fit, "predict_noise", fitting)


def erase(pipe: Any, **settings: Any) -> Any:
    # four trajectories of four steps
    chosen = {**SHORT, "iterations": 8, "batch_size": 2, **settings}
    return esd_fast.erase(pipe, "cat", **chosen)


@pytest.mark.parametrize("most_rows", [ROWS, ROWS // 2])
def test_one_step_down_and_it_says_so(monkeypatch: Any, most_rows: int) -> None:
    """In the fit, or while collecting: the result is that of who asked for less at once."""
    truth = erase(pipelines.pipeline(), checkpointing="all", collect_batch_size=2)
    pipe = pipelines.pipeline()
    running_out(monkeypatch, pipe, most_rows, checkpointed=False)
    with pytest.warns(UserWarning, match=r"memory ran out .* again with 'all' and 2"):
        ours = erase(pipe)
    assert all(same_bits(tensor, truth.tensors[n]) for n, tensor in ours.tensors.items())
    assert ours.manifest["losses"] == truth.manifest["losses"]
    assert (
        "memory ran out with checkpointing 'auto'" in ours.manifest["paths_taken"]["checkpointing"]
    )
    assert "memory" not in truth.manifest["paths_taken"]["checkpointing"]


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "all", "collect_batch_size": 1}])
def test_a_stop_says_what_would_fit(monkeypatch: Any, settings: dict[str, Any]) -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    monkeypatch.setattr(stepping_down, "least_memory", lambda _, c: (c.batch_size + 1) * 2**30)
    running_out(monkeypatch, pipe, ROWS, checkpointed=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(torch.OutOfMemoryError) as stopped:
            erase(pipe, **settings)
    assert sum("memory ran out" in str(w.message) for w in told) == (0 if settings else 1)
    said = one_line(str(stopped.value))
    assert said == str(stopped.value)
    assert "about 3.0 GiB is the least that this takes, with batch_size 1 2.0 GiB;" in said
    assert_same_weights(pipe, before)
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_the_least_is_just_what_a_plan_fits_into() -> None:
    config = esd_fast.EraseConfig("cat")
    model = load_model(pipelines.pipeline(), config)
    plan, least = plan_of(model, config, 64), least_memory(model, config)
    assert plan.fitting(least) is not None
    assert plan.fitting(least - 1) is None
