"""Erasures side by side in threads: each comes out as alone, and the process is left as it was."""

import gc
import random
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esd_fast
from esd_fast.config import EraseConfig
from esd_fast.models import load_model
from esd_fast.scheduler_table import probe

from . import pipelines
from .pipelines import GOLDEN, assert_same_weights, same_bits, weights

one_thread = pipelines.one_thread
SHORT: dict[str, Any] = {"iterations": 8, "num_inference_steps": 6, "learning_rate": 1e-3}
# other models, presets, seeds; one that is loaded, and holds to the tokenizer's words
JOBS: dict[str, Callable[[], esd_fast.Erasure]] = {
    "fast": lambda: esd_fast.erase(pipelines.pipeline(), "cat", seed=1, **SHORT),
    "reference": lambda: esd_fast.erase(
        pipelines.pipeline("sd-pndm"), "red apple", preset="reference", seed=2, **SHORT
    ),
    "paper": lambda: esd_fast.erase(
        pipelines.pipeline("sd-v-ddim"), "dog", preset="paper-diffusers", seed=3, **SHORT
    ),
    "loaded": lambda: esd_fast.erase(
        GOLDEN / "sd-ddim", "cat", keep_vocabulary=1.0, dtype="bfloat16", seed=4, **SHORT
    ),
}


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What each gives, all begun at once."""
    results: list[Any] = [None] * len(jobs)
    begin = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        begin.wait()
        try:
            results[number] = jobs[number]()
        except Exception as error:  # noqa: BLE001 -- raised below
            results[number] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def process() -> dict[str, Any]:
    """Whatever of the process a run could disturb."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (name, keys.tolist(), *rest),
        "random": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "nn.Module": (nn.Module.register_parameter, nn.Module.__setattr__),
        "begun threads": threading.active_count(),
    }


def assert_same(ours: esd_fast.Erasure, truth: esd_fast.Erasure) -> None:
    assert ours.tensors.keys() == truth.tensors.keys()
    assert all(same_bits(t, truth.tensors[n]) for n, t in ours.tensors.items())
    assert ours.manifest["losses"] == truth.manifest["losses"]


def test_side_by_side_as_one_by_one() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        alone = [job() for job in JOBS.values()]
        before = process()
        together = in_threads(*JOBS.values())
        assert process() == before
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, truth in zip(together, alone, strict=True):
        assert_same(ours, truth)


def test_the_same_settings_in_two_threads() -> None:
    """Nothing is shared by what they have in common."""
    job = JOBS["fast"]
    for ours in in_threads(job, job):
        assert_same(ours, job())


def test_loading_side_by_side() -> None:
    """diffusers and transformers set the default dtype, and replace methods of nn.Module."""

    def load(dtype: str) -> list[Any]:
        config = EraseConfig("cat", dtype=dtype)
        return [load_model(GOLDEN / "sd-ddim", config).pipeline for _ in range(3)]

    before = process()
    halves, wholes = in_threads(lambda: load("bfloat16"), lambda: load("float32"))
    assert process() == before
    for pipes, dtype in ((halves, torch.bfloat16), (wholes, torch.float32)):
        for pipe in pipes:
            parts = (pipe.unet, pipe.text_encoder, pipe.vae)
            assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
            assert_same_weights(pipe, weights(pipelines.pipeline(dtype=dtype)))


def test_numbers_that_the_caller_draws_meanwhile() -> None:
    """None twice, none left out: as with no erasure beside."""
    torch.manual_seed(5)
    expected = [torch.rand(1).item() for _ in range(3000)]
    torch.manual_seed(5)
    done = threading.Event()

    def draw() -> list[float]:
        drawn = []
        while not done.is_set() and len(drawn) < len(expected):
            drawn.append(torch.rand(1).item())
        return drawn

    def probing() -> None:
        try:
            for name in ("sd-ddim", "sd-pndm") * 10:
                probe(pipelines.pipeline(name).scheduler, 9)
            JOBS["fast"]()
        finally:
            done.set()

    drawn, _ = in_threads(draw, probing)
    assert drawn == expected[: len(drawn)]


def test_one_pipeline_is_one_runs(tmp_path: Path) -> None:
    pipe = pipelines.pipeline()
    other = type(pipe)(**pipe.components)  # another pipeline around the same UNet
    before = weights(pipe)
    truth = JOBS["fast"]()
    earlier = esd_fast.erase(pipe, "fish", **pipelines.SHORT)
    earlier.revert(pipe)
    said = []

    def meddle(step: Any) -> None:
        if step.iteration != 3:
            return
        for attempt in (
            lambda: esd_fast.erase(pipe, "dog", **SHORT),
            lambda: esd_fast.erase(other, "dog", checkpoints=tmp_path / "x", **SHORT),
            lambda: earlier.apply(pipe),
            lambda: earlier.revert(pipe),
        ):
            with pytest.raises(RuntimeError, match="is being trained on this pipeline's UNet"):
                attempt()
            with pytest.raises(RuntimeError) as refused:
                in_threads(attempt)
            said.append(str(refused.value))

    ours = esd_fast.erase(pipe, "cat", seed=1, on_step=meddle, **SHORT)
    assert len(said) == 4
    assert "\n" not in said[0]
    assert_same(ours, truth)
    ours.revert(pipe)
    assert_same_weights(pipe, before)
    esd_fast.erase(other, "dog", **pipelines.SHORT)  # the next may


def test_a_run_that_fails_lets_the_next_one_in() -> None:
    pipe = pipelines.pipeline()

    def fail(_: Any) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        esd_fast.erase(pipe, "cat", on_step=fail, **SHORT)
    assert_same(esd_fast.erase(pipe, "cat", seed=1, **SHORT), JOBS["fast"]())


def test_a_pipeline_that_was_worked_on_is_freed() -> None:
    from esd_fast import live

    gc.collect()
    before = len(live._WORKED_ON)
    JOBS["fast"]()
    gc.collect()
    assert len(live._WORKED_ON) == before == 0
