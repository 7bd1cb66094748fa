"""Does an erasure belong to a model, and does it do anything there? For people who trained, put
the file on, and saw nothing change."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from esd_fast.demo import world
from esd_fast.erasure import Erasure, fingerprint, unet_of
from esd_fast.export.merge import was_trained_on
from esd_fast.generate import Shot, pictures
from esd_fast.moves import moves_of, together
from esd_fast.parameters import METHODS, canonical_method, plain_parameters, trainable_names

from .key_kinds import what_it_is_for
from .recognition import Question, erased_questions, judged

if TYPE_CHECKING:
    from torch import Tensor

    from esd_fast.models import Model

Level = Literal["fine", "note", "problem"]

# of the weights' size: unrelated models are about 1.4 apart, erasures of the embedded model 0.4
FAR = 1.0
# times the weights' size: differences from weights are smaller than that, erased weights are not
SMALL = 0.5
# of 255, on average over a picture: less is seen by nobody
SEEN = 1.0
# of the pictures in which the concept was recognised before
STILL_THERE = 0.5
OTHER_COPY = (
    "whatever draws holds other weights: a UNet that was frozen into torch.compile, TensorRT, "
    "ONNX or OpenVINO, a recorded CUDA graph of other memory, a second pipeline, or a cache of "
    "pictures or of the UNet's answers; put the erasure on first, then compile, or start anew"
)
IF_YOUR_PICTURES_DO_NOT_CHANGE = (
    (
        "put it on the UNet that draws: esd_fast.load(FILE).apply(pipeline), or "
        "pipeline.unet.load_state_dict(load_file(FILE), strict=False), whose unexpected_keys must be "
        "empty"
    ),
    (
        "before torch.compile with freezing, and before an export to TensorRT, ONNX or OpenVINO: "
        "these keep copies of the old weights"
    ),
    (
        "clear caches of pictures, of latents, and of the UNet's answers (DeepCache and the like); a "
        "cache of text encoder states does no harm, since the text encoder is not changed"
    ),
    (
        "take off LoRAs and refiners that may bring the concept back, and compare pictures of the "
        "same seed"
    ),
)


@dataclass(frozen=True)
class Finding:
    """`what`: "keys", "base", "values", "moves", "pictures" or "concept"."""

    what: str
    level: Level
    text: str
    advice: str = ""


@dataclass
class Verification:
    """All that was found, in the order of looking, and the numbers by finding."""

    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)

    def fine_so_far(self, *whats: str) -> bool:
        return not any(f.level == "problem" and f.what in whats for f in self.findings)

    def say(self, what: str, level: Level, text: str, advice: str = "") -> None:
        self.findings.append(Finding(what, level, text, advice))


@dataclass(frozen=True)
class Look:
    """What is drawn with and without the erasure."""

    shots: tuple[Shot, ...]
    questions: tuple[Question, ...]  # for the embedded model's judge: of the same shots, or none
    settings: dict[str, Any]  # of generate.pictures

    @classmethod
    def of(
        cls,
        model: Model,
        erasure: Erasure,
        images: int,
        seed: int,
        settings: dict[str, Any],
        prompts: Sequence[str] = (),
    ) -> Look:
        """Of the concepts, or of `prompts`; `images` each, of the embedded model in all (but one
        a concept at least)."""
        concepts = concepts_of(erasure)
        embedded = model.source == "embedded" and not prompts
        known = world.all_named_in(concepts) if embedded else []
        if known:
            each = math.ceil(images / len(known))
            questions = tuple(q for c in known for q in erased_questions(c, each, seed))
            return cls(tuple(q.shot for q in questions), questions, settings)
        source = erasure.manifest.get("erase_from")
        texts = prompts or list(dict.fromkeys([*concepts, *([str(source)] if source else [])]))
        shots = tuple(Shot(text, seed + i) for text in texts for i in range(images))
        return cls(shots, (), settings)


def concepts_of(erasure: Erasure) -> list[str]:
    """What the manifest says; of a file that says nothing, what the reference calls such files
    after: esd-CONCEPT-from-..."""

    def plain(said: str) -> str:
        found = re.fullmatch(r"esd-(.+?)-from-.+", said)
        return re.sub(r"[-_]+", " ", found[1]) if found else said

    return [plain(said) for said in erasure.concepts] or [""]


def verify(
    erasure: Erasure,
    model: Model,
    look: Look | None = None,
    *,
    allow_other_base: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Look at names and shapes, the base, the values, how far they move the weights, and (with
    `look`) pictures from the same noise. The model is left as it was."""
    found = Verification()
    unet = unet_of(model.pipeline)
    parameters: dict[str, torch.Tensor] = dict(plain_parameters(unet))
    check_keys(found, erasure, model, parameters)
    if not found.fine:
        return found
    weights = {n: p.detach() for n, p in parameters.items() if n in erasure.tensors}
    check_values(found, erasure, weights)
    check_moves(found, erasure, weights)
    check_base(found, erasure, model, weights, allow_other_base)
    if look is not None and found.fine_so_far("values"):
        check_pictures(found, erasure, model, unet, look, on_progress)
    return found


