"""A small byte-level BPE in CLIP's format: each word of the world is one token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 32  # tokens of a prompt, start and end included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Merge until every word is one token; any other text falls apart into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(words)], trainer)
    merges = [tuple(pair) for pair in model_of(bpe)["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]


def model_of(bpe: Tokenizer) -> dict:
    import json

    return json.loads(bpe.to_str())["model"]
