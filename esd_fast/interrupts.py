"""Ctrl-C and SIGTERM: which of them stop a run, and when."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[None]:
    """Within: Ctrl-C and SIGTERM, where Python handles them, wait for the end. For what must not
    be left half done, and takes no time.

    Only the main thread is ever interrupted; in others nothing is done.
    """
    came: list[tuple[Any, int, Any]] = []

    def holding(before: Any) -> Any:
        return lambda signal_number, frame: came.append((before, signal_number, frame))

    try:
        with ExitStack() as stack:  # puts back one after the other, whatever comes between
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    before = signal.getsignal(number)
                    if callable(before):
                        stack.callback(signal.signal, number, before)
                        signal.signal(number, holding(before))
            yield
    finally:  # after an error too
        for handler, signal_number, frame in came[:1]:
            handler(signal_number, frame)


@contextmanager
def sigterm_interrupts(wanted: bool = True) -> Iterator[None]:
    """Within: SIGTERM raises KeyboardInterrupt, as Ctrl-C does, where it would end the process."""
    main = threading.current_thread() is threading.main_thread()
    if not wanted or not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
