"""Lists of prompts to draw: text files, and the CSV files that erasure is evaluated with."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .prompts import clean_prompt

# columns that have a meaning here (the reference's names); all others are kept as they are
PROMPT, SEED, CASE = "prompt", "evaluation_seed", "case_number"


@dataclass(frozen=True)
class Case:
    """A prompt of a list."""

    prompt: str
    number: int | None = None
    """Its case number; None in a list without numbers."""
    seed: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """What else its row of the CSV says, such as `artist` or `class`."""


def read_prompts(path: str | Path) -> list[Case]:
    """A prompt a line, or (.csv) the reference's columns: `prompt`, and where they are there
    `case_number` (default: the row's, from 0) and `evaluation_seed`.

    Raises FileNotFoundError, or ValueError naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompt list {str(path)!r} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start})") from None
    if "\0" in text:  # UTF-16, as a rule
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path} is no UTF-8 text (line {line} holds NUL)")
    cases = list(from_csv(path, text) if path.suffix.lower() == ".csv" else from_lines(path, text))
    if not cases:
        raise ValueError(f"{path} holds no prompt")
    return cases


def from_lines(path: Path, text: str) -> Iterator[Case]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield Case(clean_prompt(f"{path}, line {number}: the prompt", line))


def from_csv(path: Path, text: str) -> Iterator[Case]:
    # with its line ends as they are: a quoted prompt may hold some
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header.count(PROMPT) != 1:
            raise ValueError(
                f"{path} must have one column {PROMPT!r}, separated by commas; its first line "
                f"has {', '.join(repr(name[:40]) for name in header[:8]) or 'nothing'}"
            )
        twice = next((name for name in (CASE, SEED) if header.count(name) > 1), None)
        if twice:
            raise ValueError(f"{path} has the column {twice} twice; leave one out")
        for index, row in enumerate(filter(any, reader)):
            where = f"{path}, line {reader.line_num}"
            if len(row) > len(header):
                raise ValueError(
                    f"{where} has {len(row)} cells, the first line {len(header)}; a prompt with "
                    "commas must stand in double quotes"
                )
            cells = dict(zip(header, row, strict=False))
            yield case_of(cells, index, where)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def case_of(cells: dict[str, str], index: int, where: str) -> Case:
    prompt = clean_prompt(f"{where}: {PROMPT}", cells.pop(PROMPT, ""))
    number, seed = (whole_number(cells.pop(name, ""), name, where) for name in (CASE, SEED))
    # a column without a name is the index that pandas writes
    further = {name: value for name, value in cells.items() if name and value}
    return Case(prompt, index if number is None else number, seed, further)


def whole_number(text: str, name: str, where: str) -> int | None:
    """ "3542", and "3542.0" as pandas writes a column with gaps."""
    text = text.strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,18})(?:\.0+)?", text, re.ASCII)
    if found is None:
        raise ValueError(f"{where}: {name} is {text[:40]!r}; it must be a whole number from 0")
    return int(found[1])
