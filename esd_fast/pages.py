"""Memory that stays with the process.

glibc maps every block of more than 32 MiB anew and unmaps it when it is freed. Each page of it is then
a fault and a page of zeros, at every step of a training loop; on a virtual machine that can cost more
than the arithmetic. Huge pages (torch's THP_MEM_ALLOC_ENABLE) spared half of it in a fit step and
nothing in a guided step, and another allocator has to be there before the process starts.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_pages() -> bool:
    """Make glibc keep what is freed for what is allocated next, large blocks too.

    A setting of the whole process, for its whole life and all its threads: `malloc` takes no block
    from `mmap` any more, and the heap's end is not given back by itself. So the process stays as
    large as it ever was, which suits one that trains and ends, and may not suit a server;
    `give_back_pages` returns what is free at that moment. The command line calls this by itself,
    `esd_fast.erase` never does. Call it before models are loaded: blocks that are there already
    stay mapped. Returns whether it did anything: on Linux with glibc (or a C library that has
    `mallopt`).
    """
    mallopt = c_function("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_pages() -> bool:
    """Return free memory to the system, gaps between blocks in use included (glibc's malloc_trim);
    whether there was any. Takes milliseconds a gigabyte; memory that is used again faults anew."""
    trim = c_function("malloc_trim")
    return trim is not None and bool(trim(0))


def c_function(name: str) -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
