"""Files of named tensors: read tensor by tensor, written as a stream.

safetensors files are mapped, so that what is copied from one to another is never held in memory.
Pickled ones (.ckpt, .pt, .pth, .bin) are read by torch's weights_only loader, which builds tensors
and plain containers and runs no code.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import parsed_json, replacing

if TYPE_CHECKING:
    import torch

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
# the format's names (github.com/huggingface/safetensors, "Format")
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lazy:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


@dataclass(frozen=True)
class TensorFile:
    path: Path
    tensors: Mapping[str, Lazy]
    metadata: dict[str, str]
    raw: Callable[[str], memoryview] | None = None
    """A tensor's bytes as they lie in the file; None where it is no safetensors file."""


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """Raises FileNotFoundError, or ValueError where the file holds no tensors that may be read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in PICKLED:
        state = read_pickled(path, allow_pickle)
        return TensorFile(path, {n: Lazy.of(t) for n, t in state.items()}, {})
    raise ValueError(f"{path} must be a file {', '.join(('.safetensors', *PICKLED))}")


LONGEST_SIDE = 2**63 - 1  # torch's; a tensor of no elements may claim any in its file


def check_sides(path: Path, shapes: Iterable[Iterable[int]]) -> None:
    """Raises ValueError where no tensor of torch can be so long."""
    if any(side > LONGEST_SIDE for shape in shapes for side in shape):
        raise ValueError(f"{path} is damaged: a tensor's shape is no shape")


def open_safetensors(path: Path) -> TensorFile:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:  # checks every offset and size
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parsed_json(file.read(length), str(path), without_doubles(path))
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    header.pop("__metadata__", None)
    check_sides(path, (entry["shape"] for entry in header.values()))
    unknown = {e["dtype"] for e in header.values()} - DTYPES.keys()
    if unknown:
        raise ValueError(f"{path} holds tensors of a type not known here: {', '.join(unknown)}")

    def raw(name: str) -> memoryview:
        first, end = header[name]["data_offsets"]
        return mapped[8 + length + first : 8 + length + end]

    def lazy(name: str) -> Lazy:
        dtype = getattr(torch, DTYPES[header[name]["dtype"]])
        shape = tuple(header[name]["shape"])

        def read() -> torch.Tensor:
            content = bytearray(raw(name))  # a copy: the map cannot be written to
            if not content:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(content, dtype=torch.uint8).view(dtype).reshape(shape)

        return Lazy(dtype, shape, read)

    return TensorFile(path, {name: lazy(name) for name in header}, metadata, raw)


def without_doubles(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For JSON: of two tensors of one name every reader takes another one."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError(f"{path} names something twice in its header; copy it again")
        return made

    return table


def read_pickled(path: Path, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file by name; containers in it are joined with dots
    ({"a": {"weight": ..}} gives "a.weight"), and a "state_dict" around all is taken off.

    Raises ValueError where it is damaged, or holds more than tensors and plain containers: that
    would run code. `allow_pickle` runs it.
    """
    from .models.checkpoint import unpickled

    content = unpickled(path, allow_pickle)
    try:
        found = dict(leaves(content))
    except RecursionError:
        raise ValueError(f"{path} is damaged: its tables hold each other without end") from None
    inner = "state_dict."
    if any(name.startswith(inner) for name in found):
        found = {n.removeprefix(inner): t for n, t in found.items() if n.startswith(inner)}
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found


def leaves(content: Any, name: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content.detach()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))


def write_tensors(
    target: Path,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    raw: Callable[[str], memoryview | None] = lambda name: None,  # noqa: ARG005
) -> None:
    """A safetensors file, one tensor in memory at a time. `raw` gives the bytes of a tensor that
    is only copied."""
    import torch

    names = {getattr(torch, v): k for k, v in DTYPES.items()}
    # largest elements first, then by name: every tensor is aligned, as safetensors itself does
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        told = tensors[name]
        size = told.dtype.itemsize
        for side in told.shape:
            size *= side
        header[name] = {
            "dtype": names[told.dtype],
            "shape": list(told.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(target) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            content = raw(name)
            file.write(bytes_of(tensors[name].read()) if content is None else content)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    # flat first: a channels_last 1x1 kernel counts as contiguous with strides of its own
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
