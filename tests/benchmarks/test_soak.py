"""Nothing is left behind by a run: not by one that ends well, is stopped, fails, or has its own thread."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from soak import EXACT, RECIPES, Soak

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    pipeline = StableDiffusionPipeline.from_pretrained(GOLDEN / "sd-ddim", local_files_only=True)
    return Soak(pipeline, tmp_path)


def test_every_kind_of_run_leaves_nothing(soak: Soak) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in RECIPES:  # what is made once in a process
            soak.run()
        before = asdict(soak.held())
        for _ in RECIPES:
            soak.run()
        after = asdict(soak.held())
    finally:
        torch.set_num_threads(threads)
    assert soak.runs == 2 * len(RECIPES)
    assert {name: after[name] for name in EXACT} == {name: before[name] for name in EXACT}
    assert not after["hooks"]
    assert not after["classes"]
    assert after["resident"] < before["resident"] + 16 * 2**20  # noise; a leaked run holds tensors


def test_what_is_left_would_be_seen(soak: Soak) -> None:
    before = soak.held()
    unet = soak.pipeline.unet
    handle = unet.conv_in.register_forward_hook(lambda *_: None)
    unet.kept = [torch.zeros(1000)]
    unet.conv_in.__class__ = type("Other", (type(unet.conv_in),), {})
    with (soak.folder / "open").open("w"):
        held = soak.held()
    handle.remove()
    assert held.hooks == before.hooks + 1
    assert held.tensors == before.tensors + 1
    assert held.tensor_bytes == before.tensor_bytes + 4000
    assert held.classes == before.classes + 1
    assert held.files == before.files + 1
    assert held.attributes > before.attributes
