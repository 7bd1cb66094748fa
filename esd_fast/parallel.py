"""Several processes that train one erasure together: who is who, what they share, how they stop as one.

torch.distributed does the talking. Tensors travel by the group that is initialised (NCCL between
GPUs, gloo between CPUs). Whether to go on is agreed on over a gloo group of our own, which waits
for the slowest as long as it takes, and where one that has died is noticed at once: its connection
closes. Tensors are sent only right after all have agreed, so nobody is left waiting for one that
has stopped.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line makes a Ranks before it needs torch
    import torch
    from torch import Tensor

    from .config import EraseConfig

PATIENCE = timedelta(days=1)  # for a process that draws pictures meanwhile, or has the slower card
BUCKET = 2**26  # elements that are averaged in one go: what they take on top is 256 MB
# what a process says of itself; of all that is said the highest counts
WORKING, DONE, INTERRUPTED, OUT_OF_MEMORY, FAILED = range(5)


class PeerFailed(RuntimeError):
    """Another process has failed, and tells the reason itself."""


class PeerLost(RuntimeError):
    """Another process is gone without a word, or out of reach."""


@dataclass
class Ranks:
    """This process, number `rank` of `size`. One alone agrees with itself: nothing is sent."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Of gloo, of all processes."""
    stopping: bool = False
    """A signal came; said where they next agree."""
    speaks: bool = True
    """Whether it is this process that tells of the end that all have come to."""
    heard: BaseException | None = field(default=None, repr=False)
    """What the last agreement raised: no news to the others."""

    @property
    def first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Its share of a batch: every `size`-th row."""
        return slice(self.rank, None, self.size)

    def whole(self, config: EraseConfig) -> EraseConfig:
        """`config`, whose batch is of each process, as of all of them."""
        return replace(config, batch_size=config.batch_size * self.size)

    def own(self, config: EraseConfig) -> EraseConfig:
        """`config`, whose batch is of all processes, as of the one with most of it."""
        return replace(config, batch_size=math.ceil(config.batch_size / self.size))

    def check_batch(self, config: EraseConfig) -> None:
        """Raises ValueError where there are more processes than rows to a batch."""
        if config.batch_size < self.size:
            raise ValueError(
                f"the batch is {config.batch_size} in all and there are {self.size} processes; "
                f"a larger batch_size, or at most {config.batch_size} processes, would do"
            )

    # --- going on or not ----------------------------------------------------------------------------------

    def agree(self, *numbers: float, done: bool = False) -> tuple[list[float], bool]:
        """Everyone's `numbers` added up, in one order, and whether all are `done`.

        Raises, on all processes alike, KeyboardInterrupt where one was interrupted,
        torch.OutOfMemoryError where one ran out of memory; PeerFailed where another one failed.
        """
        if self.size == 1:
            return list(numbers), done
        state = INTERRUPTED if self.stopping else DONE if done else WORKING
        states, sums = self.exchange(state, *numbers)
        self.obey(states)
        return sums, all(state == DONE for state in states)

    def mean(self, value: float, count: int) -> tuple[float, int]:
        """The mean of what everyone has `count` of, and how many they are together. Raises as
        `agree` does."""
        if self.size == 1:
            return value, count
        (total, counted), _ = self.agree(value * count, count)
        return total / counted, int(counted)

    def tell(self, error: BaseException, state: int | None = None) -> None:
        """This process stops by `error`; the others learn it where they next agree. Raises
        PeerFailed where `error` is the lesser of two."""
        if self.size == 1 or error is self.heard:
            return
        import torch

        if state is None:
            state = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            state = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else state
        try:
            states, _ = self.exchange(state)
        except PeerLost:  # nobody is there to be told
            states = [state if rank == self.rank else WORKING for rank in range(self.size)]
        if max(states) > state:
            self.obey(states)
        self.note_speaker(states)
        self.heard, self.stopping = error, False

    def obey(self, states: Sequence[int]) -> None:
        import torch

        worst = max(states)
        if worst <= DONE:
            return
        self.note_speaker(states)
        self.stopping = False
        teller = states.index(worst)
        self.heard = {
            INTERRUPTED: KeyboardInterrupt(),
            OUT_OF_MEMORY: torch.OutOfMemoryError(f"memory ran out in process {teller}"),
            FAILED: PeerFailed(f"process {teller} failed"),
        }[worst]
        raise self.heard

    def note_speaker(self, states: Sequence[int]) -> None:
        self.speaks = states.index(max(states)) == self.rank

    def exchange(self, state: int, *numbers: float) -> tuple[list[int], list[float]]:
        import torch
        import torch.distributed as dist

        mine = torch.tensor([state, *numbers], dtype=torch.float64, device="cpu")
        padded = torch.zeros(4, dtype=torch.float64, device="cpu")  # one size, whatever is said
        padded[: len(mine)] = mine
        every = [torch.empty_like(padded) for _ in range(self.size)]
        with self.talking():
            dist.all_gather(every, padded, group=self.group)
        table = torch.stack(every)  # (size, 4)
        return table[:, 0].int().tolist(), table[:, 1 : len(mine)].sum(0).tolist()

    @contextmanager
    def talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.heard = PeerLost(
                f"process {self.rank} cannot reach the others: one was killed, or hangs "
                f"({str(error).strip().partition(chr(10))[0][:200]})"
            )
            self.speaks = True
            raise self.heard from None

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Within: where this process fails, the others do where they next agree."""
        try:
            yield
        except Exception as error:
            self.tell(error)
            raise

    @contextmanager
    def signals_held(self) -> Iterator[None]:
        """Within: Ctrl-C and SIGTERM stop all processes together, where they next agree. In the
        main thread, where there are several processes."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            self.stopping = True

        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    stack.callback(signal.signal, number, before)
                    signal.signal(number, note)
            yield

    # --- what is shared -----------------------------------------------------------------------------------

    def everyones(self, value: Any) -> list[Any]:
        """What each process gives, a few plain values, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.agree()
        every: list[Any] = [None] * self.size
        with self.talking():
            dist.all_gather_object(every, value, group=self.group)
        return every

    def check_alike(self, told: dict[str, str]) -> None:
        """Raises ValueError, on all processes, where one was told something else."""
        every = self.everyones(told)
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"process {rank} has another {name} than process 0: all processes of "
                        f"torch.distributed train one erasure together ({theirs[name]}; {value})"
                    )

    def gather(self, columns: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Everyone's rows of each column, by rank; a process without rows gives no columns. One
        column after the other, so that memory holds one of them twice."""
        import torch
        import torch.distributed as dist

        mine = {name: (column.dtype, tuple(column.shape)) for name, column in columns.items()}
        every = self.everyones(mine)
        found: dict[str, Tensor] = {}
        for name, (dtype, shape) in next(filter(None, every)).items():
            counts = [told[name][1][0] if told else 0 for told in every]
            column = columns.get(name, torch.empty((0, *shape[1:]), dtype=dtype, device=device))
            # as bytes: every backend takes them, whatever the dtype
            width = math.prod(shape[1:]) * dtype.itemsize
            padded = torch.zeros(max(counts), width, dtype=torch.uint8, device=device)
            own = column.contiguous().view(len(column), -1) if len(column) else None
            if own is not None:
                padded[: len(column)] = own.view(torch.uint8)
            parts = [torch.empty_like(padded) for _ in every]
            with self.talking():
                dist.all_gather(parts, padded)
            rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
            found[name] = rows.view(dtype).view(-1, *shape[1:])
        return found

    def average(self, gradients: Sequence[Tensor], share: float) -> None:
        """In place: the sum of everyone's gradients, float32, times their `share` of the batch.
        To be called right after all have agreed."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket]).mul_(share)
            with self.talking():
                dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))


def buckets(tensors: Sequence[Tensor], most: int = BUCKET) -> Iterator[list[Tensor]]:
    """All of them in their order, about `most` elements at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > most:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined() -> Iterator[Ranks]:
    """Every process of torch.distributed, where the caller has initialised it; otherwise this one
    alone."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield Ranks()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), group)
    try:
        with ranks.failures_told():
            yield ranks
    finally:
        dist.destroy_process_group(group)


def together(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions with an argument `ranks`: failures and signals end it on all of them."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, ranks: Ranks | None = None, **settings: Any) -> Any:
        ranks = ranks or Ranks()
        with ranks.signals_held(), ranks.failures_told():
            return function(*arguments, ranks=ranks, **settings)

    return wrapper
