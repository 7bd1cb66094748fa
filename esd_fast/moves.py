"""How far an erasure moves a model's weights, tensor by tensor and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def move_of(name: str, tensor: Tensor, before: Tensor) -> dict[str, Any]:
    """`length` of the change and `size` of what was there (Euclidean norms in float32), their ratio
    `relative_move`, how many values changed (`moved` of `weights`), and how many differ in the
    model's own dtype (`moved_here`)."""
    after = tensor.to(before.device)
    was = before.float()
    change = after.float() - was
    length, size = float(change.norm()), float(was.norm())
    return {
        "name": name,
        "relative_move": relative(length, size),
        "length": length,
        "size": size,
        "new_size": float(after.float().norm()),
        "weights": tensor.numel(),
        "moved": int(change.count_nonzero()),
        "moved_here": int((after.to(before.dtype) != before).sum()),
    }


def moves_of(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each tensor of `before`, the farthest move first."""
    rows = [move_of(name, tensors[name], was) for name, was in before.items()]
    return sorted(rows, key=lambda row: -row["relative_move"])


def together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The same numbers for several tensors as one."""
    rows = list(rows)
    length, size, new_size = (
        math.hypot(*(row[key] for row in rows)) for key in ("length", "size", "new_size")
    )
    sums = {key: sum(row[key] for row in rows) for key in ("weights", "moved", "moved_here")}
    return {
        "relative_move": relative(length, size),
        "length": length,
        "size": size,
        "new_size": new_size,
        **sums,
    }


def by_layer(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each layer, the farthest move first."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        layers.setdefault(layer_of(row["name"]), []).append(row)
    table = [
        {"name": name, "tensors": len(these), **together(these)} for name, these in layers.items()
    ]
    return sorted(table, key=lambda row: -row["relative_move"])


def relative(length: float, size: float) -> float:
    return length / max(size, 1e-12)


def layer_of(name: str) -> str:
    """The block or layer that a tensor belongs to, for a short table: the name to its first three
    parts that are numbers or names of blocks."""
    parts = name.split(".")
    kept: list[str] = []
    for part in parts[:-1]:
        kept.append(part)
        if sum(p.isdigit() for p in kept) == 2:
            break
    return ".".join(kept)
