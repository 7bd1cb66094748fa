"""Prompts as given, file names that every file system takes, and what a tokenizer cuts off."""

from pathlib import Path

import pytest

from esd_fast.erasure import Erasure
from esd_fast.prompts import RESERVED, lost_by_truncation, safe_name

from . import pipelines

AWKWARD = [
    "AC/DC",
    "AC\\DC",
    'the "cat"',
    "it's",
    "two\nlines",
    "tab\tbed",
    "nul\0byte",
    "x" * 300,
    "many words " * 60,
    "",
    "   ",
    ".",
    "..",
    "../../etc/passwd",
    "CON",
    "con",
    "aux.txt",
    "LPT1",
    "cat.",
    "<script>",
    "a:b*c?d|e",
    "%s %n",
    "-rf",
    "~",
    "$HOME",
    "猫" * 300,
    "\U0001f431",
    "e\u0301",
    "\u202egnp.exe",
    "\ud800",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_safe_everywhere(text: str, tmp_path: Path) -> None:
    name = safe_name(text)
    assert name
    assert not set(name) & set('<>:"/\\|?*\0\n\t %$~')
    assert all(character.isprintable() for character in name)
    assert name.split(".")[0].upper() not in RESERVED
    assert name.strip(".- ") == name
    assert len(name.encode()) <= 70
    (tmp_path / name).write_text("")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", AWKWARD)
def test_whole_file_name_fits(text: str) -> None:
    """Concept, erase_from and a regular expression as the method, all long: under 255 bytes."""
    erasure = Erasure({}, {"concept": text, "erase_from": text, "method": text})
    assert len(f"{erasure.file_name}.part".encode()) <= 255
    assert "/" not in erasure.file_name


def test_different_texts_get_different_names() -> None:
    names = [safe_name(text) for text in AWKWARD]
    assert len(set(names)) == len(names)
    assert safe_name("AC/DC") != safe_name("AC-DC") != safe_name("AC DC!")
    assert safe_name("x" * 300) != safe_name("x" * 301)


def test_plain_names_stay_readable() -> None:
    assert safe_name("Van Gogh") == "Van-Gogh"
    assert safe_name("cat") == "cat"
    assert safe_name("esd-x") == "esd-x"
    assert safe_name("猫") == "猫"
    assert safe_name("AC/DC").startswith("AC-DC-")


def test_safe_name_is_stable() -> None:
    assert safe_name("AC/DC") == safe_name("AC/DC")
    assert safe_name("") == "e3b0c442"  # of sha256, not of this process' hash()


def test_lost_by_truncation() -> None:
    tokenizer = pipelines.pipeline().tokenizer
    room = tokenizer.model_max_length - 2  # start and end token
    word = "cat"
    each = len(tokenizer(word).input_ids) - 2
    fits = " ".join([word] * (room // each))
    assert lost_by_truncation(tokenizer, "") == ""
    assert lost_by_truncation(tokenizer, fits) == ""
    lost = lost_by_truncation(tokenizer, f"{fits} {word} {word}")
    kept = tokenizer(f"{fits} {word} {word}", truncation=True).input_ids[1:-1]
    whole = tokenizer(f"{fits} {word} {word}").input_ids[1:-1]
    assert lost.split() == tokenizer.decode(whole[len(kept) :]).split()
    assert lost
