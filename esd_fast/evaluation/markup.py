"""HTML: whatever is not Html gets escaped, so that forgetting is impossible; numbers in words."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`; a child that is not Html is escaped, None is nothing.

    Attribute names lose a trailing underscore (`class_`) and trade others for dashes.
    """
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    opening = "".join(f' {k}="{html.escape(clean(v))}"' for k, v in pairs.items() if v is not None)
    if name in ("img", "meta"):
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Children one after the other, escaped where they are not Html."""
    return Html(
        "".join(
            c if isinstance(c, Html) else html.escape(clean(c)) for c in children if c is not None
        )
    )


def clean(value: object) -> str:
    """Control characters have no place in HTML; tab and line feed do."""
    return "".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in str(value))


def user_text(value: object) -> Html:
    """Text that people wrote: its writing direction must not reorder what surrounds it."""
    return element("bdi", value)


# --- numbers in words --------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number, or None for whatever else a report may hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def data(value: object, shown: str) -> Html:
    """`shown` for people, the exact value in the markup."""
    return element("data", shown, value=value)


def percent(rate: float) -> str:
    """A rate with one decimal where it says something; never 0% or 100% for what only rounds."""
    if 0 < rate < 0.0005:
        return "<0.1%"
    if 0.9995 <= rate < 1:
        return ">99.9%"
    return f"{100 * rate:.1f}".removesuffix(".0") + "%"


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def short(value: float) -> str:
    """Four digits; whole numbers in full."""
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def shown_value(value: Any) -> Html:
    """Any value of a settings table."""
    if value is None:
        return element("span", "none", class_="muted")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    if isinstance(value, int | float):
        return Html(html.escape(str(value)))
    if isinstance(value, Mapping):
        parts = [join((user_text(k), ": ", shown_value(v))) for k, v in value.items()]
        return Html("<br>".join(parts)) if parts else shown_value(None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Html(", ".join(shown_value(item) for item in value)) if value else shown_value(None)
    return user_text(value)
