"""The plain loops against what the public reference scripts computed, and against each other where those are silent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from .reference_loops import (
    Run,
    compvis_alphas_cumprod,
    compvis_name,
    compvis_timesteps,
    ddim_step,
    encode,
    frozen_rollout_reference,
    noise_from_seeds,
    paper_diffusers,
    paper_ldm,
    predict_guided,
    select_trainable,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FROZEN_RUNS = [
    "sd-pndm-esd-x",
    "sd-pndm-strict-from",
    "sd-ddim-esd-u",
    "sd-ddim-selfattn",
    "sd-v-ddim-esd-x",
]


def load_pipe(name: str) -> Any:
    return StableDiffusionPipeline.from_pretrained(
        GOLDEN / name, local_files_only=True
    )  # float32 files


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(
        GOLDEN / f"{name}.safetensors"
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def move_difference(start: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """||our move - their move|| / ||their move||, in float64: Adam hides errors in the weights, not in the moves."""
    start, ours, theirs = start.double(), ours.double(), theirs.double()
    return relative(ours - start, theirs - start)


def worst_move(
    start: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> float:
    assert set(start) == set(ours) == set(theirs)
    return max(move_difference(start[n], ours[n], theirs[n]) for n in start)


def assert_reproduces(run: Run, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    assert len(run.records) == len(settings["losses"]) == 4
    for k, record in enumerate(run.records):
        assert relative(record.latents, tensors[f"latents.{k}"]) <= 1e-5
        assert relative(record.target, tensors[f"target.{k}"]) <= 1e-5
        if f"noise_pred_student.{k}" in tensors:
            assert relative(record.noise_pred_student, tensors[f"noise_pred_student.{k}"]) <= 1e-5
        assert record.loss == pytest.approx(settings["losses"][k], rel=1e-5)
    final = {n.removeprefix("final."): t for n, t in tensors.items() if n.startswith("final.")}
    assert worst_move(run.start, run.final, final) <= 1e-3


@pytest.mark.parametrize("name", FROZEN_RUNS)
def test_frozen_rollout_reproduces_esd_sd(name: str) -> None:
    settings, tensors = load_golden(name)
    pipe = load_pipe(settings["model"])
    run = frozen_rollout_reference(
        pipe,
        settings["concept"],
        erase_from=settings["erase_from"],
        noise=noise_from_seeds(settings["seeds"], (1, 4, 8, 8)),
        indices=settings["timestep_indices"],
        trainable=select_trainable(pipe.unet, settings["train_method"]),
        negative_guidance=settings["negative_guidance"],
        guidance_scale=settings["guidance_scale"],
        num_inference_steps=settings["num_inference_steps"],
        learning_rate=settings["learning_rate"],
    )
    assert_reproduces(run, settings, tensors)


def test_paper_diffusers_reproduces_alt() -> None:
    settings, tensors = load_golden("alt-student-xattn")
    assert settings["anchor"] == "null"
    assert settings["erase_from"] == settings["concept"]
    pipe = load_pipe(settings["model"])
    run = paper_diffusers(
        pipe,
        settings["concept"],
        noise=[tensors[f"noise.{k}"] for k in range(4)],
        indices=settings["rollout_steps"],
        trainable=select_trainable(pipe.unet, settings["train_method"]),
        negative_guidance=settings["negative_guidance"],
        guidance_scale=settings["guidance_scale"],
        num_inference_steps=settings["num_inference_steps"],
        learning_rate=settings["learning_rate"],
    )
    assert [int(r.timestep) for r in run.records] == settings["timesteps_queried"]
    assert_reproduces(run, settings, tensors)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = load_pipe("sd-ddim")
    before = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    frozen_rollout_reference(
        pipe,
        "cat",
        noise=noise_from_seeds([1], (1, 4, 8, 8)),
        indices=[1],
        trainable=lambda n: "attn2" in n,
    )
    assert all(torch.equal(before[n], t) for n, t in pipe.unet.state_dict().items())
    assert all(p.requires_grad for p in pipe.unet.parameters())


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy 2 in diffusers' schedulers
@pytest.mark.parametrize("index", [0, 1, 7, 19])
@pytest.mark.parametrize("scheduler", ["euler", "dpm++ of order 1"])
def test_schedulers_that_are_ddim_in_disguise(scheduler: str, index: int) -> None:
    """Deterministic Euler in sigma, and first-order DPM-Solver++, are DDIM: same UNet inputs, same targets."""
    settings = {
        "erase_from": "a fish",
        "noise": noise_from_seeds([index], (2, 4, 8, 8)),
        "indices": [index],
        "trainable": lambda n: "attn2" in n,
        "num_inference_steps": 20,
        "learning_rate": 1e-3,
    }
    pipe = load_pipe("sd-ddim")
    spacing = (
        "leading" if scheduler == "euler" else "trailing"
    )  # where both have the same timesteps
    config = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing).config
    pipe.scheduler = DDIMScheduler.from_config(config)
    truth = frozen_rollout_reference(pipe, "cat", **settings).records[0]
    if scheduler == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1)
    ours = frozen_rollout_reference(pipe, "cat", **settings).records[0]
    assert float(ours.timestep) == pytest.approx(float(truth.timestep), abs=1e-3)
    assert relative(ours.model_input, truth.model_input) <= 1e-4
    assert relative(ours.target, truth.target) <= 1e-4
    if scheduler == "euler" and index < 19:
        assert relative(ours.latents, truth.latents) > 0.01  # scale_model_input did something


# ------------------------------------------------------------------------------------ the paper's script has no golden


def test_compvis_list() -> None:
    assert compvis_timesteps(50) == list(range(1, 982, 20))
    assert compvis_timesteps(20) == list(range(1, 952, 50))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_our_ddim_step_is_the_ddim_step(prediction_type: str) -> None:
    """diffusers' DDIM with SD's config (leading, offset 1, set_alpha_to_one false) has the same list and levels."""
    scheduler = DDIMScheduler.from_config(
        load_pipe("sd-ddim").scheduler.config, prediction_type=prediction_type
    )
    scheduler.set_timesteps(50)
    ascending = compvis_timesteps(50)
    assert scheduler.timesteps.tolist() == ascending[::-1]
    alphas = compvis_alphas_cumprod(scheduler.config)
    latents, output = noise_from_seeds([0, 1], (2, 4, 8, 8))
    for k, t in enumerate(ascending):
        ours = ddim_step(
            latents,
            output,
            alphas[t],
            alphas[ascending[k - 1]] if k else alphas[0],
            prediction_type,
        )
        assert relative(ours, scheduler.step(output, t, latents).prev_sample) <= 1e-5


@pytest.mark.parametrize("pipe_name", ["sd-ddim", "sd-v-ddim"])
@pytest.mark.parametrize(
    ("i", "first", "last", "count"),
    [(0, 901, 1, 19), (1, 901, 1, 19), (2, 901, 51, 18), (19, 901, 901, 1)],
)
def test_paper_rollout(pipe_name: str, i: int, first: int, last: int, count: int) -> None:
    """The first rollout (student still equal to teacher) by hand with diffusers' DDIM, batch of two."""
    pipe = load_pipe(pipe_name)
    noise = noise_from_seeds([i], (2, 4, 8, 8))
    run = paper_ldm(
        pipe,
        "red apple",
        noise=noise,
        indices=[i],
        timesteps=[50 * i + 3],
        trainable=select_trainable(pipe.unet, "ldm-xattn"),
        num_inference_steps=20,
        learning_rate=1e-3,
    )
    pipe.scheduler.set_timesteps(20)
    walked = [t for t in pipe.scheduler.timesteps if last <= t <= first]
    assert len(walked) == count
    latents, null, concept = noise[0], encode(pipe, "", 2), encode(pipe, "red apple", 2)
    with torch.no_grad():
        for t in walked:
            output = predict_guided(pipe.unet, latents, t, null, concept, 3.0)
            latents = pipe.scheduler.step(output, t, latents).prev_sample
        e0 = pipe.unet(latents, 50 * i + 3, null).sample
        ep = pipe.unet(latents, 50 * i + 3, concept).sample
    record = run.records[0]
    assert relative(record.latents, latents) <= 1e-5
    assert relative(record.target, 2 * e0 - ep) <= 1e-5  # e0 - 1 (ep - e0)
    assert relative(record.noise_pred_student, ep) <= 1e-5
    assert record.timestep.tolist() == [50 * i + 3] * 2


