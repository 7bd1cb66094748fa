"""A small byte-level BPE in CLIP's format: each word of the world is one token."""

from __future__ import annotations

import itertools
from collections import Counter

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_LENGTH = 32  # tokens of a prompt, start and end included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"


def new_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Merge until every word is one token; any other text falls apart into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of(words)
    tokens = [*alphabet, *(a + END for a in alphabet), *("".join(m) for m in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges: the commonest pair first, of equals the first by alphabet.

    Not by tokenizers' trainer, which breaks such ties another way in every process: a training
    that goes on would find its words under other numbers.
    """
    split = [(*word[:-1], word[-1] + END) for word in words]
    merges = []
    while pairs := Counter(p for symbols in split for p in itertools.pairwise(symbols)):
        chosen = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(chosen)
        split = [merged(symbols, chosen) for symbols in split]
    return merges


def merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`symbols` with every occurrence of `pair`, from the left, made one."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)
