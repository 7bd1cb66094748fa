"""`esd-fast app`: the web app."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from esd_fast.app.limits import Limits, is_loopback
from esd_fast.config import bytes_of, refuse

VARIABLE = "ESD_FAST_PASSWORD"
SHORTEST = 8  # characters of a password


def app(arguments: argparse.Namespace) -> int:
    """Exit code 0 after Ctrl-C or SIGTERM."""
    password = password_of(arguments, os.environ)
    check_reach(arguments.host, password)
    if not 0 <= arguments.port < 2**16:
        refuse("--port", arguments.port, "from 0 (any free one) to 65535")
    limits = Limits(upload_bytes=size_of(arguments.max_upload))
    if importlib.util.find_spec("gradio") is None:
        raise RuntimeError("the web app needs Gradio: pip install 'esd-fast[app]'")
    from esd_fast.app.place import Place
    from esd_fast.pages import keep_pages

    keep_pages()
    from .console import quiet_libraries

    quiet_libraries()
    place = Place.at(
        Path(arguments.work),
        arguments.model or (),
        limits,
        arguments.device,
        arguments.shared_library,
    )
    from esd_fast.app.server import serve

    serve(place, arguments.host, arguments.port, password)
    return 0


def password_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """Raises ValueError for one that is too short, or several; FileNotFoundError."""
    said = {
        "--password": arguments.password,
        "--password-file": None
        if arguments.password_file is None
        else Path(arguments.password_file).read_text().strip("\r\n"),
        VARIABLE: environment.get(VARIABLE),
    }
    given = {name: value for name, value in said.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; give one")
    for name, value in given.items():
        if len(value) < SHORTEST:
            raise ValueError(f"{name} has {len(value)} characters; give {SHORTEST} at least")
        return value
    return None


def check_reach(host: str, password: str | None) -> None:
    """Raises ValueError where anybody could come in."""
    if password is None and not is_loopback(host):
        raise ValueError(
            f"--host is {host!r}, which others reach: set a password (--password-file FILE, or "
            f"the variable {VARIABLE}), or leave --host out"
        )


def size_of(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError:
        raise ValueError(f"--max-upload is {text!r}; it must be a size such as 512MB") from None
