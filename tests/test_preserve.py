"""Preserved prompts: their samples are the frozen model's own answers, and hold it to them."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast import EraseConfig
from esd_fast.cli import main
from esd_fast.demo import world
from esd_fast.engine import plan_of
from esd_fast.esd import run
from esd_fast.fit import FitStep
from esd_fast.graphed_steps import RunGraphs
from esd_fast.graphs import Twin
from esd_fast.models import load_model
from esd_fast.objective import Objective
from esd_fast.plan import plan_preserved, plan_rollouts
from esd_fast.preserve import DEFAULT_NUMBER, GENERAL_PROMPTS, resolved
from esd_fast.schedules import scheduler_for

from . import pipelines
from .pipelines import SHAPE, relative, same_bits, watched_run
from .truth.reference_loops import encode

one_thread = pipelines.one_thread
KEPT = ("a fish", "bicycle", "red apple")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy 2 in diffusers' schedulers


def config_for(**settings: Any) -> EraseConfig:
    chosen: dict[str, Any] = {
        "concept": "cat",
        "iterations": 8,
        "num_inference_steps": 4,
        "learning_rate": 1e-3,
        "preserve": KEPT,
        "preserve_weight": 0.5,
    }
    return EraseConfig(**chosen | settings)


# ------------------------------------------------------------------------------------------ what is collected


@torch.no_grad()
def plain_states(pipe: Any, noise: Any, prompt: str, steps: int) -> list[Any]:
    """(UNet input, timestep, prediction) of a trajectory without guidance, as diffusers takes it."""
    scheduler, states = copy.deepcopy(pipe.scheduler), []
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    embedding = encode(pipe, prompt, 1)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t)
        said = pipe.unet(given, t, encoder_hidden_states=embedding).sample
        states.append((given, float(t), said))
        latents = scheduler.step(said, t, latents).prev_sample
    return states


@pytest.mark.parametrize("by", ["table", "scheduler"])
@pytest.mark.parametrize(
    "more", [{}, {"erase_from": "animal"}, {"anchor": "null"}, {"concept": ["cat", "dog"]}]
)
def test_samples_are_the_models_own_answers(
    by: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "scheduler":
        monkeypatch.setattr("esd_fast.collect.probe", lambda *_: "so the test wants it")
    config = config_for(**more)
    pipe = pipelines.pipeline()
    timesteps = scheduler_for(pipe.scheduler, config).timesteps
    first = len(config.concepts)
    rollouts = plan_preserved(config, timesteps, SHAPE, range(first, first + 3))
    truth = [
        (r.concepts[0], *state)
        for r in rollouts
        for state in plain_states(pipe, r.noise, KEPT[r.concepts[0] - first], 4)
    ]
    found = 0
    objective = Objective(config.target_anchor, config.negative_guidance)
    for step in watched_run(pipe, config).steps:
        erased, kept = step.samples[:1], step.samples[1:]
        assert erased.concepts is not None
        assert kept.concepts is not None
        assert erased.concepts.item() < first <= kept.concepts.item()
        assert not torch.equal(erased.noise_pred_null, erased.noise_pred_concept)
        assert torch.equal(objective.target(kept), kept.noise_pred_concept)  # whatever the anchor
        told = (kept.concepts.item(), kept.timesteps.item())
        for number, given, t, said in truth:
            if (number, t) == told and relative(kept.latents, given) <= 1e-5:
                assert relative(kept.noise_pred_concept, said) <= 1e-4
                found += 1
    assert found == config.iterations


def test_erased_samples_are_those_of_a_run_that_preserves_nothing() -> None:
    ours = watched_run(pipelines.pipeline(), config_for())
    alone = watched_run(pipelines.pipeline(), config_for(preserve=()))
    for a, b in zip(ours.steps, alone.steps, strict=True):
        assert len(a.samples) == 2 * len(b.samples)
        assert torch.equal(a.samples.latents[:1], b.samples.latents)
        assert torch.equal(a.samples.noise_pred_concept[:1], b.samples.noise_pred_concept)


def test_every_prompt_has_a_trajectory_and_no_state_is_used_twice() -> None:
    timesteps = torch.arange(5)
    plan = plan_preserved(config_for(iterations=4), timesteps, SHAPE, range(1, 8))
    assert [r.concepts for r in plan] == [(k,) for k in range(1, 8)]
    plan = plan_preserved(config_for(iterations=18, batch_size=2), timesteps, SHAPE, range(1, 4))
    assert [r.concepts[0] for r in plan] == [1, 2, 3, 1, 2, 3, 1, 2]  # 36 states of 5 each
    assert not any(torch.equal(plan[0].noise, r.noise) for r in plan[1:])
    erased = plan_rollouts(config_for(), timesteps, SHAPE)
    assert not any(torch.equal(plan[0].noise, r.noise) for r in erased)
    steps = watched_run(pipelines.pipeline(), config_for(batch_size=2)).steps
    seen = [row.tobytes() for s in steps for row in s.samples.latents[2:].numpy()]
    assert len(set(seen)) == len(seen) == 16


def test_passes_are_those_that_the_unet_took() -> None:
    pipe, rows = pipelines.pipeline(), {"asked": 0, "trained": 0}

    def count(_: Any, arguments: tuple[Any, ...]) -> None:
        rows["trained" if torch.is_grad_enabled() else "asked"] += len(arguments[0])

    hook = pipe.unet.register_forward_pre_hook(count)
    erasure = esd_fast.erase(pipe, **vars_of(config_for()))
    hook.remove()
    told = erasure.manifest["unet_passes"]
    # 2 trajectories of 4 states and two prompts, 3 of the preserved ones with one
    assert told["collect"] == rows["asked"] == 2 * 4 * 2 + 3 * 4
    assert told["fit"] == 2 * rows["trained"] == 2 * 2 * 8


def vars_of(config: EraseConfig) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if k not in ("given", "train_method")}


# ------------------------------------------------------------------------------------------------ training


def test_the_loss_is_the_sum_of_two_means() -> None:
    config = config_for(concept=["cat", "dog"], concept_weights=[1.0, 2.0], batch_size=2)
    for step in watched_run(pipelines.pipeline(), config).steps:
        s = step.samples
        assert s.concepts is not None
        target = s.noise_pred_concept - 2.0 * (s.noise_pred_concept - s.noise_pred_null)
        each = (step.noise_pred_student - target).double().square().flatten(1).mean(1)
        weights = torch.tensor([1.0, 2.0])[s.concepts[:2]].double()
        expected = (weights * each[:2]).mean() + 0.5 * each[2:].mean()
        assert step.loss == pytest.approx(expected.item(), rel=1e-5)


def moved(pipe: Any, erasure: Any, prompt: str) -> float:
    """How far the answer to `prompt` went, mean square."""
    states = plain_states(pipe, torch.randn(1, *SHAPE, generator=torch.Generator()), prompt, 4)
    changed = copy.deepcopy(pipe)
    erasure.apply(changed)
    with torch.no_grad():
        embedding = encode(pipe, prompt, 1)
        now = [changed.unet(x, t, encoder_hidden_states=embedding).sample for x, t, _ in states]
    pairs = zip(now, states, strict=True)
    return sum((a - said).square().mean().item() for a, (_, _, said) in pairs)


def test_what_is_preserved_moves_less() -> None:
    pipe = pipelines.pipeline()
    found = []
    for preserve in ((), KEPT):
        config = config_for(
            iterations=30, train_method="esd-u", preserve=preserve, preserve_weight=3.0
        )
        erasure = watched_run(pipelines.pipeline(), config).erasure
        found.append([moved(pipe, erasure, prompt) for prompt in ("cat", KEPT[0])])
    (_, free), (cat, held) = found
    assert held < 0.7 * free
    assert cat > 0


def test_replayed_and_eager_runs_agree_in_every_bit() -> None:
    config = config_for(collect_batch_size=2)
    found = []
    for graphs in (RunGraphs(Twin(), Twin()), None):
        steps: list[FitStep] = []
        model = load_model(pipelines.pipeline(), config)
        found.append(run(model, config, graphs=graphs, on_step=steps.append))
    path = found[0].manifest["paths_taken"]["cuda_graphs"]
    assert path.endswith("fit: yes (1 captured, 8 steps replayed)")
    assert all(same_bits(found[0].tensors[n], t) for n, t in found[1].tensors.items())


def test_sdxl_and_bfloat16() -> None:
    pipe = pipelines.pipeline("sdxl-ddim", torch.bfloat16)
    config = config_for(erase_from="animal", preserve=["a fish"])
    for step in watched_run(pipe, config).steps:
        kept = step.samples[1:]
        assert torch.equal(kept.noise_pred_null, kept.noise_pred_concept)
        assert kept.noise_pred_erase_from is not None
        assert torch.equal(kept.noise_pred_erase_from, kept.noise_pred_concept)


def test_the_memory_plan_counts_both(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(
        "esd_fast.memory_plan.plan_memory", lambda *_, batch_size, **__: told.append(batch_size)
    )
    model = load_model(pipelines.pipeline(), config_for())
    for preserve in ((), KEPT):
        plan_of(model, config_for(preserve=preserve, batch_size=3), 64)
    plan = [
        "plan",
        "--model",
        "sd1",
        "--batch-size",
        "3",
        "--preserve",
        "dog",
        "--preserve",
        "fish",
    ]
    with pytest.raises(AttributeError):  # what it would print is not there
        main([*plan, "--debug"])
    assert told == [3, 6, 6]


# ---------------------------------------------------------------------------------------- what can be said


def test_the_models_own_prompts_stand_for_default() -> None:
    config = replace(config_for(preserve="default"), given=None)
    model = load_model(pipelines.pipeline(), config)
    assert config.for_model(model).preserve == GENERAL_PROMPTS[:DEFAULT_NUMBER]
    manifest = run(model, config_for(preserve=["default", "Monet"])).manifest
    assert manifest["preserved"] == [*GENERAL_PROMPTS[:DEFAULT_NUMBER], "Monet"]
    assert manifest["config"]["preserve_weight"] == 0.5


def test_default_leaves_out_what_names_something_erased() -> None:
    general = ("a photo of a dog", "a landscape", "Oil painting", "a car")
    assert resolved(["default"], general, ["the DOG", "oil"]) == ("a landscape", "a car")
    assert resolved(["x", "default", "a car"], general, ["dog"], 2) == (
        *("x", "a landscape", "Oil painting", "a car"),
    )
    assert resolved(["x"], general, ["x"]) == ("x",)
    own = world.general_prompts()
    assert len(own) == len(set(own)) == len(world.OBJECTS) + len(world.STYLES)
    assert sum("style" in prompt for prompt in own[:DEFAULT_NUMBER]) == 2
    assert "a robot" in resolved(["default"], own, ["cat"])
    assert "a robot" not in resolved(["default"], own, ["robot"])
    assert len(resolved(["default"], own, ["robot"])) == DEFAULT_NUMBER


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preserve": ["Cat"]}, "preserve holds 'Cat', which is to be erased"),
        ({"preserve": [" "]}, "preserve is ' '; it must name something"),
        ({"preserve": 3}, "preserve is 3; it must be a list of texts"),
        ({"preserve_weight": 0}, "preserve_weight is 0; it must be above 0"),
        ({"preserve_weight": float("nan")}, "preserve_weight is nan; it must be a finite number"),
    ],
)
def test_bad_values(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_for(**settings)


@pytest.mark.parametrize("preset", ["reference", "paper", "paper-diffusers"])
def test_published_recipes_preserve_nothing(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="it must be left out where samples is 'last'"):
        EraseConfig.from_preset(preset, "cat", preserve=["dog"])
    assert main(["train", "--concept", "cat", "--preset", preset, "--preserve", "dog"]) == 2
    assert "preserve is ('dog',)" in capsys.readouterr().err
