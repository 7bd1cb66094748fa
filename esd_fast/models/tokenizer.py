"""The tokenizers of a file that has none: CLIP's, which ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLIP_FILES = Path(__file__).parent / "clip_tokenizer"


def tokenizer_for(configs: str, name: str) -> Any:
    """The tokenizer `name` of the folder (or hub id) `configs`; with CLIP's vocabulary where the
    folder has its settings alone, as the packaged ones do."""
    from transformers import CLIPTokenizer

    folder = Path(configs) / name
    whole = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    if whole or not folder.is_dir():
        return CLIPTokenizer.from_pretrained(configs, subfolder=name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    return CLIPTokenizer.from_pretrained(CLIP_FILES, **settings)


def check_vocabulary(pipeline: Any) -> None:
    """ValueError where a tokenizer and its text encoder do not go together: transformers makes a
    tokenizer of a few special tokens of a folder that lost its vocabulary, and says nothing."""
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer, text_encoder = getattr(pipeline, name, None), getattr(pipeline, encoder, None)
        if tokenizer is None or text_encoder is None:
            continue
        tokens, rows = len(tokenizer), text_encoder.get_input_embeddings().num_embeddings
        if not 0.9 * rows <= tokens <= rows:
            raise ValueError(
                f"the {name} knows {tokens} tokens, the {encoder} {rows}: the tokenizer's files "
                "are not those of this model, or not whole"
            )
