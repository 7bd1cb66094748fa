"""What pages of reports are made of: one file each, without a script and with nothing to fetch."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from . import write_atomically
from .markup import Html, element, shown_value, user_text


def page(title: str, sections: Iterable[Html | None]) -> str:
    """A whole HTML file."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    head = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # the page needs nothing from anywhere: say so, and the browser holds it to that
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *sections))
    return f"<!doctype html>\n{element('html', element('head', *head), body, lang='en')}\n"


def write_pair(folder: Path, name: str, told: Mapping[str, Any], html: str) -> Path:
    """NAME.json and NAME.html; returns the path of the latter. `told` holds plain data."""
    text = json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a lone surrogate has no UTF-8 form; backslashreplace makes it a JSON escape, which is one
    write_atomically(folder / f"{name}.json", text.encode("utf-8", "backslashreplace"))
    return write_atomically(folder / f"{name}.html", html.encode("utf-8", "replace"))


def plain_data(value: Any) -> Any:
    """`value` as JSON knows it: non-finite numbers are null, what is unknown becomes its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain_data(item) for item in sorted(value, key=str)]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, torch's tensors
        return plain_data(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, bytes | Path):
        return [plain_data(item) for item in value]
    return str(value)


def mapping(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


def section(title: str, *children: object, note: object = None) -> Html:
    caption = element("p", note, class_="note") if note else None
    return element("section", element("h2", title), caption, *children)


def card(label: str, big: Html, *details: object, class_: str = "card") -> Html:
    return element(
        "div",
        element("p", label, class_="label"),
        element("p", big, class_="big"),
        *details,
        class_=class_,
    )


def note_line(text: str) -> Html:
    return element("p", text, class_="note")


def table(head: Sequence[str], rows: Sequence[Html], class_: str | None = None) -> Html:
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    table = element("table", element("thead", titles), element("tbody", *rows), class_=class_)
    return element("div", table, class_="scroll")


def folded(
    head: Sequence[str], rows: Sequence[Html], at_most: int, class_: str | None = None
) -> tuple[Html, Html | None]:
    """A table, and the rest of a long one to unfold."""
    first, rest = rows[:at_most], rows[at_most:]
    more = table(head, rest, class_)
    hidden = element("details", element("summary", f"{len(rest)} more"), more) if rest else None
    return table(head, first, class_), hidden


def key_table(title: str, values: Mapping[str, Any]) -> Html | None:
    if not values:
        return None
    rows = [
        element("div", element("dt", user_text(key)), element("dd", shown_value(value)))
        for key, value in values.items()
    ]
    return section(title, element("dl", *rows))


def picture(folder: Path, name: str) -> bytes | None:
    """The PNG, or None where there is none or it is something else."""
    try:
        content = (folder / name).read_bytes()
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 24 else None


def image(content: bytes, alt: str) -> Html:
    width, height = struct.unpack(">II", content[16:24])  # IHDR is always first
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return element("img", src=source, alt=alt, width=width, height=height)
