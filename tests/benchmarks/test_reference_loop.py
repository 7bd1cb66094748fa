"""The rivals: what the public scripts computed, the passes they claim, and what they leave alone."""

from __future__ import annotations

import dataclasses
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_loop
import pytest
import reference_loop
import torch
from diffusers import EulerDiscreteScheduler
from lora_loop import lora
from reference_loop import OWN_DEFAULTS, LoopSettings, paper, reference
from torch import Tensor

from tests import pipelines
from tests.pipelines import golden_run, relative, same_bits, weights, worst_move
from tests.truth.reference_loops import frozen_rollout_reference, noise_from_seeds, select_trainable

one_thread = pipelines.one_thread

LOOPS = {"reference": reference, "paper": paper, "lora": lora}
ANCHORS = {reference: "concept", paper: "null", lora: "null"}
# The seeds that the public scripts were given (their files have what was drawn from them, so a
# wrong one could not pass).
FROZEN_SEEDS = {
    "sd-pndm-esd-x": 0,
    "sd-pndm-strict-from": 1,
    "sd-ddim-esd-u": 2,
    "sd-ddim-selfattn": 3,
    "sd-v-ddim-esd-x": 5,
}


@dataclass
class Call:
    latents: Tensor
    timestep: Tensor
    embeddings: Tensor
    prediction: Tensor

    def repeated(self, unet: Any) -> Tensor:
        """The same question to another UNet."""
        with torch.no_grad():
            return unet(self.latents, self.timestep, encoder_hidden_states=self.embeddings).sample


@dataclass
class Calls:
    """What went through a UNet, seen by a hook of its own."""

    passes: int = 0
    students: list[Call] = field(default_factory=list)
    teachers: list[Call] = field(default_factory=list)  # what was asked just before
    last: Call | None = None

    def __call__(self, _: Any, inputs: tuple[Any, ...], more: Any, output: Any) -> None:
        latents, timestep = inputs
        embeddings = more["encoder_hidden_states"]
        call = Call(latents.clone(), timestep.clone(), embeddings, output[0].detach().clone())
        self.passes += len(latents)
        if output[0].requires_grad:
            assert self.last is not None
            self.passes += len(latents)  # it will go backward
            self.teachers.append(self.last)
            self.students.append(call)
        self.last = call

    def target(self, step: int, settings: LoopSettings, anchor: str) -> Tensor:
        """By the definition, from what the teacher answered."""
        e0, ep, *ef = self.teachers[step].prediction.chunk(3 if settings.erase_from else 2)
        start_from = ef[0] if ef else {"concept": ep, "null": e0}[anchor]
        return start_from - settings.negative_guidance * (ep - e0)


def watch(pipe: Any) -> Calls:
    calls = Calls()
    pipe.unet.register_forward_hook(calls, with_kwargs=True)
    return calls


def assert_reproduces(loop: Any, name: str, settings: LoopSettings) -> None:
    """Within golden/README's tolerances; passes and frozen weights besides."""
    run, tensors = golden_run(name)
    final = {n.removeprefix("final."): t for n, t in tensors.items() if n.startswith("final.")}
    pipe = pipelines.pipeline(run["model"])
    start, calls = weights(pipe), watch(pipe)
    result = loop(pipe, settings)

    assert len(calls.students) == len(run["losses"]) == 4
    for i, student in enumerate(calls.students):
        assert relative(student.latents, tensors[f"latents.{i}"]) <= 1e-5
        assert relative(calls.target(i, settings, ANCHORS[loop]), tensors[f"target.{i}"]) <= 1e-5
        if f"noise_pred_student.{i}" in tensors:
            assert relative(student.prediction, tensors[f"noise_pred_student.{i}"]) <= 1e-5
    assert result.losses == pytest.approx(run["losses"], rel=1e-5)
    assert worst_move(start, result.trained, final) <= 1e-3
    assert result.unet_passes == calls.passes

    now = weights(pipe)
    assert all(same_bits(now[n], trained) for n, trained in result.trained.items())
    assert all(same_bits(now[n], start[n]) for n in start.keys() - final.keys())


def golden_settings(run: dict[str, Any], **more: Any) -> LoopSettings:
    names = ("concept", "train_method", "negative_guidance", "guidance_scale", "learning_rate")
    given = {n: run[n] for n in (*names, "num_inference_steps")}
    return LoopSettings(**given, **more, iterations=4)


@pytest.mark.parametrize("name", FROZEN_SEEDS)
def test_reference_reproduces_the_public_script(name: str) -> None:
    run, _ = golden_run(name)
    settings = golden_settings(
        run, erase_from=run["erase_from"], resolution=run["resolution"], seed=FROZEN_SEEDS[name]
    )
    assert_reproduces(reference, name, settings)


def test_paper_reproduces_the_public_script() -> None:
    run, _ = golden_run("alt-student-xattn")
    settings = golden_settings(run, seed=0)  # there, the concept as erase_from is none
    assert_reproduces(paper, "alt-student-xattn", settings)


