"""Failures that users of such tools reported (threads named in each test), made impossible.

Those with a home elsewhere: schedulers and prediction types in test_presets, names in test_prompts, folders and
devices in test_models, files in test_erasure, seeds, precision and checkpointing in test_esd.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import esd_fast
from esd_fast import EraseConfig
from esd_fast.objective import Objective

from . import pipelines
from .pipelines import GOLDEN, SHORT, relative, same_bits, watched_run
from .truth.reference_loops import encode

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def fast(concept: str = "red apple", **settings: Any) -> EraseConfig:
    return EraseConfig(concept=concept, **SHORT | settings)


def erase(pipe: Any, concept: str = "cat", **settings: Any) -> esd_fast.Erasure:
    return esd_fast.erase(pipe, concept, preset="fast", **SHORT | settings)


def equal(a: esd_fast.Erasure, b: esd_fast.Erasure) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        same_bits(b.tensors[n], t) for n, t in a.tensors.items()
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_target_is_right_under_every_scheduler(scheduler: Any, spacing: str) -> None:
    """diffusers#8281: what the UNet is asked is what trains: scaled inputs, float timesteps, duplicates."""
    pipe, plain = pipelines.pipeline(), pipelines.pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    config = fast(iterations=9, num_inference_steps=9)
    ours = watched_run(pipe, config)
    objective = Objective(config.target_anchor, config.negative_guidance)
    null, concept = encode(plain, "", 1), encode(plain, config.concept, 1)
    for step in ours.steps:
        x, t = step.samples.latents, step.samples.timesteps
        assert t.dtype == ours.timesteps.dtype
        assert t.item() in ours.timesteps.tolist()
        with torch.no_grad():
            e0, ep = (plain.unet(x, t, e).sample for e in (null, concept))
        assert relative(objective.target(step.samples), ep - 2.0 * (ep - e0)) <= 1e-5


def test_every_entry_of_pndms_list_is_a_sample() -> None:
    """diffusers#9090: 5 steps are 6 timesteps, one twice, with two different latents there."""
    ours = watched_run(pipelines.pipeline("sd-pndm"), fast(iterations=6, num_inference_steps=5))
    seen = sorted(int(s.samples.timesteps) for s in ours.steps)
    assert seen == sorted(ours.timesteps.tolist())
    assert len(set(seen)) == 5
    twice = [s.samples.latents for s in ours.steps if seen.count(int(s.samples.timesteps)) == 2]
    assert relative(*twice) > 1e-3


def test_velocity_models_learn() -> None:
    """UCE#33, sliders#60: a v-prediction model must not be left as it was."""
    losses = watched_run(
        pipelines.pipeline("sd-v-ddim"), fast(iterations=100, num_inference_steps=10)
    ).erasure.manifest["losses"]
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


@pytest.mark.parametrize("concept", ["cat, dog", "a cat in ink style", 'the "red" apple', "AC/DC"])
def test_concept_reaches_the_text_encoder_as_it_is(concept: str) -> None:
    """erasing#34, UCE#14: a comma is no list. MACE#29: style and object together are one concept."""
    pipe = pipelines.pipeline()
    texts = []
    encode_prompt = pipe.encode_prompt

    def listen(prompt: str, *args: Any, **kwargs: Any) -> Any:
        texts.append(prompt)
        return encode_prompt(prompt, *args, **kwargs)

    pipe.encode_prompt = listen
    erasure = erase(pipe, concept)
    assert texts == ["", concept]
    assert erasure.manifest["concept"] == concept
    assert len(erasure.manifest["losses"]) == SHORT["iterations"]


def test_long_prompt_trains_and_says_what_was_lost() -> None:
    """sd-scripts#943: 127 tokens."""
    with pytest.warns(UserWarning, match="lost: .*zebra"):
        erasure = erase(pipelines.pipeline(), "cat " * 150 + "zebra")
    assert len(erasure.manifest["losses"]) == SHORT["iterations"]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_size(batch: int) -> None:
    """ai-toolkit#554 and #675, sliders#98; a last chunk of trajectories that is smaller, too."""
    ours = watched_run(
        pipelines.pipeline(), fast(batch_size=batch, iterations=7, collect_batch_size=2)
    )
    assert [len(s.samples) for s in ours.steps] == [batch] * 7
    for step in ours.steps:
        target = Objective("concept", 2.0).target(step.samples)
        loss = (step.noise_pred_student - target).square().mean().item()
        assert step.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("method", ["xattn", "xattn-strict", "noxattn", "full"])