# --- names and shapes ----------------------------------------------------------------------------


def check_keys(
    found: Verification, erasure: Erasure, model: Model, parameters: Mapping[str, Tensor]
) -> None:
    tensors = erasure.tensors
    unknown = [n for n in tensors if n not in parameters]
    bent = [n for n in tensors if n in parameters and tensors[n].shape != parameters[n].shape]
    matched = len(tensors) - len(unknown) - len(bent)
    found.numbers["keys"] = {
        "in_file": len(tensors),
        "matched": matched,
        "unknown": unknown,
        "other_shape": bent,
    }
    if not tensors:
        found.say("keys", "problem", "the file holds no tensor", "train again, or copy it again")
    elif unknown or bent:
        told = f"{matched} of the file's {len(tensors)} tensors fit this UNet"
        if bent:
            name = bent[0]
            shapes = " for ".join(str(list(t[name].shape)) for t in (tensors, parameters))
            told += f"; {len(bent)} have another shape ({name}: {shapes})"
        if unknown:
            told += f"; {len(unknown)} names are not in it ({unknown[0]})"
        kind, advice = what_it_is_for(tensors)
        found.say("keys", "problem", f"{told}: {kind}", advice)
    else:
        found.say("keys", "fine", f"all {matched} tensors fit the UNet by name and shape")
        check_whole(found, erasure, model)


def check_whole(found: Verification, erasure: Erasure, model: Model) -> None:
    """Whether the file has all that its method trains; a file of others may not name one."""
    method = erasure.manifest.get("method")
    if canonical_method(str(method)) not in METHODS:  # an expression of a stranger's is not run
        return
    try:
        expected = trainable_names(unet_of(model.pipeline), str(method), model.family.name)
    except ValueError:  # "merged", "unknown", or a method of another program
        return
    missing = [name for name in expected if name not in erasure.tensors]
    found.numbers["keys"]["missing"] = missing
    if missing:
        found.say(
            "keys",
            "note",
            f"method {method} trains {len(expected)} tensors of this UNet, and {len(missing)} of "
            f"them are not in the file ({missing[0]})",
            "perhaps it was cut, or trained with other rules under the same name",
        )


# --- values --------------------------------------------------------------------------------------


