"""Several processes of one command, as torchrun, `accelerate launch` or a person starts them: which of
them this is, by the variables that they set, and who of them writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from esd_fast.config import refuse

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.parallel import Ranks

WAIT = timedelta(minutes=1)  # for the others to be there, and for tensors that are on their way


@dataclass(frozen=True)
class Place:
    """Of this process: its number of all, and of those on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    beside: int = 1


def place_of(environment: Mapping[str, str]) -> Place:
    """Raises ValueError where the variables are no numbers, or one of them is missing."""
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return Place()

    def number(name: str, default: str | None = None) -> int:
        text = environment.get(name, default)
        if text is None or not text.isascii() or not text.isdigit():
            refuse(name, text, "a whole number, which torchrun sets")
        return int(text)

    size, rank = number("WORLD_SIZE"), number("RANK")
    beside = number("LOCAL_WORLD_SIZE", str(size))
    place = Place(rank, size, number("LOCAL_RANK", str(rank)), beside)
    for name, value, end in (("RANK", rank, size), ("LOCAL_RANK", place.local, beside)):
        if value >= end:
            refuse(name, value, f"below the number of processes, {end}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            refuse(name, environment.get(name), "where the first process is, which torchrun sets")
    return place


@contextmanager
def launched() -> Iterator[Ranks]:
    """Within: torch.distributed, where there are several processes. All but the first are silent;
    where they fail one of them lets its error out, and the others leave with SystemExit."""
    place = place_of(os.environ)
    if place.size == 1:
        from esd_fast.parallel import Ranks

        yield Ranks()
        return
    with ExitStack() as stack:
        if place.rank:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        begin(place)
        import torch.distributed as dist

        from esd_fast.parallel import FAILED, joined

        with joined() as ranks:
            try:
                yield ranks
            except BaseException as error:
                ranks.tell(error, FAILED)
                if not ranks.speaks:
                    raise SystemExit(1) from None
                raise
        dist.destroy_process_group()


def begin(place: Place) -> None:
    """Raises RuntimeError where the others are not there in time."""
    import torch
    import torch.distributed as dist

    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        torch.set_num_threads(max(1, torch.get_num_threads() // place.beside))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    except RuntimeError as error:
        raise RuntimeError(
            f"process {place.rank} of {place.size} did not find the others within "
            f"{WAIT.seconds} seconds at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from None


def placed(config: EraseConfig, ranks: Ranks, asked: str | None) -> EraseConfig:
    """`config` on this process's own device; `asked`: what the command line says of it. Raises
    ValueError for one that several processes cannot share, or too small a batch."""
    if ranks.size == 1:
        return config
    ranks.check_batch(config)
    kind, _, number = config.device.partition(":")
    if asked is not None and (number or kind == "mps"):
        refuse(
            "--device",
            asked,
            "cpu or cuda where there are several processes, each of which takes the GPU of its number",
        )
    import torch

    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        return replace(config, device=kind)
    local, cards = place_of(os.environ).local, torch.cuda.device_count()
    if local >= cards:
        raise ValueError(
            f"process {local} of this machine has no GPU, there are {cards}; start at most so many "
            "processes on it, or give --device cpu"
        )
    torch.cuda.set_device(local)
    return replace(config, device=f"cuda:{local}")
