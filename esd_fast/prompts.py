"""Prompts: cleaned, counted, named. Encoding them is the model family's business (models/)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from .terminal import quoted


def clean_prompt(argument: str, text: object) -> str:
    """The prompt without blanks around it. Raises ValueError where nothing is left."""
    if not isinstance(text, str):
        raise ValueError(f"{argument} is {quoted(text)}; it must be a text, such as 'cat'")  # noqa: TRY004
    cleaned = text.strip()
    if not any(character.isprintable() and not character.isspace() for character in cleaned):
        raise ValueError(f"{argument} is {quoted(text)}; it must name something, such as 'cat'")
    if re.search("[\ud800-\udfff]", cleaned):
        raise ValueError(
            f"{argument} is {quoted(text)}; it must be valid Unicode (no tokenizer reads it)"
        )
    return cleaned


def safe_name(text: str, limit: int = 60) -> str:
    """A file name of `text` for every file system: "AC/DC" becomes "AC-DC-" and a hash.

    Texts that lose more than spaces, or are cut to `limit` bytes, get a short hash, so that two
    of them never meet.
    """
    plain = unicodedata.normalize("NFKC", text)
    name = re.sub(r"[^\w.+-]+", "-", plain).strip("-. ")
    # bytes, not characters: file systems allow 255 of them
    name = name.encode(errors="replace")[:limit].decode(errors="ignore").rstrip("-. ")
    spaces_only = re.sub(r" ", "-", text)
    reserved = name.split(".")[0].upper() in RESERVED
    if name and name == spaces_only and not reserved:
        return name
    if reserved:
        name = name.replace(".", "-")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name}-{digest}" if name else digest


# names that Windows keeps for devices, whatever follows a dot
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{n}{i}" for n in ("COM", "LPT") for i in range(1, 10))}


def file_part(texts: Sequence[str]) -> str:
    """Several texts in one file name, before `safe_name` makes it one: "cat+dog"."""
    return "+".join(texts)


def lost_by_truncation(tokenizer: Any, prompt: str) -> str:
    """The end of `prompt` that the tokenizer's limit cuts off, or ''."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    # the last kept place holds the end token
    return "" if len(tokens) <= limit else tokenizer.decode(tokens[limit - 1 : -1])
