"""dtype "auto" on the CPU: bfloat16 for big UNets where the processor gains from it."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_fast import processor
from esd_fast.config import EraseConfig
from esd_fast.demo import model_path
from esd_fast.models import load_model, resolve_dtype
from esd_fast.processor import Probe, deepest, dtype_for, probe

CPU = torch.device("cpu")
SD1 = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}  # diffusers' defaults


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Probe(1280, float32=2.0, bfloat16=1.0), torch.bfloat16),
        (Probe(1280, float32=1.0, bfloat16=1.0), torch.float32),
        ("bfloat16 packing failed when tried", torch.float32),
    ],
)
def test_a_big_model_gets_what_is_fast(monkeypatch, found, expected) -> None:
    asked = []
    monkeypatch.setattr(processor, "probe", lambda *shape: asked.append(shape) or found)
    assert dtype_for(SD1) == expected
    assert asked == [(1280, 8)]
    assert resolve_dtype("auto", CPU, SD1) == expected
    assert resolve_dtype("float32", CPU, SD1) == torch.float32
    assert resolve_dtype("bfloat16", CPU, SD1) == torch.bfloat16


def test_a_small_model_stays_float32(monkeypatch) -> None:
    monkeypatch.setattr(processor, "probe", lambda *_: pytest.fail("no need to ask"))
    config = UNet2DConditionModel.load_config(model_path(), subfolder="unet")
    assert dtype_for(config) == torch.float32
    assert load_model(None, EraseConfig("cat", device="cpu")).dtype == torch.float32


def test_the_probe_is_taken_once() -> None:
    assert deepest({"block_out_channels": (32, 64), "sample_size": 8}) == (64, 4)
    found = probe(64, 4)
    assert probe(64, 4) is found
    assert isinstance(found, str) or (found.float32 > 0 and found.bfloat16 > 0)
    assert str(Probe(1280, 3.0, 2.0)) == "bfloat16 1.5 times as fast as float32 at 1280 channels"
