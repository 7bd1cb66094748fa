"""SDXL: the UNet is given, and trained on, what diffusers' own pipeline gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast.collect import Teacher, TeacherSamples, collect_all
from esd_fast.config import EraseConfig
from esd_fast.erasure import load
from esd_fast.esd import encode_prompts
from esd_fast.models import load_model
from esd_fast.objective import Objective
from esd_fast.parameters import trainable_names
from esd_fast.plan import Rollout
from esd_fast.schedules import scheduler_for
from esd_fast.vocabulary import second_moment

from . import pipelines
from .pipelines import SHAPE, SHORT, golden_run, relative, watched_run, worst_move

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # its schedulers
STEPS, GUIDANCE = 5, 3.0


def sdxl(scheduler: str = "", dtype: torch.dtype = torch.float32) -> Any:
    import diffusers

    pipe = pipelines.pipeline("sdxl-ddim", dtype)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def collected(pipe: Any, batch: int, pixels: int = 64) -> TeacherSamples:
    config = EraseConfig(concept="a red cat", num_inference_steps=STEPS)
    model = load_model(pipe, config)
    teacher = Teacher(
        unet=model.unet,
        scheduler=scheduler_for(pipe.scheduler, config),
        prompts=encode_prompts(model, config, pixels),
        rolled="concept",
        asked=("null", "concept"),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    return collect_all(teacher, Rollout(noise(batch), steps=1000), lambda _: None)


def drawn(pipe: Any, batch: int) -> tuple[list[Any], list[Any], list[Any]]:
    """diffusers' own way: what the UNet got at each step, with what, and the latents after it."""
    inputs: list[torch.Tensor] = []
    asked_with: list[dict[str, Any]] = []
    after: list[tuple[int, torch.Tensor]] = []

    def listen(_: Any, given: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        inputs.append(given[0])
        asked_with.append(named)

    def remember(_: Any, call: int, timestep: Any, named: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        after.append((int(timestep), named["latents"]))
        return named

    hook = pipe.unet.register_forward_pre_hook(listen, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt=["a red cat"] * batch,
        negative_prompt=[""] * batch,
        latents=noise(batch),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        output_type="latent",
        callback_on_step_end=remember,
    )
    hook.remove()
    return inputs, asked_with, after


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "scheduler", ["", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
def test_collecting_is_the_pipelines_own_trajectory(scheduler: str, batch: int) -> None:
    ours = collected(sdxl(scheduler), batch)
    inputs, asked_with, after = drawn(sdxl(scheduler), batch)
    calls = len(inputs)
    assert len(ours) == batch * calls
    assert ours.timesteps[:calls].tolist() == pytest.approx([t for t, _ in after], abs=1)
    for call in range(calls):
        null, concept = inputs[call].chunk(2)
        assert torch.equal(null, concept)
        assert relative(ours.latents[call::calls], concept) <= 1e-5
    if not scheduler:  # DDIM's input is the state itself
        for call, (_, latents) in enumerate(after[:-1]):
            assert relative(ours.latents[call + 1 :: calls], latents) <= 1e-5
    assert asked_with[0]["encoder_hidden_states"].shape == (2 * batch, 77, 48)


@pytest.mark.parametrize("pixels", [64, 128])
def test_conditioning_is_the_pipelines(pixels: int) -> None:
    """Both encoders' states side by side, the second one's pooled embedding, six numbers of size;
    the empty prompt encoded, whatever `force_zeros_for_empty_prompt` says."""
    pipe = sdxl()
    assert pipe.config.force_zeros_for_empty_prompt
    config = EraseConfig(concept="a red cat")
    prompts = encode_prompts(load_model(pipe, config), config, pixels)
    states, null_states, pooled, null_pooled = pipe.encode_prompt("a red cat", negative_prompt="")
    times = pipe._get_add_time_ids((pixels, pixels), (0, 0), (pixels, pixels), states.dtype, 32)
    for name, text, summary in (
        ("concept", states, pooled),
        ("null", null_states, null_pooled),
    ):
        added = prompts[name].added_cond_kwargs
        assert added is not None
        assert torch.equal(prompts[name].encoder_hidden_states, text)
        assert torch.equal(added["text_embeds"], summary)
        assert torch.equal(added["time_ids"], times)
    assert null_states.abs().max() > 0


def test_encoders_go_home_and_the_vae_stays() -> None:
    pipe = sdxl()
    pipe.vae.to("meta")  # any use would fail
    erasure = esd_fast.erase(pipe, "cat", **SHORT)
    assert pipe.text_encoder.device == pipe.text_encoder_2.device == torch.device("cpu")
    assert erasure.manifest["family"] == "sdxl"
    assert erasure.manifest["resolution"] == 64


def test_long_prompt_says_what_was_lost() -> None:
    with pytest.warns(UserWarning, match=r"lost: .*zebra") as told:
        load_model(sdxl(), EraseConfig("cat")).family.encode(sdxl(), "cat " * 150 + "zebra", 64)
    assert len(told) == 1


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_erases_saves_applies_and_reverts(batch: int, tmp_path: Path) -> None:
    """diffusers#4324 and #4649: added_cond_kwargs in every forward, for every batch."""
    pipe, fresh = sdxl(), sdxl()
    before = pipelines.weights(pipe)
    erasure = esd_fast.erase(pipe, "cat", **SHORT, batch_size=batch, keep_vocabulary=1.0)
    assert erasure.tensors.keys() == set(trainable_names(pipe.unet, "esd-x", "sdxl"))
    assert all(not torch.equal(t, before[n]) for n, t in erasure.tensors.items())
    loaded = load(erasure.save(tmp_path))
    loaded.apply(fresh)
    pipelines.assert_same_weights(fresh, pipelines.weights(pipe))
    loaded.revert(fresh)
    pipelines.assert_same_weights(fresh, before)
    erasure.revert(pipe)
    pipelines.assert_same_weights(pipe, before)


def test_vocabulary_is_that_of_both_encoders_side_by_side() -> None:
    pipe = sdxl()
    words = ["cat", "dog", "house"]
    found = second_moment(load_model(pipe, EraseConfig("cat")), words, 64)
    states = torch.cat([pipe.encode_prompt(w, negative_prompt="")[0][0] for w in ("", *words)])
    assert relative(found, states.double().T @ states.double() / len(states)) <= 1e-5


def test_its_script_leaves_embeddings_and_ends_alone() -> None:
    for method in ("esd-u", "esd-all"):
        names = trainable_names(sdxl().unet, method, "sdxl")
        assert all("block" in n and "emb" not in n for n in names)


@pytest.mark.parametrize(
    ("method", "rate"), [("esd-x", 2e-4), ("xattn-strict", 2e-4), ("esd-u", 1e-5), ("full", 1e-5)]
)
def test_recipe_of_the_family(method: str, rate: float) -> None:
    """upstream.md's esd_sdxl column, where nothing else is asked for; in the manifest, too."""
    config = EraseConfig.from_preset("reference", "cat", "some/folder", train_method=method)
    family = load_model(sdxl(), config).family
    resolved = config.with_recipe(family)
    assert (resolved.learning_rate, resolved.negative_guidance) == (rate, 1.0)
    assert (resolved.guidance_scale, resolved.num_inference_steps) == (2.0, 50)
    assert resolved.iterations == 200
    asked = EraseConfig.from_preset("fast", "cat", "x", learning_rate=3e-5, guidance_scale=3.0)
    kept = asked.with_recipe(family)
    assert (kept.learning_rate, kept.guidance_scale, kept.negative_guidance) == (3e-5, 3.0, 1.0)
    assert EraseConfig("cat").with_recipe(family) == EraseConfig("cat")  # all of it is said
    paper = EraseConfig.from_preset("paper", "cat", "some/folder")
    assert paper.with_recipe(family) == paper


def test_manifest_records_what_the_family_made_of_it() -> None:
    erasure = esd_fast.erase(sdxl(), "cat", iterations=1, num_inference_steps=2)
    assert erasure.manifest["config"]["learning_rate"] == 2e-4
    assert erasure.manifest["config"]["guidance_scale"] == 2.0
    assert erasure.manifest["target"] == {"anchor": "concept", "eta": 0.0}


def test_the_reference_scripts_run() -> None:
    """What the public SDXL script computed (tests/golden)."""
    settings, truth = golden_run("sdxl-ddim-esd-x")
    pipe = sdxl()
    config = EraseConfig.from_preset(
        "reference",
        settings["concept"],
        pipe,
        iterations=len(settings["seeds"]),
        **{n: settings[n] for n in ("learning_rate", "negative_guidance", "guidance_scale")},
    )
    pipe.scheduler.set_timesteps(50)
    rollouts = [
        Rollout(
            torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)),
            steps=index,
            query=int(pipe.scheduler.timesteps[index]),
        )
        for seed, index in zip(settings["seeds"], settings["timestep_indices"], strict=True)
    ]
    ours = watched_run(pipe, config, rollouts)
    final = {n.removeprefix("final."): t for n, t in truth.items() if n.startswith("final.")}
    objective = Objective("concept", settings["negative_guidance"])
    for i, step in enumerate(ours.steps):
        assert relative(step.samples.latents, truth[f"latents.{i}"]) <= 1e-5
        assert relative(objective.target(step.samples), truth[f"target.{i}"]) <= 1e-5
        assert step.loss == pytest.approx(settings["losses"][i], rel=1e-5)
    assert worst_move(ours.start, ours.erasure.tensors, final) <= 1e-3
