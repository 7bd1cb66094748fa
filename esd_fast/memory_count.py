"""Counting memory while a model runs: on the meta device nothing is computed and all is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that came to be within, now and at most, and the FLOPs of matrix
    products, convolutions and attention. What an operator takes and gives back inside is unseen."""

    def __init__(self, already: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {key_of(t): 0 for t in already}
        self.now = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
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
