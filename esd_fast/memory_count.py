"""Counting memory while a model runs: on the meta device nothing is computed and all is counted."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Kept:
    """One saved tensor, for as long as autograd keeps it."""

    __slots__ = ("__weakref__", "section", "tensor")

    def __init__(self, tensor: torch.Tensor, section: str) -> None:
        self.tensor, self.section = tensor, section


class SavedBytes:
    """What autograd keeps for the backward, counted by storage; `parameters` are not counted.

    `section` may be set along the way: it goes to the tensors saved from then on.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.parameters = {key_of(p) for p in parameters}
        self.kept: list[weakref.ref[Kept]] = []
        self.section = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor):
            yield

    def pack(self, tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor, self.section)
        self.kept.append(weakref.ref(kept))  # weak: what checkpointing lets go must not count
        return kept

    def by_section(self) -> dict[str, int]:
        """Bytes kept now, each storage with the section that saved it first."""
        seen: set[int] = set(self.parameters)
        found: dict[str, int] = {}
        for kept in filter(None, (k() for k in self.kept)):
            key = key_of(kept.tensor)
            if key not in seen:
                seen.add(key)
                size = kept.tensor.untyped_storage().nbytes()
                found[kept.section] = found.get(kept.section, 0) + size
        return found

    def total(self) -> int:
        return sum(self.by_section().values())


class Unknown(Exception):
    """Not all of a call's arguments, or of its results, can be told by their shapes."""


class MetaShapes:
    """Runs operators on meta tensors. Many of them find their results' shapes in Python, a millisecond
    a call; here each does so once for the same shapes of arguments, and fresh tensors follow."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        try:
            call = (func, told(args), told(tuple(kwargs.items())))
        except Unknown:
            return func(*args, **kwargs)
        if call not in self.known:
            result = func(*args, **kwargs)
            self.known[call] = layout_of(result, (args, kwargs))
            return result
        known = self.known[call]
        if known is None:
            return func(*args, **kwargs)
        made = [None if layout is None else fresh(*layout) for layout in known.tensors]
        return tuple(made) if known.several else made[0]


@dataclass(frozen=True)
class Layout:
    """Of a call's results: shape, strides and dtype, or None where there is no tensor."""

    tensors: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]
    several: bool


def told(value: Any) -> Hashable:
    """What of an argument decides the shapes of results. Raises Unknown."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise Unknown
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(told(v) for v in value)
    if value.__hash__ is None:
        raise Unknown
    return type(value), value  # 1 is not 1.0, nor True


def layout_of(result: Any, arguments: Any) -> Layout | None:
    """None where the result is more than fresh tensors that fill their storages."""
    several = isinstance(result, tuple)
    results = result if several else (result,)
    storages = [key_of(t) for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    layouts: list[Any] = []
    for one in results:
        if one is None:
            layouts.append(None)
            continue
        if not isinstance(one, torch.Tensor) or not one.is_meta or key_of(one) in storages:
            return None
        layouts.append((one.shape, one.stride(), one.dtype))
        if one.untyped_storage().nbytes() != fresh(*layouts[-1]).untyped_storage().nbytes():
            return None
        storages.append(key_of(one))
    return Layout(layouts, several)


def fresh(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that came to be within, now and at most, and the FLOPs of matrix
    products, convolutions and attention. What an operator takes and gives back inside is unseen.

    `shapes` may be shared by several that count alike: what is known there is not found out again.
    """

    def __init__(self, already: Iterable[torch.Tensor], shapes: MetaShapes | None = None) -> None:
        super().__init__()
        self.sizes = {key_of(t): 0 for t in already}
        self.shapes = MetaShapes() if shapes is None else shapes
        self.now = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.shapes.run(func, args, kwargs)
        count = flop_registry.get(FLASH_FLOPS.get(func.overloadpacket, func.overloadpacket))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        key, storage = key_of(tensor), tensor.untyped_storage()
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


aten = torch.ops.aten
# the counter of FLOPs knows flash attention under the names of the GPU's operators
FLASH_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


class FlashOnMeta(TorchFunctionMode):
    """The meta device would take attention apart into its products, with every probability kept.
    Every real device here has a fused kernel, which keeps query, key, value, output and one
    number a row, as this operator does.

    It does not reach into `backward`, which suspends modes like this one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, mask = (*args, None, None, None, None)[:4]
        named = {"query": query, "key": key, "value": value, "attn_mask": mask} | kwargs
        return aten._scaled_dot_product_flash_attention_for_cpu(
            named["query"],
            named["key"],
            named["value"],
            is_causal=named.get("is_causal", False),
            attn_mask=named["attn_mask"],
        )[0]


def key_of(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, while it lives."""
    return int(tensor.untyped_storage()._cdata)
