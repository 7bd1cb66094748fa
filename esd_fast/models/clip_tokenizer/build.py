"""python -m esd_fast.models.clip_tokenizer.build VOCABULARY [FOLDER]

Writes CLIP's tokenizer as transformers reads it (vocab.json, merges.txt and settings), out of the
vocabulary that open-clip-torch carries: open_clip/bpe_simple_vocab_16e6.txt.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 49408
SETTINGS = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in the order of the first 256 tokens: bytes
    that print stand for themselves, the others for letters from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printing)
    return [chr(code) for code in [*printing, *range(256, 256 + others)]]


def merges_of(text: str) -> list[str]:
    """The merges that make tokens: the file holds more of them, after a line with its version."""
    made = TOKENS - 2 * 256 - 2
    return text.split("\n")[1 : made + 1]


def tokens_of(merges: list[str]) -> list[str]:
    """Every token, in the order of their ids."""
    letters = byte_letters()
    ends = [letter + "</w>" for letter in letters]
    return [*letters, *ends, *(merge.replace(" ", "") for merge in merges), START, END]


def build(vocabulary: Path, folder: Path) -> None:
    with gzip.open(vocabulary) as file:
        merges = merges_of(file.read().decode())
    tokens = {token: number for number, token in enumerate(tokens_of(merges))}
    if len(tokens) != TOKENS:
        raise ValueError(f"{vocabulary} makes {len(tokens)} tokens; CLIP has {TOKENS}")
    special = {k: v for k, v in SETTINGS.items() if k.endswith("_token")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(tokens, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(lines + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CLIP's tokenizer as transformers reads it")
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    given = parser.parse_args()
    build(given.vocabulary, given.folder)
