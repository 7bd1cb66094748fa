"""What commands show while they work, and settings of the process that are theirs to make."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm


def quiet_libraries() -> None:
    """One progress bar at a time, ours."""
    import logging
    import warnings

    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    warnings.filterwarnings("ignore", message="Detected pickle protocol")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it where it is


class Bars:
    """One bar a phase, with loss and the time left."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.phase = ""

    def show(self, phase: str, done: int, total: int, loss: float | None = None) -> None:
        if phase != self.phase:
            self.close()
            self.phase, self.bar = phase, tqdm(total=total, desc=f"{phase:<12}", unit=UNITS[phase])
        assert self.bar is not None
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(done - self.bar.n)

    def drawing(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self.show(phase, done, total)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.phase, self.bar = "", None


UNITS = {
    "draw before": "picture",
    "collect": "pass",
    "fit": "step",
    "draw after": "picture",
    "draw": "picture",
    **dict.fromkeys(("judge", "clip", "nudenet"), "picture"),
    **dict.fromkeys(("lpips", "fid", "kid"), "erasure"),
    "invert": "step",
}


def peak_memory_bytes(device: Any) -> int:
    """CUDA: the allocator's peak. Elsewhere: the process's resident peak."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    try:
        return resident_bytes("VmHWM")
    except OSError:  # no /proc. Where there is one ru_maxrss would also count the starting process
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def resident_bytes(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the most so far. Raises OSError where there is no /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024