def test_student_recipes_roll_out_with_the_student_on_the_concept() -> None:
    """The second rollout sees the moved student; erase_from changes the anchor and the student's prompt only."""
    pipe = load_pipe("sd-ddim")
    common = {
        "noise": noise_from_seeds([5, 5], (1, 4, 8, 8)),
        "trainable": select_trainable(pipe.unet, "xattn"),
        "negative_guidance": 1.0,
        "num_inference_steps": 20,
        "learning_rate": 1e-2,
    }
    for recipe, draws in (
        (paper_ldm, {"indices": [4, 4], "timesteps": [210, 210]}),
        (paper_diffusers, {"indices": [14, 14]}),
    ):
        plain = recipe(pipe, "cat", **common, **draws)
        other = recipe(pipe, "cat", erase_from="a fish", **common, **draws)
        first, second = plain.records
        assert relative(second.latents, first.latents) > 1e-4
        assert torch.equal(other.records[0].latents, first.latents)
        x, t = first.latents, first.timestep
        with torch.no_grad():
            e0, ep, ef = (pipe.unet(x, t, encode(pipe, p, 1)).sample for p in ("", "cat", "a fish"))
        assert relative(first.target, e0 - (ep - e0)) <= 1e-5
        assert relative(other.records[0].target, ef - (ep - e0)) <= 1e-5
        assert relative(other.records[0].noise_pred_student, ef) <= 1e-5