@pytest.mark.filterwarnings(  # numpy 2 in diffusers' schedulers
    "ignore:__array__ implementation:DeprecationWarning"
)
def test_reference_scales_the_inputs_of_euler() -> None:
    """No golden run has that scheduler; the plain loop of tests/truth does."""
    pipe = pipelines.pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    settings = LoopSettings("cat", iterations=3, num_inference_steps=8, seed=4)
    draws = random.Random(settings.seed)
    drawn = [(draws.randint(0, 7), draws.randint(0, 2**15)) for _ in range(3)]
    truth = frozen_rollout_reference(
        pipe,
        "cat",
        noise=noise_from_seeds([seed for _, seed in drawn], (1, *pipelines.SHAPE)),
        indices=[index for index, _ in drawn],
        trainable=select_trainable(pipe.unet, "esd-x"),
        num_inference_steps=8,
    )
    assert reference(pipe, settings).losses == pytest.approx(truth.losses, rel=1e-5)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    ("erase_from", "dtype"),
    [(None, torch.float32), ("a fish", torch.bfloat16)],
    ids=["float32", "another start-bfloat16"],
)
def test_passes_are_counted_and_the_rest_is_left_alone(
    name: str, erase_from: str | None, dtype: torch.dtype
) -> None:
    """A batch of two at a resolution that is not the model's own."""
    loop, pipe = LOOPS[name], pipelines.pipeline(dtype=dtype)
    start, calls = weights(pipe), watch(pipe)
    steps: list[tuple[int, float]] = []
    settings = LoopSettings(
        "cat",
        erase_from,
        iterations=3,
        learning_rate=1e-2,
        num_inference_steps=5,
        batch_size=2,
        resolution=128,
    )
    result = loop(pipe, settings, on_step=lambda i, loss: steps.append((i, loss)))

    assert result.unet_passes == calls.passes
    assert {tuple(student.latents.shape) for student in calls.students} == {(2, 4, 16, 16)}
    for i, student in enumerate(calls.students):
        difference = student.prediction.float() - calls.target(i, settings, ANCHORS[loop]).float()
        assert result.losses[i] == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert steps == list(enumerate(result.losses))
    now = weights(pipe)
    assert now.keys() == start.keys()
    changed = {n for n in start if not same_bits(now[n], start[n])}
    assert changed
    assert changed <= result.trained.keys() <= {n for n in start if "attn2" in n}
    assert all(same_bits(now[n], trained) for n, trained in result.trained.items())


@pytest.mark.parametrize("loop", [reference, paper])
def test_the_unet_is_the_student_when_a_step_is_told(loop: Any) -> None:
    pipe = pipelines.pipeline()
    seen: list[dict[str, Tensor]] = []
    settings = LoopSettings("cat", iterations=2, learning_rate=1e-2, num_inference_steps=4)
    result = loop(pipe, settings, on_step=lambda *_: seen.append(weights(pipe)))
    assert all(same_bits(seen[1][n], trained) for n, trained in result.trained.items())
    assert any(not same_bits(seen[0][n], trained) for n, trained in result.trained.items())


def prediction(pipe: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *pipelines.SHAPE), generator=g)
    embeddings = torch.randn((2, 77, pipe.unet.config.cross_attention_dim), generator=g)
    with torch.no_grad():
        return pipe.unet(latents, torch.tensor(500), encoder_hidden_states=embeddings).sample


def test_lora_that_does_not_learn_changes_nothing() -> None:
    pipe = pipelines.pipeline()
    start, before = weights(pipe), prediction(pipe)
    lora(pipe, LoopSettings("cat", iterations=2, learning_rate=0.0, num_inference_steps=4))
    assert torch.equal(prediction(pipe), before)
    pipelines.assert_same_weights(pipe, start)


def test_lora_merges_what_it_trained() -> None:
    pipe = pipelines.pipeline()
    before, told = prediction(pipe), list[Tensor]()
    settings = LoopSettings(
        "cat", train_method="esd-all", iterations=2, learning_rate=1e-2, num_inference_steps=4
    )
    result = lora(pipe, settings, rank=3, on_step=lambda *_: told.append(prediction(pipe)))
    assert relative(prediction(pipe), told[-1]) <= 1e-5
    assert relative(told[-1], before) >= 1e-3
    attention = {n for n in weights(pipe) if re.search(r"attn[12]\.to_\w+(\.0)?\.weight", n)}
    assert result.trained.keys() == attention


def test_lora_asks_the_frozen_unet_and_rolls_out_the_adapted_one() -> None:
    still, moving = pipelines.pipeline(), pipelines.pipeline()
    of_still, of_moving = watch(still), watch(moving)
    settings = LoopSettings("cat", iterations=2, learning_rate=1e-2, num_inference_steps=4)
    lora(moving, settings)
    lora(still, dataclasses.replace(settings, learning_rate=0.0))
    first, second = zip(of_still.students, of_moving.students, strict=True)
    assert torch.equal(first[0].latents, first[1].latents)
    assert relative(second[1].latents, second[0].latents) >= 1e-3
    frozen = pipelines.pipeline().unet
    for teacher in of_moving.teachers:
        assert torch.equal(teacher.repeated(frozen), teacher.prediction)


def test_every_loop_has_its_own_defaults() -> None:
    assert OWN_DEFAULTS.keys() == LOOPS.keys()
    for given in OWN_DEFAULTS.values():
        LoopSettings("cat", **given)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_unknown_method_is_refused(loop: Any) -> None:
    with pytest.raises(ValueError, match="'ldm-xattn'; the loops know esd-x, "):
        loop(pipelines.pipeline(), LoopSettings("cat", train_method="ldm-xattn"))


@pytest.mark.parametrize("module", [reference_loop, lora_loop])
def test_the_rivals_use_nothing_of_ours(module: Any) -> None:
    source = Path(module.__file__).read_text()
    assert not re.search(r"^\s*(import|from)\s+esd_fast", source, re.MULTILINE)
