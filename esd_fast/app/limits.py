"""What a browser may ask for, and what it gets to see."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Of a server. Beyond them nothing is done, and the limit is said."""

    upload_bytes: int = 512 * MEBIBYTE
    """Of one file."""
    uploads: int = 50
    """Erasures that a browser may bring along."""
    jobs_each: int = 3
    """Of one browser that are not done."""
    jobs: int = 20
    concept: int = 1000
    """Characters; of a prompt too."""
    concepts: int = 20
    iterations: int = 10_000
    num_inference_steps: int = 150
    guidance_scale: float = 30.0
    strength: float = 10.0
    images: int = 4
    """Of a prompt, drawn at once."""
    stacked: int = 8
    """Erasures on one model."""

    def check_text(self, name: str, text: str) -> None:
        """Raises ValueError."""
        if len(text) > self.concept:
            raise ValueError(f"{name} has {len(text)} characters; at most {self.concept} are taken")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def hide_paths(text: str, known: dict[str, str] | None = None) -> str:
    """`text` without places of this machine: `known` ones become their name, of others the last
    part stays."""
    for path, name in sorted((known or {}).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(path, name)
    home = str(Path.home())
    if home not in ("", "/"):
        text = text.replace(home + os.sep, "/home/")  # it may have blanks in it
    # one slash that nothing but a blank, a quote or a bracket precedes, and a second one at least
    return re.sub(r"(?<![\w:/.<])/(?:[^/\s'\"<>]+/)+([^/\s'\"<>]*)", r"\1", text)