def check_values(found: Verification, erasure: Erasure, weights: Mapping[str, Tensor]) -> None:
    tensors = erasure.tensors
    broken = [n for n, t in tensors.items() if not t.isfinite().all()]
    overflowing = [
        n
        for n, t in tensors.items()
        if n not in broken and not t.to(weights[n].dtype).isfinite().all()
    ]
    empty = [n for n, t in tensors.items() if not t.any() and weights[n].any()]
    found.numbers["values"] = {
        "not_finite": broken,
        "overflowing": overflowing,
        "zero": empty,
    }
    if broken:
        found.say(
            "values",
            "problem",
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinity ({broken[0]}): every "
            "picture would be black or noise",
            "training diverged: train again with a lower learning rate, or in float32",
        )
    if overflowing:
        name = overflowing[0]
        dtype = short(weights[name].dtype)
        found.say(
            "values",
            "problem",
            f"{len(overflowing)} tensors do not fit into {dtype} ({name})",
            "load the model in float32 or bfloat16",
        )
    if empty:
        found.say(
            "values",
            "problem",
            f"{len(empty)} of {len(tensors)} tensors are all zero ({empty[0]}): they would switch "
            "these layers off",
            "the file was not written whole: train again, or copy it again",
        )
    if not (broken or overflowing or empty):
        found.say("values", "fine", "every value is finite, no tensor is all zero")


# --- how far it moves the weights ----------------------------------------------------------------


def check_moves(found: Verification, erasure: Erasure, weights: Mapping[str, Tensor]) -> None:
    layers = moves_of(erasure.tensors, weights)
    whole = together(layers)
    count, moved, kept = (whole[k] for k in ("weights", "moved", "moved_here"))
    size, new_size, relative = (whole[k] for k in ("size", "new_size", "relative_move"))
    dtype = short(next(iter(weights.values())).dtype)
    found.numbers["moves"] = {
        "relative_move": relative,
        "weights": count,
        "moved": moved,
        f"moved_in_{dtype}": kept,
        "by_layer": [
            {k: row[k] for k in ("name", "relative_move", "moved", "moved_here")} for row in layers
        ],
    }
    if not moved:
        found.say(
            "moves",
            "problem",
            "the file holds exactly the weights that the model has: nothing changes",
            "either nothing was trained, or this model has the erasure in it already: verify "
            "against the model that was trained on",
        )
    elif not kept:
        found.say(
            "moves",
            "problem",
            f"all {moved:,} moved weights are rounded back to what they were in {dtype}",
            "the moves are tiny: load the model in float32, or train longer or at a higher rate",
        )
    elif 0.8 < relative < 1.2 and new_size < SMALL * size:
        found.say(
            "moves",
            "problem",
            f"the values are {new_size / size:.2g} times as large as the model's: they look like "
            "differences from weights, not weights",
            "add them to the base's weights first",
        )
    else:
        lost = 1 - kept / moved
        note = f"; {lost:.0%} of the moves are rounded away in {dtype}" if lost > 0.01 else ""
        still = sum(not row["moved_here"] for row in layers)
        note += f"; {still} of {len(layers)} tensors stay as they are" if still else ""
        found.say(
            "moves",
            "note" if lost > 0.5 or still else "fine",
            f"it moves {kept / count:.1%} of {count:,} weights, by {relative:.3%} of their size; "
            f"most in {layers[0]['name']} ({layers[0]['relative_move']:.3%}){note}",
        )


# --- what it was trained on ----------------------------------------------------------------------


def check_base(
    found: Verification,
    erasure: Erasure,
    model: Model,
    weights: Mapping[str, Tensor],
    allow_other_base: bool,
) -> None:
    told = erasure.manifest.get("base_fingerprint")
    named = erasure.manifest.get("model", "unknown")
    here = fingerprint(weights)
    same = None if told is None else was_trained_on(erasure, weights)
    found.numbers["base"] = {
        "trained_on": named,
        "fingerprint": told,
        "model": model.source,
        "model_fingerprint": here,
        "same": same,
    }
    relative = found.numbers["moves"]["relative_move"]
    if not found.fine_so_far("moves"):
        return  # the weights say more than the name of what they were
    if same:
        found.say("base", "fine", f"it was trained on these very weights ({told})")
    elif same is False:
        found.say(
            "base",
            "note" if allow_other_base else "problem",
            f"the file fits, but belongs to another fine-tune: it was trained on {named} "
            f"({told}), and {model.source} holds other weights ({here})",
            f"put it on {named}, or train again on this model: here it would replace these "
            "layers' own training; --allow-other-base takes that as it is",
        )
    elif relative > FAR:
        found.say(
            "base",
            "problem",
            f"the file does not say what it was trained on (it names {named}), and is as far from "
            f"this model's weights ({relative:.0%} of their size) as an unrelated model's",
            "find the model that it was trained on; --model takes it",
        )
    else:
        found.say(
            "base",
            "note",
            f"the file does not say which weights it was trained on; it names {named}, this is "
            f"{model.source}",
        )


