"""Memory that stays with the process.

glibc maps every block of more than 32 MiB anew and unmaps it when it is freed. Each page of it is then
a fault and a page of zeros, at every step of a training loop; on a virtual machine that can cost more
than the arithmetic. Huge pages (torch's THP_MEM_ALLOC_ENABLE) spared half of it in a fit step and
nothing in a guided step, and another allocator has to be there before the process starts.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_PAGEOUT = 21  # mman.h


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


def file_ranges() -> list[tuple[int, int]]:
    """Addresses [start, end) that are mapped from files, as weights of a large safetensors file are
    where no conversion was asked. Empty where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # address permissions offset device inode [path]
    files = [fields[0] for fields in map(str.split, lines) if fields[4] != "0"]
    return [(int(first, 16), int(last, 16)) for first, last in (f.split("-") for f in files)]


def page_out_files(tensors: Iterable[Any]) -> int:
    """Those of `tensors` (torch.Tensor, on the CPU) that lie in mapped files leave memory until
    somebody reads them; the bytes of these. In other memory, and elsewhere, nothing happens."""
    files = file_ranges()
    gone = 0
    for tensor in tensors:
        address, size = tensor.data_ptr(), tensor.nbytes
        if size and any(first <= address < last for first, last in files):
            page_out(address, size)
            gone += size
    return gone


def page_out(address: int, size: int) -> None:
    """Whole pages within leave memory; who reads them finds what was there (madvise's MADV_PAGEOUT,
    Linux 5.4; else nothing happens). For mapped files: other memory would go to swap."""
    advise = c_function("madvise")
    if advise is None:
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT)


def c_function(name: str) -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
