"""What came of a job; plain enough to come back from another machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Made:
    """`file`: the bytes of the erasure's safetensors file. `notes`: what was warned of."""

    file: bytes
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """This job cannot be done; its worker goes on."""

    reason: str


@dataclass(frozen=True)
class Unusable:
    """The worker could not begin: any job would end so there."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker died over the job."""

    reason: str


Outcome = Made | Failed | Unusable | Lost