# ------------------------------------------------------------------------------------------------- what is trained


@pytest.fixture(scope="module")
def sd15_unet() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def sdxl_unet() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def millions(unet: Any, names: list[str]) -> float:
    parameters = dict(unet.named_parameters())
    return sum(parameters[n].numel() for n in names) / 1e6


@pytest.mark.parametrize(
    ("method", "expected", "tensors"),
    [
        ("esd-x", 43.96, 80),
        ("xattn", 43.96, 80),
        ("esd-x-strict", 19.17, 32),
        ("xattn-strict", 19.17, 32),
        ("esd-u", 815.4, None),
        ("noxattn", 815.4, None),
        ("esd-all", 859.3, None),
        ("full", 859.3, None),
        ("selfattn", 49.6, None),
        ("ldm-full", 859.5, None),
        ("ldm-xattn", 43.96, 80),
        ("ldm-xlayer", None, 10),
        ("ldm-selflayer", None, 10),
    ],
)
def test_sd_selections_have_the_published_sizes(
    sd15_unet: Any, method: str, expected: float | None, tensors: int | None
) -> None:
    names = select_trainable(sd15_unet, method)
    if expected is not None:
        assert millions(sd15_unet, names) == pytest.approx(
            expected, abs=0.051 if expected > 45 else 0.0051
        )
    if tensors is not None:
        assert len(names) == tensors


@pytest.mark.parametrize(
    ("method", "expected"),
    [("esd-x", 545.7), ("esd-x-strict", 340.8), ("esd-u", 1996), ("esd-all", 2542)],
)
def test_sdxl_selections_have_the_published_sizes(
    sdxl_unet: Any, method: str, expected: float
) -> None:
    names = select_trainable(sdxl_unet, method)
    assert millions(sdxl_unet, names) == pytest.approx(
        expected, abs=0.51 if expected > 1000 else 0.051
    )


def test_ldm_selections_in_diffusers_names(sd15_unet: Any) -> None:
    everything = {n for n, _ in sd15_unet.named_parameters()}
    notime = set(select_trainable(sd15_unet, "ldm-notime"))
    noxattn = set(select_trainable(sd15_unet, "ldm-noxattn"))
    assert {n.split(".")[0] for n in everything - notime} == {
        "time_embedding",
        "conv_norm_out",
        "conv_out",
    }
    assert notime - noxattn == {n for n in everything if "attn2" in n}
    assert any("attn1.to_out.0" in n for n in noxattn)  # holds "out." but does not begin with it
    assert any("time_emb_proj" in n for n in noxattn)  # CompVis calls it emb_layers
    assert {n.partition(".transformer")[0] for n in select_trainable(sd15_unet, "ldm-xlayer")} == {
        "up_blocks.2.attentions.0",
        "up_blocks.2.attentions.2",
    }
    assert {
        n.partition(".transformer")[0] for n in select_trainable(sd15_unet, "ldm-selflayer")
    } == {
        "down_blocks.1.attentions.0",
        "down_blocks.2.attentions.0",
    }


@pytest.mark.parametrize("which", ["sd15", "golden"])
def test_compvis_names_are_what_diffusers_converts_from(which: str, sd15_unet: Any) -> None:
    unet = sd15_unet if which == "sd15" else load_pipe("sd-ddim").unet
    parameters = dict(unet.named_parameters())
    theirs = {f"model.diffusion_model.{compvis_name(unet, n)}": p for n, p in parameters.items()}
    assert len(theirs) == len(parameters)
    converted = convert_ldm_unet_checkpoint(dict(theirs), unet.config)
    assert set(converted) == set(parameters)
    assert all(converted[n] is p for n, p in parameters.items())


@pytest.mark.parametrize("method", ["", "attn2", "ldm-attn", "esd-y"])
def test_unknown_method_is_refused(sd15_unet: Any, method: str) -> None:
    with pytest.raises(ValueError, match="unknown train method"):
        select_trainable(sd15_unet, method)
