"""One piece of work on the device at a time, first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock whose holder may let those who wait go first: a picture need not wait until a whole
    erasure is done, and a CUDA graph is never captured while another thread draws."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.line: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits; within, it is ours."""
        self.join()
        try:
            yield
        finally:
            self.leave()

    def give_way(self) -> None:
        """For the holder, between two steps: goes on once all who wait now have had their turn."""
        if len(self.line) > 1:
            self.leave()
            self.join()

    def join(self) -> None:
        me = object()
        with self.changed:
            self.line.append(me)
            self.changed.wait_for(lambda: self.line[0] is me)

    def leave(self) -> None:
        with self.changed:
            self.line.popleft()
            self.changed.notify_all()
