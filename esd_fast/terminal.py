"""Text for a terminal. Prompts, paths and what files say may hold anything, escape sequences too."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# what joins emoji and the letters of some scripts: not printable by itself, and harmless
JOINERS = "\u200c\u200d"
LONGEST = 1000  # characters of an error


def tell(text: object, file: TextIO | None = None) -> None:
    """`print`, with whatever would not show, or would move the cursor, escaped."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    plain = visible(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(plain, file=stream)


def visible(text: str) -> str:
    """`text` with its controls, direction marks and lone surrogates as Python escapes them; line
    feeds and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" + JOINERS else escaped(c) for c in text)


def escaped(character: str) -> str:
    return repr(character)[1:-1]


def one_line(text: str) -> str:
    """`text` on one line; of a long one the beginning and the end."""
    line = visible(re.sub(r"\s+", " ", text).strip())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 3 :]}"


def quoted(value: object) -> str:
    """`repr`, cut where it is long, for the value that an error names."""
    try:
        said = re.sub(r"\s*\n\s*", " ", repr(value))
    except ValueError:  # whole numbers of more than 4300 digits
        return f"a {type(value).__name__} that is too long to show"
    return said if len(said) <= 300 else f"{said[:200]} ... {said[-40:]}"
