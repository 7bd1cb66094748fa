"""Which browser asks: a cookie that no script can read, and that no page shows."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

COOKIE = "esd_fast_browser"


def new_cookie() -> str:
    return secrets.token_urlsafe(24)


def owner_in(cookies: Mapping[str, str]) -> str:
    """A name of the browser that may be written down: its cookie does not follow from it. Raises
    ValueError where there is none."""
    cookie = cookies.get(COOKIE, "")
    if not 20 <= len(cookie) <= 100:
        raise ValueError("this page needs a cookie to know your jobs by; allow it and load it anew")
    return hashlib.sha256(cookie.encode()).hexdigest()[:24]
