"""What a fleet is to do: a CSV or JSON Lines file, all of it checked before anything is loaded."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd_fast.config import EraseConfig, Loading, refuse
from esd_fast.erasure import erased_from, file_name_of
from esd_fast.files import parsed_json
from esd_fast.parameters import canonical_method
from esd_fast.prompts import clean_prompt, safe_name

SUFFIXES = (".csv", ".jsonl")
LARGEST = 2**26  # bytes of a file; a job takes some dozens
BETWEEN = "|"  # several values in one cell of a CSV: prompts hold commas

NAME = "name"
OTHER_NAMES = {
    "method": "train_method",
    "lr": "learning_rate",
    "batchsize": "batch_size",
    "erase_concept": "concept",
}
# a worker loads one model, once; and Ray says where it works
FOR_ALL = {field.name: f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Loading)}
FOR_ALL |= {
    "model": "--model",
    "model_config": "--config",
    "dtype": "--dtype",
    "device": "--device",
}
KINDS = {field.name: str(field.type) for field in dataclasses.fields(EraseConfig)}
COLUMNS = [name for name in KINDS if name not in {*FOR_ALL, "given"}] + [NAME]
LISTS = ("concept", "erase_from", "concept_weights", "preserve")


@dataclass(frozen=True)
class Job:
    """One erasure of a fleet; `line` of its file says it."""

    line: int
    file_name: str
    config: EraseConfig


class BadJobs(ValueError):
    """`problems`: a line for each job that cannot be run."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        those = "1 line cannot be run as it stands"
        if len(problems) > 1:
            those = f"{len(problems)} lines cannot be run as they stand"
        super().__init__(f"{path}: {those}; nothing was started")
        self.problems = problems


@dataclass(frozen=True)
class Row:
    """A line of the file: values by the names of `COLUMNS`, those that it leaves out not there.
    `problem`: why it cannot be read."""

    line: int
    values: Mapping[str, Any]
    problem: str = ""


def read_jobs(path: Path, model: str | None, defaults: Mapping[str, Any]) -> list[Job]:
    """`defaults`: settings of all jobs whose line says nothing else; None is none. `model` as
    `erase` takes it: the embedded one has a recipe of its own.

    Raises FileNotFoundError; ValueError where `path` is no such file, and as BadJobs, all of whose
    problems begin with file and line, where jobs in it are wrong.
    """
    rows = list(rows_of(path))
    jobs, problems = [], []
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            jobs.append(job_of(row, model, defaults))
        except ValueError as error:
            problems.append((row.line, str(error)))
    problems += doubles(jobs)
    if len(problems) == len(rows) and len({text for _, text in problems}) == 1:
        where = f"line {rows[0].line}" if len(rows) == 1 else "every line"  # a setting of all, then
        raise ValueError(f"{path}, {where}: {problems[0][1]}; nothing was started")
    if problems:
        raise BadJobs(path, [f"{path}, line {line}: {text}" for line, text in sorted(problems)])
    if not jobs:
        raise ValueError(f"{path} holds no job")
    return jobs


def job_of(row: Row, model: str | None, defaults: Mapping[str, Any]) -> Job:
    said = {**{k: v for k, v in defaults.items() if v is not None}, **row.values}
    name, concept = said.pop(NAME, None), said.pop("concept", None)
    if concept is None:
        raise ValueError("concept is missing; it must name what to erase, such as 'cat'")
    config = EraseConfig.from_preset(said.pop("preset", "fast"), concept, model, **said)
    if name is not None:
        plain = safe_name(clean_prompt(NAME, name).removesuffix(".safetensors"))
        return Job(row.line, f"{plain}.safetensors", config)
    method = canonical_method(config.train_method)
    file_name = file_name_of(config.concepts, erased_from(config.sources), method)
    return Job(row.line, file_name, config)


def doubles(jobs: Iterable[Job]) -> Iterator[tuple[int, str]]:
    first: dict[str, int] = {}
    for job in jobs:
        line = first.setdefault(job.file_name, job.line)
        if line != job.line:
            told = f"its file would be {job.file_name}, as that of line {line}"
            yield job.line, f"{told}; a column {NAME!r} can tell them apart"


