"""How things are measured: interleaved, synchronised, medians; memory in fresh processes."""

from __future__ import annotations

import concurrent.futures
import datetime as dt
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esd_fast.commands.console import peak_memory_bytes, resident_bytes

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What the command line asks of every suite."""

    device: str = "cpu"
    quick: bool = False  # fewest repeats, smallest shapes: does it run at all?
    concepts: tuple[str, ...] = ()  # of the suite erase; empty: its own choice
    contestants: tuple[str, ...] = ()
    seeds: int = 3
    erased: int = 64  # pictures
    kept: int = 400
    done: tuple[Any, ...] = ()  # rows of an earlier run, not to be measured again


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, and of the first call of all."""

    seconds: tuple[float, ...]
    first: float

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def columns(self) -> dict[str, Any]:
        """As rows.Row names them."""
        low, high = np.quantile(self.seconds, [0.1, 0.9])
        return {
            "seconds": self.median,
            "seconds_p10": float(low),
            "seconds_p90": float(high),
            "repeats": len(self.seconds),
            "first_seconds": self.first,
        }


def interleaved(
    contestants: dict[str, Callable[[], object]],
    device: str | torch.device,
    repeats: int,
    inner: int = 1,
) -> dict[str, Timing]:
    """Time callables against each other: A B, B A, A B, ... after one warm-up call of each.

    `inner` calls make one measurement (for what is too short to time alone). A drift of the
    machine's speed so meets all of them alike.
    """
    first = {name: seconds_of(run, device, 1) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(seconds_of(contestants[name], device, inner))
        order.reverse()
    return {name: Timing(tuple(seconds[name]), first[name]) for name in contestants}


def seconds_of(run: Callable[[], object], device: str | torch.device, inner: int) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(inner):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / inner


def inner_calls(run: Callable[[], object], device: str | torch.device, least: float) -> int:
    """How many calls take about `least` seconds."""
    run()
    return max(1, round(least / max(1e-7, seconds_of(run, device, 3))))


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -----------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a new interpreter, so that one contestant's memory is not another's."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def reset_peak(device: str | torch.device) -> int:
    """Start to measure the peak anew; returns the bytes held now."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak(device: str | torch.device) -> int:
    """Bytes: the CUDA allocator's peak, or the resident peak of this process since reset_peak."""
    return peak_memory_bytes(device)


# --- where ------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to know of where and with what rows were measured."""
    from esd_fast.erasure import versions

    found = versions()
    for package in ("triton", "xformers"):
        found[package] = version_of(package)
    return {
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        # paths by their last part: where somebody's folders lie is nobody's business
        "command": " ".join(["python", *(Path(a).name if "/" in a else a for a in sys.argv)]),
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": found,
    }


def version_of(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit, marked where files differ from it."""
    asked = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = (
        [x for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    name = (
        names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    )
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
