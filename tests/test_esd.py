"""The fast preset, and what every run owes its caller."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import esd_fast
from esd_fast import EraseConfig, EraseInterrupted, Progress
from esd_fast.fit import NonFiniteLoss
from esd_fast.objective import Objective
from esd_fast.parameters import trainable_names

from . import pipelines
from .pipelines import SHORT, Watched, assert_same_weights, relative, same_bits, watched_run
from .truth.reference_loops import encode

one_thread = pipelines.one_thread
RECIPES = ["fast", "reference", "paper", "paper-diffusers"]


def fast(**settings: Any) -> EraseConfig:
    chosen: dict[str, Any] = {"iterations": 7, "batch_size": 2, "num_inference_steps": 5}
    return EraseConfig(concept="red apple", **chosen | {"learning_rate": 1e-3} | settings)


# ------------------------------------------------------------------------------------------- the fast preset


@pytest.mark.parametrize("pipe_name", ["sd-ddim", "sd-pndm", "sd-v-ddim"])
@pytest.mark.parametrize("erase_from", [None, "a fish"])
def test_samples_and_targets_are_what_the_frozen_unet_says(
    pipe_name: str, erase_from: str | None
) -> None:
    """Every sample asked again, prompt by prompt and one at a time, of the untouched UNet."""
    config = fast(erase_from=erase_from)
    ours = watched_run(pipelines.pipeline(pipe_name), config)
    plain = pipelines.pipeline(pipe_name)
    prompts = {"e0": "", "ep": config.concept, "ef": erase_from or config.concept}
    embeddings = {name: encode(plain, text, 1) for name, text in prompts.items()}
    objective = Objective(config.target_anchor, config.negative_guidance)
    for step in ours.steps:
        targets = objective.target(step.samples)
        assert len(targets) == 2
        for x, t, target in zip(step.samples.latents, step.samples.timesteps, targets, strict=True):
            with torch.no_grad():
                e = {n: plain.unet(x[None], t, v).sample[0] for n, v in embeddings.items()}
            assert relative(target, e["ef"] - 2.0 * (e["ep"] - e["e0"])) <= 1e-5
        loss = (step.noise_pred_student - targets).square().mean().item()
        assert step.loss == pytest.approx(loss, rel=1e-5)


def key(latents: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 3) for v in latents.flatten()[:6].tolist())


@pytest.mark.parametrize("pipe_name", ["sd-ddim", "sd-pndm"])
def test_each_state_of_few_trajectories_is_used_once(pipe_name: str) -> None:
    """The states are those of plain guided trajectories with diffusers' scheduler, from the plan's noise."""
    config = fast()
    ours = watched_run(pipelines.pipeline(pipe_name), config)
    assert len(ours.rollouts) == math.ceil(7 * 2 / len(ours.timesteps))
    plain = pipelines.pipeline(pipe_name)
    null, concept = encode(plain, "", 1), encode(plain, config.concept, 1)
    states = set()
    for rollout in ours.rollouts:
        plain.scheduler.set_timesteps(5)
        latents = rollout.noise
        for t in plain.scheduler.timesteps:
            states.add((int(t), key(latents)))
            with torch.no_grad():
                e0, ep = (plain.unet(latents, t, e).sample for e in (null, concept))
            guided = e0 + config.guidance_scale * (ep - e0)
            latents = plain.scheduler.step(guided, t, latents).prev_sample
    used = [
        (int(t), key(x))
        for step in ours.steps
        for x, t in zip(step.samples.latents, step.samples.timesteps, strict=True)
    ]
    assert len(used) == len(set(used)) == 14
    assert set(used) <= states
    assert len({t for t, _ in used[:6]}) > 2  # shuffled, not one trajectory after the other


@pytest.mark.parametrize("size", [2, 3, 64])
def test_collect_batch_size_is_not_in_the_result(size: int) -> None:
    first = watched_run(pipelines.pipeline(), fast(iterations=9, collect_batch_size=1))
    other = watched_run(pipelines.pipeline(), fast(iterations=9, collect_batch_size=size))
    assert other.erasure.manifest["losses"] == pytest.approx(
        first.erasure.manifest["losses"], rel=1e-4
    )
    for a, b in zip(first.steps, other.steps, strict=True):
        assert relative(b.samples.latents, a.samples.latents) <= 1e-5
    assert pipelines.worst_move(first.start, other.erasure.tensors, first.erasure.tensors) <= 1e-2


def test_loss_goes_down() -> None:
    losses = watched_run(
        pipelines.pipeline(), fast(iterations=120, num_inference_steps=10)
    ).erasure.manifest["losses"]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


# ------------------------------------------------------------------------------------------------ UNet passes


@pytest.mark.parametrize("erase_from", [None, "a fish"])
@pytest.mark.parametrize("preset", RECIPES)
def test_unet_passes_are_the_rows_that_went_through(preset: str, erase_from: str | None) -> None:
    pipe = pipelines.pipeline()
    rows = {"collect": 0, "fit": 0}

    def count(_: Any, args: tuple[Any, ...], __: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            rows["fit"] += 2 * len(args[0])  # the backward that follows is one more
        else:
            rows["collect"] += len(args[0])

    pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    told: list[Progress] = []
    erasure = esd_fast.erase(
        pipe,
        "cat",
        preset=preset,
        erase_from=erase_from,
        batch_size=3,
        on_progress=told.append,
        **SHORT,
    )
    assert erasure.manifest["unet_passes"] == {**rows, "total": sum(rows.values())}
    assert rows["fit"] == 2 * 4 * 3
    collected = [p for p in told if p.phase == "collect"]
    assert collected[-1].done == collected[-1].total == rows["collect"]
    fitted = [p for p in told if p.phase == "fit"]
    assert [p.done for p in fitted] == [1, 2, 3, 4]
    assert [p.loss for p in fitted] == erasure.manifest["losses"]


def test_fast_takes_four_units_a_sample() -> None:
    """DESIGN: two forward units of teacher for a sample, and forward and backward of the student."""
    erasure = esd_fast.erase(
        pipelines.pipeline(), "cat", preset="fast", iterations=20, num_inference_steps=10
    )
    assert erasure.manifest["unet_passes"] == {"collect": 40, "fit": 40, "total": 80}


# ------------------------------------------------------------------------------------- what trains, what does not


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize("method", ["esd-x", "esd-u", "mid_block"])
def test_only_the_chosen_weights_move_and_get_gradients(preset: str, method: str) -> None:
    pipe = pipelines.pipeline()
    names = set(trainable_names(pipe.unet, method))
    start = pipelines.weights(pipe)
    seen = []

    def look(_: Any) -> None:
        seen.append({n for n, p in pipe.unet.named_parameters() if p.requires_grad})
        assert all(p.grad is None for n, p in pipe.unet.named_parameters() if n not in names)

    erasure = esd_fast.erase(pipe, "cat", preset=preset, train_method=method, on_step=look, **SHORT)
    assert seen == [names] * 4
    end = pipelines.weights(pipe)
    assert set(erasure.tensors) == names
    assert {n for n in end if not same_bits(end[n], start[n])} == names
    assert all(same_bits(end[n], erasure.tensors[n]) for n in names)


def test_frozen_weights_get_no_gradient_in_the_backward() -> None:
    pipe = pipelines.pipeline()
    names = set(trainable_names(pipe.unet, "esd-x"))
    asked: set[str] = set()
    for name, parameter in pipe.unet.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: asked.add(name))
    esd_fast.erase(pipe, "cat", preset="fast", **SHORT)
    assert asked == names


def test_gradients_are_equal_with_and_without_checkpointing() -> None:
    plain = watched_run(pipelines.pipeline(), fast())
    pipe = pipelines.pipeline()
    pipe.unet.enable_gradient_checkpointing()
    ours = watched_run(pipe, fast())
    assert all(same_bits(ours.erasure.tensors[n], t) for n, t in plain.erasure.tensors.items())


# ------------------------------------------------------------------------------------------- seeds and the caller


def digest(run: Watched) -> list[Any]:
    return [run.erasure.manifest["losses"], [t.sum().item() for t in run.erasure.tensors.values()]]


@pytest.mark.parametrize("preset", RECIPES)
def test_two_seeded_runs_are_bitwise_equal(preset: str) -> None:
    config = EraseConfig.from_preset(preset, "cat", "any", batch_size=2, seed=5, **SHORT)
    first = watched_run(pipelines.pipeline(), config)
    torch.manual_seed(99)  # the caller's generators are no part of it
    random.seed(99)
    second = watched_run(pipelines.pipeline(), config)
    assert digest(first) == digest(second)
    assert all(same_bits(second.erasure.tensors[n], t) for n, t in first.erasure.tensors.items())
    other = EraseConfig.from_preset(preset, "cat", "any", batch_size=2, seed=6, **SHORT)
    assert digest(watched_run(pipelines.pipeline(), other)) != digest(first)


@pytest.mark.parametrize("preset", RECIPES)
def test_the_callers_state_is_untouched(preset: str) -> None:
    pipe = pipelines.pipeline("sd-pndm")
    pipe.scheduler.set_timesteps(9)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.text_encoder.train()
    pipe.unet.conv_in.requires_grad_(False)

    def state() -> list[Any]:
        modules = [*pipe.unet.modules(), *pipe.text_encoder.modules(), *pipe.vae.modules()]
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            [m.training for m in modules],
            [p.requires_grad for m in modules for p in m.parameters(recurse=False)],
            [p.grad for p in pipe.unet.parameters()],
            dict(pipe.scheduler.config),
            pipe.scheduler.timesteps.tolist(),
            pipe.scheduler.counter,
            {n: (p.device, p.dtype, p.data_ptr()) for n, p in pipe.unet.named_parameters()},
            len(pipe.unet._forward_hooks) + len(pipe.unet._forward_pre_hooks),
        ]

    before = state()
    erasure = esd_fast.erase(pipe, "cat", preset=preset, **SHORT)
    assert state() == before
    erasure.revert(pipe)
    assert state() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_works_within_any_grad_mode(mode: Callable[[], Any], preset: str) -> None:
    config = EraseConfig.from_preset(preset, "cat", "any", **SHORT)
    plain = watched_run(pipelines.pipeline(), config)
    pipe = pipelines.pipeline()
    with mode():
        ours = watched_run(pipe, config)
        assert not torch.is_grad_enabled()
    assert digest(ours) == digest(plain)
    assert not any(p.is_inference() for p in pipe.unet.parameters())


def test_a_stale_gradient_of_the_callers_is_not_added() -> None:
    plain = watched_run(pipelines.pipeline(), fast())
    pipe = pipelines.pipeline()
    for parameter in pipe.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    ours = watched_run(pipe, fast())
    assert digest(ours) == digest(plain)
    assert all((p.grad == 1).all() for p in pipe.unet.parameters())


def test_live_pipeline_is_left_erased_and_can_be_reverted() -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    erasure = esd_fast.erase(pipe, "cat", preset="fast", **SHORT)
    now = pipelines.weights(pipe)
    assert all(same_bits(now[n], t) for n, t in erasure.tensors.items())
    assert all(not torch.equal(before[n], t) for n, t in erasure.tensors.items())
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_manifest_says_how_it_came_about() -> None:
    pipe = pipelines.pipeline()
    erasure = esd_fast.erase(pipe, "cat", preset="reference", train_method="xattn", seed=3, **SHORT)
    manifest = erasure.manifest
    assert manifest["concept"] == "cat"
    assert manifest["method"] == "esd-x"  # the alias resolved
    assert manifest["preset"] == "reference"
    assert manifest["target"] == {"anchor": "concept", "eta": 1.0}
    assert manifest["config"]["negative_guidance"] == 2.0
    assert manifest["resolution"] == 64
    assert manifest["seed"] == 3
    assert manifest["interrupted"] is False
    assert len(manifest["losses"]) == 4
    assert set(manifest["seconds"]) == {"total", "collect", "fit"}
    assert manifest["paths_taken"]["device"] == "cpu"
    assert manifest["paths_taken"]["dtype"] == "float32, trainables float32"
    assert "guidance_loss" in manifest["paths_taken"]
    assert torch.__version__.startswith(manifest["versions"]["torch"])  # CUDA builds add their tag


# ----------------------------------------------------------------------------------------------- where it goes wrong


@pytest.mark.parametrize("preset", RECIPES)
def test_restored_after_a_loss_that_is_no_number(preset: str) -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    with pytest.raises(NonFiniteLoss, match=r"iteration 1, timestep .* lower learning_rate"):
        esd_fast.erase(pipe, "cat", preset=preset, **SHORT | {"learning_rate": 1e30})
    assert_same_weights(pipe, before)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_weights_that_are_no_numbers_are_found_after_the_last_step() -> None:
    """No loss follows the last step: a gradient that overflowed there would reach the file."""
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    parameter = pipe.unet.get_parameter(trainable_names(pipe.unet, "esd-x")[3])
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        NonFiniteLoss, match="1 of 20 trained tensors are not finite after iteration 0"
    ):
        esd_fast.erase(pipe, "cat", preset="fast", **SHORT | {"iterations": 1})
    assert_same_weights(pipe, before)


@pytest.mark.parametrize("preset", RECIPES)
def test_interrupted_run_hands_out_its_work_and_restores(preset: str) -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)

    def stop(step: Any) -> None:
        if step.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(EraseInterrupted) as interrupted:
        esd_fast.erase(pipe, "cat", preset=preset, on_step=stop, **SHORT)
    assert_same_weights(pipe, before)
    assert isinstance(interrupted.value, KeyboardInterrupt)
    erasure = interrupted.value.erasure
    assert erasure.manifest["interrupted"] is True
    assert len(erasure.manifest["losses"]) == 3
    whole = esd_fast.erase(pipelines.pipeline(), "cat", preset=preset, **SHORT)
    assert erasure.manifest["losses"] == whole.manifest["losses"][:3]
    erasure.apply(pipe)
    assert all(same_bits(pipe.unet.get_parameter(n), t) for n, t in erasure.tensors.items())
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


@pytest.mark.parametrize("call", range(9))
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_restored_wherever_it_stops(call: int, error: type[BaseException]) -> None:
    """In any forward of a student's rollout, also while the teacher's weights are swapped in."""
    pipe = pipelines.pipeline()
    calls = iter(range(100))

    def stop(*_: Any) -> None:
        if next(calls) == call:
            raise error

    hook = pipe.unet.register_forward_pre_hook(stop)
    before = pipelines.weights(pipe)
    pointers = [p.data_ptr() for p in pipe.unet.parameters()]
    settings = SHORT | {"iterations": 3, "num_inference_steps": 3, "seed": 1}
    with pytest.raises((EraseInterrupted, RuntimeError)):
        esd_fast.erase(pipe, "cat", preset="paper-diffusers", **settings)
    hook.remove()
    assert_same_weights(pipe, before)
    assert [p.data_ptr() for p in pipe.unet.parameters()] == pointers


def test_restored_when_interrupted_while_collecting() -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(EraseInterrupted) as interrupted:
        esd_fast.erase(pipe, "cat", preset="fast", on_progress=stop, **SHORT)
    assert_same_weights(pipe, before)
    erasure = interrupted.value.erasure
    assert erasure.manifest["losses"] == []
    assert all(same_bits(t, before[n]) for n, t in erasure.tensors.items())


# ---------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_pipelines(dtype: torch.dtype, preset: str) -> None:
    """Masters in float32, weights in the pipeline's dtype, losses near those of float32."""
    pipe = pipelines.pipeline(dtype=dtype)
    before = pipelines.weights(pipe)
    config = EraseConfig.from_preset(preset, "cat", "any", batch_size=2, **SHORT)
    ours = watched_run(pipe, config)
    truth = watched_run(pipelines.pipeline(), config)
    assert {t.dtype for t in ours.erasure.tensors.values()} == {torch.float32}
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
    assert {s.samples.latents.dtype for s in ours.steps} == {dtype}
    for name, tensor in ours.erasure.tensors.items():
        assert same_bits(pipe.unet.get_parameter(name), tensor.to(dtype))
        assert not same_bits(tensor, tensor.to(dtype).float())  # more than the weights can hold
    losses = ours.erasure.manifest["losses"]
    assert losses == pytest.approx(truth.erasure.manifest["losses"], rel=0.15)
    ours.erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_updates_below_bfloat16_are_learnt() -> None:
    """At this learning rate no weight in bfloat16 would move; the masters move as float32 does."""
    settings = {"learning_rate": 1e-7, "iterations": 8}
    pipe = pipelines.pipeline(dtype=torch.bfloat16)
    ours = watched_run(pipe, fast(**settings))
    moves = [(t - ours.start[n].float()).norm() for n, t in ours.erasure.tensors.items()]
    assert min(moves) > 0
    longest = max((t - ours.start[n].float()).abs().max() for n, t in ours.erasure.tensors.items())
    assert 4e-7 < longest < 1.2e-6  # eight steps, and float32's own rounding


def test_float16_gradients_are_scaled_up() -> None:
    """diffusers#1246 and #6442: small gradients survive (test_parameters: and are scaled back)."""
    gradients: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float32, torch.float16):
        pipe = pipelines.pipeline(dtype=dtype)
        parameter = pipe.unet.get_parameter(trainable_names(pipe.unet, "esd-x")[-2])
        parameter.register_hook(lambda g, dtype=dtype: gradients.update({dtype: g.float()}))
        watched_run(pipe, fast(iterations=1))
    assert relative(gradients[torch.float16] / 2**16, gradients[torch.float32]) < 0.05