def rows_of(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"job list {str(path)!r} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must be a file {' or '.join(SUFFIXES)}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a job list has {LARGEST:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start})") from None
    return from_csv(path, text) if path.suffix.lower() == ".csv" else from_lines(text)


def from_csv(path: Path, text: str) -> Iterator[Row]:
    # with its line ends as they are: a quoted prompt may hold some
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = columns_in(next(reader, []), path)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield row_of(line, columns, cells)
    except csv.Error as error:
        yield Row(line, {}, str(error))  # what follows cannot be told apart


def columns_in(header: list[str], path: Path) -> list[str | None]:
    """None for one without a name, the index that pandas writes."""
    columns = [column_of(cell) if cell.strip() else None for cell in header]
    unknown = [cell for cell, column in zip(header, columns, strict=True) if column == ""]
    for cell in unknown:
        raise ValueError(f"{path}, line 1: {not_a_column(cell)}")
    named = [column for column in columns if column is not None]
    for column in named:
        if named.count(column) > 1:
            raise ValueError(f"{path}, line 1: column {column!r} is there twice; keep one")
    if "concept" not in named:
        told = ", ".join(repr(cell[:40]) for cell in header[:8]) or "nothing"
        raise ValueError(
            f"{path}, line 1: it has {told}; it must have a column 'concept', separated by commas"
        )
    return columns


def column_of(text: str) -> str:
    """By its name here; "" for none."""
    plain = text.strip().lower().replace("-", "_")
    name = OTHER_NAMES.get(plain, plain)
    return name if name in COLUMNS else ""


def not_a_column(text: str) -> str:
    plain = text.strip().lower().replace("-", "_")
    if plain in FOR_ALL:
        return f"column {plain!r} is one thing for the whole fleet; take it out and say {FOR_ALL[plain]}"
    return f"column {text.strip()[:40]!r} is unknown; there are {', '.join(COLUMNS)}"


def row_of(line: int, columns: list[str | None], cells: list[str]) -> Row:
    if len(cells) > len(columns):
        return Row(
            line,
            {},
            f"it has {len(cells)} cells, line 1 has {len(columns)}; a prompt with commas must "
            "stand in double quotes",
        )
    said = zip(columns, cells, strict=False)  # cells at the end may be left out
    try:
        values = {c: value_of(c, cell) for c, cell in said if c is not None and cell.strip()}
    except ValueError as error:
        return Row(line, {}, str(error))
    return Row(line, values)


def value_of(column: str, cell: str) -> Any:
    """What a cell's text stands for."""
    if column in LISTS and BETWEEN in cell:
        parts = [part.strip() for part in cell.split(BETWEEN)]
        if column == "erase_from":
            return [part or None for part in parts]
        return [number(column, p) for p in parts] if column == "concept_weights" else parts
    if column == "concept_weights":
        return [number(column, cell)]
    if KINDS.get(column, "").startswith("int"):
        return whole_number(column, cell)
    return number(column, cell) if KINDS.get(column, "").startswith("float") else cell.strip()


def whole_number(column: str, cell: str) -> int:
    """ "200", and "200.0" as pandas writes a column with gaps."""
    found = re.fullmatch(r"(-?\d{1,19})(?:\.0+)?", cell.strip(), re.ASCII)
    if found is None:
        refuse(column, cell.strip(), "a whole number")
    return int(found[1])


def number(column: str, cell: str) -> float:
    plain = cell.strip()
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", plain, re.ASCII):
        refuse(column, plain, "a number, such as 2 or 5e-5")
    return float(plain)


def from_lines(text: str) -> Iterator[Row]:
    for line, content in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if content.strip():
            try:
                yield Row(line, values_in(content))
            except ValueError as error:
                yield Row(line, {}, str(error))


def values_in(content: str) -> dict[str, Any]:
    told = parsed_json(content, "its JSON", once_each(str))
    if not isinstance(told, dict):
        raise ValueError('it must be an object, such as {"concept": "cat"}')  # noqa: TRY004
    for key in told:
        if not column_of(key):
            raise ValueError(not_a_column(key))
    named = once_each(column_of)(list(told.items()))
    return {name: value for name, value in named.items() if value is not None}


def once_each(name: Callable[[str], str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if name(key) in made:
                raise ValueError(f"{name(key)[:40]!r} is there twice; keep one")
            made[name(key)] = value
        return made

    return table
