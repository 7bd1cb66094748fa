"""What a base becomes under one or several erasures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esd_fast.config import check_number
from esd_fast.erasure import check_match, check_values, fingerprint

if TYPE_CHECKING:
    import torch

    from esd_fast.erasure import Erasure
    from esd_fast.tensor_files import Lazy

    from .base import Base


@dataclass(frozen=True)
class Merged:
    """`tensors`: what changes, by UNet name, float32 as trained; `original`: what was there, in
    the base's own dtype. `notes`: what the person should know, in sentences."""

    tensors: dict[str, torch.Tensor]
    original: dict[str, torch.Tensor]
    manifests: list[dict[str, Any]]
    notes: list[str]

    def stored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """As a file of that dtype holds it: rounded once, where it is written."""
        return self.tensors[name].to(dtype)


def merge(
    erasures: Sequence[Erasure],
    base: Base,
    strength: float = 1.0,
    allow_other_base: bool = False,
) -> Merged:
    """`base` plus the sum of what each erasure moved; of a tensor that one alone moved, at full
    strength, exactly its values.

    An erasure that was trained on the result of those before it is known by its fingerprint: its
    move is counted from there. Raises ValueError where one does not fit the UNet, is given twice,
    or (unless `allow_other_base`) was trained on other weights.
    """
    if not erasures:
        raise ValueError("erasures is empty; give at least one")
    check_number("strength", strength)
    original: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    for number, erasure in enumerate(erasures):
        for earlier in erasures[:number]:
            check_different(earlier, erasure)
        check_match(erasure.tensors, base.unet)
        check_values(erasure.tensors)
        new = [n for n in erasure.tensors if n not in original]
        original |= {n: base.unet[n].read() for n in new}
        ground = ground_of(erasure, original, state, base, allow_other_base, notes)
        for name, tensor in erasure.tensors.items():
            if name in state:
                state[name] = state[name] + (tensor.float() - ground[name].float())
            else:
                state[name] = tensor.float()
    notes += overlaps(erasures)
    if strength != 1:
        state = {n: original[n].float().lerp(t, strength) for n, t in state.items()}
    return Merged(state, original, [e.manifest for e in erasures], notes)


def trained_side(base: Base, erasures: Sequence[Erasure]) -> Base:
    """`base`, or where a file holds running averages (EMA) too and the first erasure was trained
    on those, with the two changing places."""
    first = erasures[0] if erasures else None
    if base.file is None or first is None or "base_fingerprint" not in first.manifest:
        return base
    if not base.ema_keys.keys() >= first.tensors.keys() or any(
        n not in base.unet for n in first.tensors
    ):
        return base
    tensors = base.file.tensors
    averages = {n: tensors[base.ema_keys[n]].read() for n in first.tensors}
    if not was_trained_on(first, averages):
        return base
    unet = {n: tensors[key] for n, key in base.ema_keys.items()}
    return replace(base, unet=unet, keys=base.ema_keys, ema_keys=base.keys)


def check_different(one: Erasure, other: Erasure) -> None:
    same = one.tensors.keys() == other.tensors.keys()
    if same and all(one.tensors[n].equal(t) for n, t in other.tensors.items()):
        raise ValueError(f"{other!r} is given twice; its move would be counted twice")


def ground_of(
    erasure: Erasure,
    original: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    base: Base,
    allow_other_base: bool,
    notes: list[str],
) -> Mapping[str, torch.Tensor]:
    """The weights that it was trained on: the base's, or those that erasures before it left."""
    told = erasure.manifest.get("base_fingerprint")
    if told is None:
        notes.append(f"{erasure!r} does not say what it was trained on; taken to be {base.source}")
        return original
    if was_trained_on(erasure, original):
        return original
    reached = {**original, **state}
    if state and was_trained_on(erasure, reached):
        return reached
    if all(t.to(original[n].dtype).equal(original[n]) for n, t in erasure.tensors.items()):
        raise ValueError(f"{erasure!r} is in place there already: {base.source}")
    trained_on = erasure.manifest.get("model", "another model")
    if not allow_other_base:
        raise ValueError(
            f"{erasure!r} was trained on other weights ({trained_on}) than {base.source} holds; "
            "--allow-other-base (allow_other_base=True) puts it there all the same"
        )
    notes.append(
        f"{erasure!r} was trained on other weights ({trained_on}): it replaces those of "
        f"{base.source}, whose own training in these layers is lost"
    )
    return original


def was_trained_on(erasure: Erasure, weights: Mapping[str, torch.Tensor]) -> bool:
    """By fingerprint, in the dtype that training held them in: a bfloat16 run reads a float32
    folder rounded."""
    import torch

    told = str(erasure.manifest["base_fingerprint"])
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        these = {n: weights[n] if dtype is None else weights[n].to(dtype) for n in erasure.tensors}
        if fingerprint(these) == told:
            return True
    return False


def overlaps(erasures: Sequence[Erasure]) -> list[str]:
    if len(erasures) < 2:
        return []
    counts: dict[str, int] = {}
    for erasure in erasures:
        for name in erasure.tensors:
            counts[name] = counts.get(name, 0) + 1
    shared = sum(count > 1 for count in counts.values())
    note = (
        f"{shared} of {len(counts)} tensors are moved by more than one erasure: their moves are "
        "added up, and whether each concept stays erased has to be looked at"
    )
    return [note] if shared else []


def replaced(part: Mapping[str, Lazy], keys: Mapping[str, str], merged: Merged) -> dict[str, Lazy]:
    """`part` with the changed tensors in it; `keys`: a UNet tensor's name in `part`."""
    from functools import partial

    from esd_fast.tensor_files import Lazy

    changed = {
        key: Lazy(part[key].dtype, part[key].shape, partial(merged.stored, name, part[key].dtype))
        for name, key in keys.items()
        if name in merged.tensors and key in part
    }
    return {**part, **changed}
