"""What to erase and how: one frozen dataclass, and the named recipes."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from .demo import is_embedded
from .demo import recipe as embedded_recipe
from .optimizers import OPTIMIZERS, check_installed
from .parameters import check_method
from .preserve import resolved
from .prompts import clean_prompt
from .quantize import check_library, check_quantize
from .terminal import quoted

if TYPE_CHECKING:
    from .models.base import Family, Model

Anchor = Literal["concept", "null", "erase_from"]


@dataclass(frozen=True)
class Loading:
    """How a model is read from where it lies; the fields are EraseConfig's, explained there."""

    variant: str | None = None
    ema: Literal["auto", "yes", "no"] = "auto"
    allow_pickle: bool = False
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    model_config: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "ema", "prediction_type")
        if not isinstance(self.allow_pickle, bool):
            refuse("allow_pickle", self.allow_pickle, "True or False")
        for name, example in (("variant", "'fp16'"), ("model_config", "a folder")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                refuse(name, value, f"a text, such as {example}")
        if self.variant is not None and not re.fullmatch(r"[\w-][\w.-]*", self.variant):
            refuse("variant", self.variant, "a part of a file's name, such as 'fp16'")


@dataclass(frozen=True)
class EraseConfig:
    """One erasure, fully said. `EraseConfig.from_preset` fills in a recipe's values.

    A bad value raises ValueError naming the argument, the value and what would do.
    """

    concept: str | Sequence[str]
    """What to erase: a prompt such as "cat" or "Van Gogh", or a list of several. Commas stay in
    the prompt. `concepts` has it as a tuple."""
    erase_from: str | Sequence[str | None] | None = None
    """Erase `concept` only from this wider prompt; its prediction is then the target's anchor. Of
    several concepts one for all, or a list of one (or None) for each."""
    concept_weights: Sequence[float] | None = None
    """How much the samples of each of several concepts count in the loss; None: alike."""
    preserve: str | Sequence[str] = ()
    """Prompts that stay as they are: each step's batch holds as many of their samples as of what is
    erased, and their target is the frozen model's own prediction. "default" stands for prompts
    that the model has for this (preserve.py), as far as they do not name what is erased."""
    preserve_weight: float = 3.0
    """How much these count: the loss is the mean over samples of what is erased, and this times
    the mean over samples of what is preserved (DreamBooth's prior preservation). Chosen by
    benchmarks/preserve.py, in which 1 and 10 are not far off."""
    preset: str = "fast"
    """The recipe whose values the other fields started from."""
    train_method: str = "esd-x"
    """Which weights train: a name of parameters.METHODS, an alias, or a regular expression."""
    iterations: int = 200
    """Optimizer steps. Where nobody asked for a number, `from_preset` takes the recipe's for each
    concept (`fast` and `reference`; a student's presets have theirs for all words together)."""
    batch_size: int = 1
    """Samples an optimizer step; of several processes (parallel.py) all of theirs together."""
    learning_rate: float = 5e-5
    """Of the optimizer (default betas, no schedule)."""
    optimizer: str = "adam"
    """"adam" as in the scripts, "adamw", or with moments of 8 bits, from bitsandbytes, "adam8bit"
    and "adamw8bit"."""
    weight_decay: float | None = None
    """Of the AdamW kinds, decoupled; None: 0.01. Matrices that `keep_vocabulary` filters decay to
    what they were, others to zero."""
    max_grad_norm: float | None = None
    """Gradients whose norm, over all trained weights, is above it are shortened to it; None or 0:
    never, as in the scripts."""
    negative_guidance: float = 2.0
    """How far the target is pushed away from the concept. With the null anchor it is the paper's
    eta (equation 6); with the concept anchor it is eta + 1."""
    anchor: Literal["concept", "null"] = "concept"
    """What the target starts from where there is no `erase_from`."""
    guidance_scale: float = 3.0
    """Classifier-free guidance of the rollout."""
    num_inference_steps: int = 50
    """Scheduler steps of a whole trajectory."""
    rollout: Literal["frozen", "student"] = "frozen"
    """Who draws the trajectories: the frozen UNet, or the one in training (the paper)."""
    samples: Literal["all", "last"] = "all"
    """Train on every state of a trajectory, or (the reference) on the last of a random length."""
    schedule: Literal["model", "paper", "paper-diffusers"] = "model"
    """Timesteps: the model's own scheduler, or the DDIM lists of the two published scripts."""
    keep_vocabulary: float = 0.0
    """How strongly the tokenizer's other words hold back updates of cross-attention's keys and
    values (vocabulary.py); 0: not at all, as in the scripts; 1: by half in a direction that is as
    common in their states as the average one, by more in a commoner one."""
    collect_batch_size: int = 4
    """Trajectories side by side while collecting (the fused forward holds two or three times as
    many passes). Speed and memory, not the result, depend on it."""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """Blocks of the UNet that run again in the backward, so that less is kept: as many as `vram`
    demands, none, or all that the backward passes. Speed and memory depend on it, not the result."""
    vram: str = "auto"
    """What a run may take of the device, such as "8GB"; "auto": what is free of a CUDA device, no
    limit elsewhere."""
    resolution: int | None = None
    """Pixels a side; None: the model's own."""
    seed: int = 0
    """Of the initial noise, the drawn timesteps and the order of the samples."""
    dtype: str = "auto"
    """Of the frozen weights: "float32", "bfloat16", "float16"; "auto" keeps a live pipeline's own
    and takes what the device is fast in otherwise (on the CPU bfloat16 for big UNets alone, and
    where a probe says that it gains). Trainable weights have float32 masters."""
    quantize: str | None = None
    """Of the frozen weights while a run lasts: "int8" or "nf4" (quantize.py), from the extra
    bitsandbytes; None: as they are. Trainable weights stay exact, and so does what comes out: the
    model has its own weights again afterwards, the erased ones but for the training."""
    device: str = "auto"
    """"cuda", "cuda:1", "mps", "cpu"; "auto" keeps a live pipeline's own, else the best there."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Guided steps and fit steps recorded once and replayed, "auto": where the device is CUDA and
    recording works. Speed and memory depend on it, not the result."""
    variant: str | None = None
    """Of a model in diffusers' layout: which of its weight files, such as "fp16"."""
    ema: Literal["auto", "yes", "no"] = "auto"
    """Of a single file that holds the UNet twice: "yes" takes the running average (EMA), "no" and
    "auto" the weights that other tools load."""
    allow_pickle: bool = False
    """Read a .ckpt that holds pickled objects beside its weights; they can run any code."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts; "auto": what the model says, or a single file's UNet shows."""
    model_config: str | None = None
    """For a single file: a diffusers folder (or hub id) with the configurations of its
    components; None: the family's, which ship with the package."""
    given: tuple[str, ...] | None = None
    """Settings that were asked for, which no recipe of the model's family replaces; None: all."""

    @classmethod
    def from_preset(
        cls, preset: str, concept: str | Sequence[str], model: Any = None, **overrides: Any
    ) -> EraseConfig:
        """The recipe `preset` for `concept`; overrides that are None keep the recipe's value.

        The model's family may have values of its own: `with_recipe` puts them in once it is known.

        `model` (as `erase` takes it; nothing is loaded) matters to `fast` alone, whose values
        the embedded model has its own of.
        """
        said: object = preset
        if not isinstance(said, str) or said not in PRESETS:
            raise ValueError(f"preset {quoted(preset)} is unknown; there are {', '.join(PRESETS)}")
        names = {field.name for field in dataclasses.fields(cls)} - {"given"}
        for name in overrides:
            if name not in names:
                raise ValueError(f"{name!r} is no setting; there are {', '.join(sorted(names))}")
        given = {k: v for k, v in overrides.items() if v is not None}
        own = (
            embedded_recipe(given.get("train_method"))
            if preset == "fast" and is_embedded(model)
            else {}
        )
        settings = {**PRESETS[preset], **own, **given}
        made = cls(concept=concept, preset=preset, given=tuple({**own, **given}), **settings)
        if "iterations" in given or made.rollout == "student":
            return made
        return dataclasses.replace(made, iterations=made.iterations * len(made.concepts))

    @classmethod
    def recorded(cls, values: Any, where: str) -> EraseConfig:
        """The configuration that a run's file (a manifest, a checkpoint) holds; no recipe fills
        anything in. Whether pickled files may be read is asked anew: a file cannot consent to that.

        Raises ValueError, naming `where`, for what is no configuration of this version.
        """
        try:
            return cls(**{**values, "given": None, "allow_pickle": False})
        except TypeError as error:
            raise ValueError(f"{where}'s config is of another version: {error}") from None

    def for_model(self, model: Model) -> EraseConfig:
        """With what only a loaded model tells: its family's recipe, and what it preserves by
        default."""
        return self.completed(model.family, model.general_prompts)

    def completed(self, family: Family, general_prompts: Sequence[str]) -> EraseConfig:
        """The same, without the model."""
        config = self.with_recipe(family)
        preserve = resolved(config.preserve, general_prompts, config.concepts)
        return dataclasses.replace(config, preserve=preserve)

    def with_recipe(self, family: Family) -> EraseConfig:
        """With the family's own values for all settings that were not asked for."""
        if self.given is None:
            return self
        recipe = family.recipe(self.preset, self.train_method)
        return dataclasses.replace(self, **{k: v for k, v in recipe.items() if k not in self.given})

    @property
    def loading(self) -> Loading:
        return Loading(*(getattr(self, field.name) for field in dataclasses.fields(Loading)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "concept", clean_concepts(self.concept))
        object.__setattr__(self, "erase_from", clean_sources(self.erase_from, self.concepts))
        if self.concept_weights is not None:
            weights = clean_weights(self.concept_weights, self.concepts)
            object.__setattr__(self, "concept_weights", weights)
        object.__setattr__(self, "preserve", clean_preserve(self.preserve, self.concepts))
        check_number("preserve_weight", self.preserve_weight, above=0.0)
        if self.preserve and self.samples == "last":
            refuse(
                "preserve",
                self.preserve,
                "left out where samples is 'last', as in the presets of published recipes",
            )
        check_method(self.train_method)
        check_count("iterations", self.iterations)
        for name in ("batch_size", "collect_batch_size"):
            check_count(name, getattr(self, name), MOST_AT_A_TIME)
        check_count("num_inference_steps", self.num_inference_steps, MOST_STEPS)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("negative_guidance", self.negative_guidance)
        check_number("guidance_scale", self.guidance_scale)
        check_not_negative("keep_vocabulary", self.keep_vocabulary)
        if self.schedule == "paper-diffusers" and self.num_inference_steps < 3:
            refuse("num_inference_steps", self.num_inference_steps, "at least 3 for this schedule")
        if self.resolution is not None:
            check_resolution("resolution", self.resolution)
        check_seed("seed", self.seed)
        vram: object = self.vram
        if not isinstance(vram, str):
            refuse("vram", vram, "'auto' or a size such as '8GB'")
        if vram != "auto":
            bytes_of(self.vram)
        device: object = self.device
        if not isinstance(device, str):
            refuse("device", device, "a text: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
        preset: object = self.preset
        if not isinstance(preset, str) or preset not in PRESETS:
            refuse("preset", self.preset, " or ".join(repr(p) for p in PRESETS))
        check_choices(self, *CHOICES)
        _ = self.loading  # checks its own
        check_installed(self.optimizer)
        if self.quantize is not None:
            check_quantize(self.quantize, self.train_method)
            check_library(self.quantize)
        if self.weight_decay is not None:
            check_not_negative("weight_decay", self.weight_decay)
            if self.weight_decay and not OPTIMIZERS[self.optimizer].decays:
                refuse(
                    "weight_decay", self.weight_decay, "left out where no AdamW is the optimizer"
                )
        if self.max_grad_norm is not None:
            check_not_negative("max_grad_norm", self.max_grad_norm)
        if self.rollout == "student" and self.samples == "all":
            # every state of a student's trajectory would be answered by a different student
            refuse("samples", self.samples, "'last' where rollout is 'student'")
        if self.samples == "all" and self.schedule != "model":
            refuse("schedule", self.schedule, "'model' where samples is 'all'")
        if self.given is not None:
            object.__setattr__(self, "given", clean_names(self.given))
        if None in self.sources and self.erase_from is not None and self.anchor == "null":
            refuse("erase_from", self.erase_from, "one for each concept where anchor is 'null'")

    @property
    def concepts(self) -> tuple[str, ...]:
        """What is erased, one by one."""
        return (self.concept,) if isinstance(self.concept, str) else tuple(self.concept)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """What each concept is erased from; None: from everything."""
        if self.erase_from is None or isinstance(self.erase_from, str):
            return (self.erase_from,) * len(self.concepts)
        return tuple(self.erase_from)

    @property
    def samples_a_step(self) -> int:
        """Rows of a batch in training."""
        return self.batch_size * (2 if self.preserve else 1)

    @property
    def target_anchor(self) -> Anchor:
        """The prediction that the target really starts from."""
        return "erase_from" if self.erase_from is not None else self.anchor

    @property
    def eta(self) -> float:
        """The paper's negative guidance: the push counted from the null prediction's side."""
        return self.negative_guidance - (1.0 if self.target_anchor == "concept" else 0.0)


# The names of the field's recipes (where each number is from: the ESD paper and its scripts).
PRESETS: dict[str, dict[str, Any]] = {
    # every state of a few full trajectories, each used once
    "fast": {},  # the defaults; the embedded model has values of its own (demo.recipe)
    # the frozen-rollout script of 2025/26: a fresh rollout for every optimizer step
    "reference": {
        "iterations": 200,
        "batch_size": 1,
        "learning_rate": 5e-5,
        "negative_guidance": 2.0,
        "samples": "last",
    },
    # the paper's script on the original code base
    "paper": {
        "train_method": "ldm-xattn",
        "iterations": 1000,
        "batch_size": 1,
        "learning_rate": 1e-5,
        "negative_guidance": 1.0,
        "anchor": "null",
        "rollout": "student",
        "samples": "last",
        "schedule": "paper",
    },
    # the paper's algorithm as a diffusers script
    "paper-diffusers": {
        "iterations": 200,
        "batch_size": 1,
        "learning_rate": 2e-5,
        "negative_guidance": 2.0,
        "anchor": "null",
        "rollout": "student",
        "samples": "last",
        "schedule": "paper-diffusers",
    },
}
CHOICES: dict[str, tuple[str, ...]] = {
    "anchor": ("concept", "null"),
    "rollout": ("frozen", "student"),
    "samples": ("all", "last"),
    "schedule": ("model", "paper", "paper-diffusers"),
    "checkpointing": ("auto", "none", "all"),
    "optimizer": tuple(OPTIMIZERS),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "cuda_graphs": ("auto", "off"),
    "ema": ("auto", "yes", "no"),
    "prediction_type": ("auto", "epsilon", "v_prediction"),
}


def clean_concepts(concept: Any) -> str | tuple[str, ...]:
    """A text; a tuple of several."""
    if not isinstance(concept, (list, tuple)):
        return clean_prompt("concept", concept)
    if not concept:
        refuse("concept", concept, "a text, or a list of texts that holds one at least")
    cleaned = tuple(clean_prompt("concept", text) for text in concept)
    for text in cleaned:
        if cleaned.count(text) > 1:
            raise ValueError(f"concept holds {text!r} more than once; each must be there once")
    return cleaned if len(cleaned) > 1 else cleaned[0]


def clean_sources(
    erase_from: Any, concepts: tuple[str, ...]
) -> str | tuple[str | None, ...] | None:
    """One text for all concepts, or None; a tuple where they differ."""
    if erase_from is None:
        return None
    if not isinstance(erase_from, (list, tuple)):
        return clean_prompt("erase_from", erase_from)
    cleaned = tuple(None if t is None else clean_prompt("erase_from", t) for t in erase_from)
    if len(cleaned) == 1:
        return cleaned[0]
    if len(cleaned) != len(concepts):
        one_each = f"one text, or one for each of {len(concepts)} concepts"
        refuse("erase_from", erase_from, one_each if len(concepts) > 1 else "one text")
    return cleaned if len(set(cleaned)) > 1 else cleaned[0]


def clean_weights(weights: Any, concepts: tuple[str, ...]) -> tuple[float, ...]:
    if len(concepts) == 1:
        refuse("concept_weights", weights, "left out where one concept is erased")
    if not isinstance(weights, (list, tuple)) or len(weights) != len(concepts):
        refuse("concept_weights", weights, f"a list of {len(concepts)} numbers, one a concept")
    for weight in weights:
        check_number("concept_weights", weight, above=0.0)
    return tuple(float(weight) for weight in weights)


def clean_preserve(preserve: Any, concepts: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(preserve, str):
        preserve = [preserve]
    if not isinstance(preserve, (list, tuple)):
        refuse("preserve", preserve, "a list of texts")
    cleaned = tuple(dict.fromkeys(clean_prompt("preserve", text) for text in preserve))
    erased = {concept.casefold() for concept in concepts}
    for text in cleaned:
        if text.casefold() in erased:
            raise ValueError(f"preserve holds {text!r}, which is to be erased")
    return cleaned


def check_choices(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str) or value not in CHOICES[name]:
            refuse(name, value, " or ".join(repr(a) for a in CHOICES[name]))


def clean_names(given: Any) -> tuple[str, ...]:
    names = {field.name for field in dataclasses.fields(EraseConfig)}
    texts = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
    if not texts or not names.issuperset(given):
        refuse("given", given, "a list of settings' names, or None")
    return tuple(given)


def refuse(name: str, value: object, would_do: str) -> NoReturn:
    raise ValueError(f"{name} is {quoted(value)}; it must be {would_do}")


# beyond these a number is a slip of the hand, and would only be found out when memory is gone
MOST, MOST_AT_A_TIME, MOST_STEPS, MOST_PIXELS = 1_000_000, 10_000, 1000, 16_384


def check_count(name: str, value: object, most: int = MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        refuse(name, value, f"a whole number from 1, at most {most}")


def check_resolution(name: str, value: object) -> None:
    check_count(name, value, MOST_PIXELS)
    if value % 8:  # type: ignore[operator]
        refuse(name, value, "a multiple of 8, such as 512")


def check_seed(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(name, value, "a whole number from 0")
    if not 0 <= value < 2**63:
        refuse(name, value, "from 0 and below 2**63")


def check_number(name: str, value: object, above: float | None = None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        refuse(name, value, "a finite number")
    if above is not None and value <= above:  # type: ignore[operator]
        refuse(name, value, f"above {above:g}")


def check_not_negative(name: str, value: object) -> None:
    check_number(name, value)
    if value < 0:  # type: ignore[operator]
        refuse(name, value, "0 (off) or above, such as 1")


def bytes_of(text: str) -> int:
    """ "8GB", "8 GiB", "800MiB" in bytes. GB is 2**30 here: a card sold as 8 GB holds 8 GiB."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([GM])i?B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        refuse("vram", text, "a size such as 8GB or 800MB")
    return round(float(found[1]) * 2 ** {"G": 30, "M": 20}[found[2].upper()])
