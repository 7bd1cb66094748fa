"""What a job would do and how long it would take, measured on this machine before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .limits import Limits
from .models_offered import OfferedModels
from .studio import Studio
from .wishes import Wish

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.evaluation.proof import Proof
    from esd_fast.models import Model

COLUMNS = 2  # pictures of a prompt in a report
TOGETHER = 8  # drawn at once: between two batches a job can be stopped, and others let go first
PROBE_ITERATIONS, PROBE_STEPS, PROBE_WORDS = 3, 4, 7


@dataclass(frozen=True)
class Pace:
    """Measured seconds."""

    collect_pass: float
    fit_pass: float
    word: float
    """To encode one that updates are held to; 0 where they are not."""
    picture: float
    """One that is drawn in the steps that a report's are; 0 where none are drawn."""


@dataclass(frozen=True)
class Plan:
    """Before anything is trained."""

    config: EraseConfig
    family: str
    device: str
    resolution: int
    tensors: int
    weights: int
    """Trained, of `all_weights` of the UNet."""
    all_weights: int
    collect_passes: int
    fit_passes: int
    words: int
    """That updates are held to (`keep_vocabulary`)."""
    pictures: int
    """Drawn before, and again after."""
    pace: Pace

    @property
    def training_seconds(self) -> float:
        passes = self.collect_passes * self.pace.collect_pass + self.fit_passes * self.pace.fit_pass
        return passes + self.words * self.pace.word

    @property
    def drawing_seconds(self) -> float:
        return 2 * self.pictures * self.pace.picture

    @property
    def seconds(self) -> float:
        """Those of loading the model and of pictures on the way come on top."""
        return self.training_seconds + self.drawing_seconds


def plan_of(wish: Wish, offered: OfferedModels, studio: Studio, limits: Limits) -> Plan:
    """Loads the model where it is not at hand. Raises as `Wish.config` does."""
    from esd_fast.esd import passes_of
    from esd_fast.parameters import trainable_names
    from esd_fast.plan import Plan as Trajectories
    from esd_fast.plan import plan_rollouts
    from esd_fast.schedules import scheduler_for

    config = wish.config(offered, limits, studio.device)
    with studio.turns.turn():
        model = studio.at_hand(wish.model)
        proof = proof_of(model, config, wish.proof)
        names = trainable_names(model.unet, config.train_method, model.family.name)
        words = words_held_to(model, config, names)
        parameters = dict(model.unet.named_parameters())
        scheduler = scheduler_for(model.pipeline.scheduler, config)
        shape = model.latent_shape(config.resolution)
        rollouts = plan_rollouts(config, scheduler.timesteps, shape)
        asked = 2 if config.erase_from is None else 3
        return Plan(
            config=config,
            family=model.family.title,
            device=str(model.device),
            resolution=shape[-1] * model.vae_scale_factor,
            tensors=len(names),
            weights=sum(parameters[n].numel() for n in names),
            all_weights=sum(p.numel() for p in parameters.values()),
            collect_passes=passes_of(config, asked, Trajectories(rollouts)),
            fit_passes=2 * config.iterations * config.samples_a_step,
            words=len(words),
            pictures=len(proof.shots),
            pace=pace_of(model, config, words, proof),
        )


def words_held_to(model: Model, config: EraseConfig, names: Sequence[str]) -> list[str]:
    from esd_fast.vocabulary import reads_text, without, words_of

    if not config.keep_vocabulary or not any(reads_text(model.unet, name) for name in names):
        return []
    return without(words_of(model.pipeline.tokenizer), config.concepts)


def pace_of(model: Model, config: EraseConfig, words: list[str], proof: Proof) -> Pace:
    """A short run of the same kind, the second of two, since the first warms up; the model is as
    it was afterwards. It is held to a few words, since they cost time before the first pass."""
    from esd_fast.esd import run

    short = replace(config, iterations=PROBE_ITERATIONS, num_inference_steps=PROBE_STEPS)
    few = words[:PROBE_WORDS]
    for _ in range(2):
        erasure = run(model, short, words=few or None)
        erasure.revert(model.pipeline)
        told = erasure.manifest
    seconds, passes = told["seconds"], told["unet_passes"]
    return Pace(
        collect_pass=seconds["collect"] / max(1, passes["collect"]),
        fit_pass=seconds["fit"] / passes["fit"],
        word=word_seconds(model, few, told["resolution"]) if few else 0.0,
        picture=picture_seconds(model, proof) if proof.shots else 0.0,
    )


def word_seconds(model: Model, words: Sequence[str], resolution: int) -> float:
    from esd_fast.vocabulary import second_moment

    began = time.perf_counter()
    second_moment(model, words, resolution)
    return (time.perf_counter() - began) / (len(words) + 1)  # the empty prompt is one, too


def picture_seconds(model: Model, proof: Proof) -> float:
    """By a few pictures in one step and in three: what a step takes, and what the rest does."""
    from esd_fast.evaluation.proof import at_home
    from esd_fast.generate import pictures

    shots = proof.shots[: proof.batch_size]
    taken = {}
    with at_home(model.pipeline):
        for steps in (1, 1, 3):  # the first warms up
            began = time.perf_counter()
            settings: dict[str, Any] = {
                "num_inference_steps": steps,
                "guidance_scale": proof.guidance_scale,
                "resolution": proof.resolution,
                "batch_size": len(shots),
            }
            list(pictures(model.pipeline, shots, **settings))
            taken[steps] = time.perf_counter() - began
    step = max(0.0, (taken[3] - taken[1]) / 2)
    return (max(0.0, taken[1] - step) + 25 * step) / len(shots)  # `pictures` takes 25


def proof_of(model: Model, config: EraseConfig, kind: str) -> Proof:
    """What is drawn before and after: by `kind`, one of wishes.PROOFS."""
    from esd_fast.commands.train import KEEP_PROMPTS
    from esd_fast.evaluation.proof import proof_for

    proof = proof_for(model, config, 0 if kind == "none" else COLUMNS, KEEP_PROMPTS)
    proof = replace(proof, batch_size=min(TOGETHER, proof.batch_size))
    return proof if kind == "measured" else replace(proof, erased=(), kept=())