# --- pictures ------------------------------------------------------------------------------------


def check_pictures(
    found: Verification,
    erasure: Erasure,
    model: Model,
    unet: torch.nn.Module,
    look: Look,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    total = 2 * len(look.shots)

    def drawn(first: int) -> np.ndarray:
        tell = (lambda done, _: on_progress(first + done, total)) if on_progress else None
        stream = pictures(model.pipeline, look.shots, on_progress=tell, **look.settings)
        return np.stack(list(stream))

    before = drawn(0)
    # one of its own: `erasure` may be in place already, and would be taken off
    trial = Erasure(erasure.tensors, erasure.manifest)
    trial.apply(unet)
    try:
        after = drawn(len(look.shots))
    finally:
        trial.revert(unet)
    change = np.abs(after.astype(np.int16) - before)  # (N, H, W, 3)
    each = change.reshape(len(change), -1)
    mean, changed = float(each.mean()), float(each.any(1).mean())
    found.numbers["pictures"] = {
        "images": len(each),
        "prompts": list(dict.fromkeys(shot.prompt for shot in look.shots)),
        "mean_absolute_difference": mean,
        "share_changed": changed,
        "share_seen_to_change": float((each.mean(1) >= SEEN).mean()),
        **{k: v for k, v in look.settings.items() if k != "batch_size"},
    }
    if found.fine_so_far("moves"):
        judge_pictures(found, mean, changed, len(each))
    if look.questions:
        judge_concepts(found, look.questions, before, after)


def judge_pictures(found: Verification, mean: float, changed: float, count: int) -> None:
    told = f"{changed:.0%} of {count} pictures change; the pixels by {mean:.1f} of 255 on average"
    if not changed:
        found.say(
            "pictures",
            "problem",
            f"the weights in the UNet change, but none of {count} pictures does",
            OTHER_COPY,
        )
    elif mean < SEEN:
        found.say(
            "pictures",
            "problem",
            f"{told}: nobody sees that",
            "the erasure is too weak: more iterations, a higher learning rate or negative guidance",
        )
    else:
        found.say("pictures", "fine", told)


def judge_concepts(
    found: Verification, questions: Sequence[Question], before: np.ndarray, after: np.ndarray
) -> None:
    """A finding for each; the numbers of a single one are a table, of several a list."""
    was, now = (judged(drawn, questions, ("judge",)).by_concept() for drawn in (before, after))
    rows = [
        {
            "concept": concept,
            "judge": "the embedded model's",
            "images": images,
            "recognised_before": was[concept][0] / images,
            "recognised_after": seen / images,
        }
        for concept, (seen, images) in now.items()
    ]
    found.numbers["concept"] = rows[0] if len(rows) == 1 else rows
    for row in rows:
        judge_concept(found, row)


def judge_concept(found: Verification, row: dict[str, Any]) -> None:
    first, left = row["recognised_before"], row["recognised_after"]
    told = (
        f"{row['concept']!r} is recognised in {first:.0%} of {row['images']} pictures "
        f"without it, in {left:.0%} with it"
    )
    if left > STILL_THERE * first:
        found.say(
            "concept",
            "problem",
            told,
            "the erasure is too weak: more iterations, a higher learning rate or negative guidance",
        )
    else:
        found.say("concept", "fine", told)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
