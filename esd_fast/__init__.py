"""esd-fast: erase a concept from a diffusion model (ESD), fast.

erasure = esd_fast.erase(pipeline, "Van Gogh")   # the pipeline is left erased
erasure.save("out/")                             # the reference's file format
erasure.revert(pipeline)                         # every bit as before
esd_fast.load("out/").apply(pipeline)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collecting import collect_samples
    from .config import PRESETS, EraseConfig
    from .erasure import Erasure, load
    from .esd import EraseInterrupted, Progress, erase
    from .pages import give_back_pages, keep_pages

IMPORTED = time.monotonic()  # a command's work is counted from here: imports are part of the wait
__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "EraseConfig",
    "EraseInterrupted",
    "Erasure",
    "Progress",
    "collect_samples",
    "erase",
    "give_back_pages",
    "keep_pages",
    "load",
]
# name -> module: imported on first use, so that `import esd_fast` and --help stay light
_HOMES = {
    "EraseConfig": "config",
    "PRESETS": "config",
    "EraseInterrupted": "esd",
    "Progress": "esd",
    "erase": "esd",
    "collect_samples": "collecting",
    "Erasure": "erasure",
    "load": "erasure",
    "keep_pages": "pages",
    "give_back_pages": "pages",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
