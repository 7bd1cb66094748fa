"""A word of the prompt whose token embedding is replaced: how a learned token is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from esd_fast.vocabulary import WORD_END

TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Placeholder:
    """A word that stands for the learned token.

    It is one that every tokenizer knows already, not a new one: nothing has to grow, and CLIP
    configurations that take the highest token of a prompt for its end (`eos_token_id` 2, as
    SDXL's) would take a new token for it.
    """

    word: str
    ids: Mapping[str, int]
    """By text encoder, such as "text_encoder_2"."""

    @classmethod
    def beside(cls, pipeline: Any, prompts: Sequence[str]) -> Placeholder:
        """One that is in none of `prompts`. Raises ValueError where the tokenizers have none."""
        asked = tokenizers(pipeline)
        text = " ".join(prompts).lower()
        for token in sorted(asked["text_encoder"].get_vocab(), reverse=True):
            word = token.removesuffix(WORD_END)
            if word == token or not (word.isascii() and word.isalpha() and len(word) > 2):
                continue
            ids = {n: t(word, add_special_tokens=False).input_ids for n, t in asked.items()}
            if word not in text and all(len(i) == 1 for i in ids.values()):
                return cls(word, {name: i[0] for name, i in ids.items()})
        raise ValueError(
            "concept inversion needs a tokenizer with whole words, as CLIP's; "
            f"{type(pipeline.tokenizer).__name__} has none that these prompts do not use"
        )

    @contextmanager
    def meaning(self, pipeline: Any, vectors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within: the text encoders read `vectors` (D,), by text encoder, where the word stands.
        Gradients reach them. After: everything as before; no weight is touched."""
        with ExitStack() as stack:
            for name, vector in vectors.items():
                embedding = getattr(pipeline, name).get_input_embeddings()
                put_in = partial(replaced, token=self.ids[name], vector=vector)
                stack.enter_context(embedding.register_forward_hook(put_in))
            yield


def replaced(
    module: torch.nn.Module,  # noqa: ARG001
    arguments: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    token: int,
    vector: torch.Tensor,
) -> torch.Tensor:
    """A forward hook of an embedding: `output` (B, L, D) with `vector` where `token` stands."""
    return torch.where((arguments[0] == token)[..., None], vector.to(output), output)


def tokenizers(pipeline: Any) -> dict[str, Any]:
    """By the name of the text encoder that reads them, of those that are there."""
    return {
        name: getattr(pipeline, tokenizer)
        for name, tokenizer in TOKENIZER_OF.items()
        if getattr(pipeline, name, None) is not None
    }
