"""What an erasure did: measured, drawn and written down."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write `data` beside `path`, then rename: readers see the old file or the new one, whole."""
    path = Path(path)
    # not tempfile: its files are private to the user, and a report is there to be served
    temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
