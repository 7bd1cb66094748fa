"""Every family all the way: single file, erasure, every export, read by diffusers alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import esd_fast
from esd_fast.export.compare import compare
from esd_fast.models import load_model

from . import tiny
from .tiny import assert_same, images, original, pipeline_class, read_single_file, state

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:No LoRA keys",
)
STEPS: dict[str, Any] = {
    "iterations": 3,
    "num_inference_steps": 4,
    "learning_rate": 1e-3,
    "device": "cpu",
    "dtype": "float32",
}


# what differs by family is tested family by family next door
@pytest.mark.parametrize(
    "family", [f if f == "sdxl" else pytest.param(f, marks=pytest.mark.slow) for f in tiny.FAMILIES]
)
def test_from_a_single_file_to_every_format(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    nothing = tiny.erasure_of(original(family))
    nothing.export(base, "single-file", model=folders[family], strength=0.0)
    assert compare(base, folders[family]).same  # a zero-step erasure changes no bit
    settings = {
        **STEPS,
        "model_config": str(folders[family]),
        "prediction_type": original(family).scheduler.config.prediction_type,
    }
    erasure = esd_fast.erase(base, "red apple", train_method="esd-x-strict", **settings)
    assert erasure.manifest["model"] == str(base)

    expected = copy.deepcopy(original(family))
    erasure.apply(expected)
    drawn = images(expected)
    assert not torch.equal(drawn, images(original(family)))

    file = tmp_path / "erased.safetensors"
    erasure.export(file, "single-file")
    assert {n: (t.dtype, t.shape) for n, t in load_file(file).items()} == {
        n: (t.dtype, t.shape) for n, t in load_file(base).items()
    }
    back = read_single_file(file, family, folders[family], torch.float32)
    assert_same(state(back), state(expected))
    assert torch.equal(images(back), drawn)

    folder = tmp_path / "erased"
    erasure.export(folder, "diffusers", model_config=str(folders[family]))
    back = pipeline_class(family).from_pretrained(folder, local_files_only=True)
    assert_same(state(back), state(expected))
    assert torch.equal(images(back), drawn)

    delta = tmp_path / "delta.safetensors"
    erasure.export(delta, "delta")
    back = copy.deepcopy(original(family))
    assert not back.unet.load_state_dict(load_file(delta), strict=False).unexpected_keys
    assert torch.equal(images(back), drawn)

    pytest.importorskip("peft")
    for format in ("lora", "kohya"):
        lora = tmp_path / f"{format}.safetensors"
        report = erasure.export(lora, format, energy=1.0, dtype="float32").lora
        assert report is not None
        assert report.kept == pytest.approx(1, abs=1e-9)
        assert report.left_out == []
        back = copy.deepcopy(original(family))
        back.load_lora_weights(lora)
        torch.testing.assert_close(images(back), drawn, atol=2e-4, rtol=0)

    # what our own loader reads is what diffusers reads
    config = esd_fast.EraseConfig(
        "x", **{k: settings[k] for k in ("device", "dtype", "model_config")}
    )
    assert_same(state(load_model(file, config).pipeline), state(expected))