def test_aliases_train(method: str) -> None:
    """erasing README: --train_method xattn once selected nothing and trained nothing."""
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    erasure = erase(pipe, train_method=method)
    after = pipelines.weights(pipe)
    assert erasure.tensors
    assert all(not torch.equal(before[n], after[n]) for n in erasure.tensors)


def test_resolution_is_the_models_own() -> None:
    """erasing esd_sd.py: 1024 pixels on a model of 512."""
    ours = watched_run(pipelines.pipeline(), fast())
    assert {s.samples.latents.shape for s in ours.steps} == {(1, 4, 8, 8)}
    erasure = erase(pipelines.pipeline(), resolution=128)
    assert erasure.manifest["resolution"] == 128


def test_channels_last_unet(tmp_path: Any) -> None:
    """ComfyUI#3923, diffusers PR#10761: saved, and the caller's layout stays."""
    pipe = pipelines.pipeline()
    pipe.unet.to(memory_format=torch.channels_last)
    settings = {"train_method": "esd-all"}
    erasure = erase(pipe, **settings)
    plain = erase(pipelines.pipeline(), **settings)
    assert erasure.manifest["losses"] == pytest.approx(plain.manifest["losses"], rel=1e-3)
    weight = pipe.unet.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(t.is_contiguous() for t in erasure.tensors.values())
    loaded = esd_fast.load(erasure.save(tmp_path))
    assert equal(loaded, erasure)
    fresh = pipelines.pipeline()
    loaded.apply(fresh)
    assert torch.equal(fresh.unet.down_blocks[0].resnets[0].conv1.weight, weight)


def test_unet_that_asks_for_no_gradient() -> None:
    pipe = pipelines.pipeline()
    pipe.unet.requires_grad_(False)
    assert equal(erase(pipe), erase(pipelines.pipeline()))
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_deep_copied_pipeline() -> None:
    import copy

    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    other = copy.deepcopy(pipe)
    assert equal(erase(other), erase(pipelines.pipeline()))
    pipelines.assert_same_weights(pipe, before)


def test_pipeline_built_from_parts_without_vae_and_checker() -> None:
    """diffusers#5259: the safety checker is never needed; nor is the VAE, which stays where it is."""
    pipe = pipelines.pipeline()
    parts = StableDiffusionPipeline(
        **{
            k: v
            for k, v in pipe.components.items()
            if k not in ("safety_checker", "feature_extractor")
        },
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    parts.vae.to("meta")  # any use would fail
    erasure = erase(parts)
    assert erasure.manifest["model"] == "pipeline"
    assert equal(erasure, erase(pipelines.pipeline()))


def test_a_folder_is_the_live_pipeline() -> None:
    erasure = erase(GOLDEN / "sd-ddim", device="cpu", dtype="float32")
    assert equal(erasure, erase(pipelines.pipeline()))
    assert erasure.manifest["model"] == str(GOLDEN / "sd-ddim")


def test_unused_settings_of_the_caller_do_not_matter() -> None:
    """Attention slicing off and on, another default dtype, a seeded global generator."""
    expected = erase(pipelines.pipeline())
    torch.manual_seed(3)
    pipe = pipelines.pipeline()
    pipe.unet.train()
    torch.set_default_dtype(torch.float64)
    try:
        ours = erase(pipe)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(ours, expected)


def test_settings_import_no_torch_and_no_numpy(run_python: Callable[..., str]) -> None:
    """A wrong argument is refused at once, not after seconds of imports."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import esd_fast, esd_fast.cli\n"
        "esd_fast.EraseConfig.from_preset('fast', 'cat')\n"
        "import json; print(json.dumps([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules]))"
    )
    root = next(p for p in sys.modules["esd_fast"].__path__).removesuffix("esd_fast")
    assert json.loads(run_python("-c", code, root)) == []
