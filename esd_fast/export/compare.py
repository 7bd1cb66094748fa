"""What differs between two checkpoints, and how much, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.moves import layer_of
from esd_fast.tensor_files import Lazy, TensorFile, open_tensors

from .base import COMPONENTS, Base, components_of, configs_of, open_base
from .original_layout import UNET, whole_original

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Difference:
    """One tensor that differs: |b - a| / |a| (norms over all elements), and the largest change of
    an element. Infinite where `a` is all zeros."""

    name: str
    relative: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    equal: int
    differing: list[Difference]
    """The farthest first."""
    only_a: list[str]
    only_b: list[str]
    shapes: list[str]
    """Tensors whose shapes differ: not compared."""
    dtypes: list[str]
    """Tensors whose dtypes differ: compared in float64."""

    @property
    def same(self) -> bool:
        return not (self.differing or self.only_a or self.only_b or self.shapes or self.dtypes)


def compare(a: str | Path, b: str | Path, allow_pickle: bool = False) -> Comparison:
    """`a`, `b`: diffusers folders, hub ids, single files, or deltas (a file or the folder of a
    run). A delta is compared with the same tensors of the other; a folder and a single file under
    the single file's names, so far as both hold them.

    Raises FileNotFoundError or ValueError where one cannot be read.
    """
    first, second = (opened(str(path), allow_pickle) for path in (a, b))
    return compared(*matched(first, second, allow_pickle))


def opened(path: str, allow_pickle: bool) -> Base | dict[str, Lazy]:
    """A model, or a delta's tensors."""
    from esd_fast.erasure import delta_in, unet_tensors

    place = Path(path)
    if path == "embedded" or (place / "model_index.json").is_file() or not place.exists():
        return open_base(path, allow_pickle=allow_pickle)
    file = open_tensors(delta_in(place), allow_pickle)
    if is_checkpoint(file):
        return open_base(file.path, allow_pickle=allow_pickle)
    if file.raw is not None:
        return dict(file.tensors)
    plain = unet_tensors({n: t.read() for n, t in file.tensors.items()})
    return {n: Lazy.of(t) for n, t in plain.items()}


def is_checkpoint(file: TensorFile) -> bool:
    return any(name.startswith(UNET) for name in file.tensors)


Tensors = Mapping[str, Lazy]


def matched(
    a: Base | dict[str, Lazy], b: Base | dict[str, Lazy], allow_pickle: bool
) -> tuple[Tensors, Tensors]:
    """Both under the same names."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a, b
    if isinstance(a, dict):
        assert isinstance(b, Base)
        return a, {n: t for n, t in b.unet.items() if n in a}
    if isinstance(b, dict):
        return {n: t for n, t in a.unet.items() if n in b}, b
    if a.folder is not None and b.folder is not None:
        return prefixed(a, allow_pickle), prefixed(b, allow_pickle)
    if a.file is not None and b.file is not None:
        return a.file.tensors, b.file.tensors
    one, other = as_original(a, allow_pickle), as_original(b, allow_pickle)
    return (one, shared(other, one)) if a.file is None else (shared(one, other), other)


def prefixed(base: Base, allow_pickle: bool) -> dict[str, Lazy]:
    parts = components_of(base, allow_pickle)
    return {f"{c}.{n}": t for c in COMPONENTS if c in parts for n, t in parts[c].items()}


def as_original(base: Base, allow_pickle: bool) -> Tensors:
    if base.file is not None:
        return base.file.tensors
    return whole_original(components_of(base, allow_pickle), configs_of(base))


def shared(file: Tensors, converted: Tensors) -> Tensors:
    """Without what no diffusers folder holds: schedules, running averages, counters."""
    weights = (UNET, "first_stage_model.", "cond_stage_model.", "conditioner.")
    return {n: t for n, t in file.items() if n in converted or n.startswith(weights)}


def compared(a: Tensors, b: Tensors) -> Comparison:
    both = [name for name in a if name in b]
    shapes = [name for name in both if a[name].shape != b[name].shape]
    bent = set(shapes)
    differing = []
    for name in both:
        if name not in bent and (found := difference(name, a[name].read(), b[name].read())):
            differing.append(found)
    return Comparison(
        equal=len(both) - len(shapes) - len(differing),
        differing=sorted(differing, key=lambda d: -d.relative),
        only_a=[name for name in a if name not in b],
        only_b=[name for name in b if name not in a],
        shapes=shapes,
        dtypes=[name for name in both if a[name].dtype != b[name].dtype],
    )


def difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference | None:
    before, after = a.double(), b.double()
    if before.equal(after):
        return None
    change = after - before
    size = float(before.norm())
    moved = float(change.norm())
    return Difference(name, moved / size if size else float("inf"), float(change.abs().max()))


def as_json(found: Comparison) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "differing": [
            {"name": d.name, "relative": d.relative, "largest": d.largest} for d in found.differing
        ],
        "only_a": found.only_a,
        "only_b": found.only_b,
        "shapes": found.shapes,
        "dtypes": found.dtypes,
    }


def as_text(found: Comparison, rows: int = 20) -> str:
    first = (
        f"{found.equal} tensors are equal, {len(found.differing)} differ, "
        f"{len(found.only_a)} are in the first alone, {len(found.only_b)} in the second alone"
    )
    lines = [first]
    for names, text in (
        (found.only_a, "only in the first"),
        (found.only_b, "only in the second"),
        (found.shapes, "of another shape"),
        (found.dtypes, "of another dtype"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{text}: {', '.join(json.dumps(n)[1:-1] for n in names[:3])}{more}")
    if found.differing:
        by_layer: dict[str, list[Difference]] = {}
        for each in found.differing:
            by_layer.setdefault(layer_of(each.name), []).append(each)
        farthest = sorted(by_layer.items(), key=lambda item: -item[1][0].relative)
        lines += ["", f"{'layer':<60}{'tensors':>8}{'farthest':>12}{'largest':>12}"]
        lines += [
            f"{json.dumps(layer)[1:-1]:<60}{len(these):>8}{these[0].relative:>12.3g}"
            f"{max(d.largest for d in these):>12.3g}"
            for layer, these in farthest[:rows]
        ]
        if len(farthest) > rows:
            lines.append(f"... and {len(farthest) - rows} layers more")
    return "\n".join(lines)
