"""Keep what other words mean: updates of keys and values, held back by the whole vocabulary.

Keys and values of cross-attention are matrices W applied to the text encoder's hidden states e, so
a step dW for one prompt moves the answer to every other prompt by dW e. What the tokenizer's words
look like is known without any data: C = mean of e e^T over them. A gradient step under the
penalty strength / (2 c) * mean |dW e|^2, with c the mean eigenvalue of C,

    argmin_dW  <G, dW> + 1/(2 lr) (|dW|^2 + strength / c * mean |dW e|^2)  =  -lr G F,
    F = (I + strength / c * C)^-1,

is the plain step times one fixed matrix. Closed-form editors hold to their keys in the same way
(MEMIT, Meng et al., ICLR 2023; UCE, Gandikota et al., WACV 2024). It costs no UNet pass.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from .parameters import plain_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .models import Model

WORDS_AT_MOST = (
    512  # of Stable Diffusion's 49,408 tokens, for time's sake; no other number was tried
)
ITERATIONS_AT_MOST = 60  # for a condition number of 2**30; half as many do as a rule
WORD_END = "</w>"  # CLIP's tokenizers mark the tokens that end a word


def words_of(tokenizer: Any, at_most: int = WORDS_AT_MOST) -> list[str]:
    """Words of three letters or more that are one token each; a fixed draw where there are many.

    Raises ValueError where the tokenizer does not mark the ends of words.
    """
    whole = sorted(
        word
        for token in tokenizer.get_vocab()
        if token.endswith(WORD_END)
        and (word := token.removesuffix(WORD_END)).isascii()
        and word.isalpha()
        and len(word) > 2
    )
    if not whole:
        raise ValueError(
            "keep_vocabulary needs a tokenizer that marks the ends of words as CLIP's does "
            f"('cat{WORD_END}'); {type(tokenizer).__name__} has no such token. 0 turns it off"
        )
    return whole if len(whole) <= at_most else sorted(random.Random(0).sample(whole, at_most))


def without(words: Sequence[str], erased: Sequence[str]) -> list[str]:
    """`words` without those that `erased` concepts are named by. The word of a single one weighs
    next to nothing and stays, as it was in all that was measured."""
    named = {word for text in erased for word in text.lower().split()}
    return [word for word in words if len(erased) < 2 or word not in named]


@torch.no_grad()
def second_moment(model: Model, words: Sequence[str], resolution: int) -> torch.Tensor:
    """C (D, D) float32 on the CPU: mean of e e^T over all places of the empty prompt and of each
    word as a prompt, padding included, since attention reads it too."""
    prompts = ["", *words]
    # on the CPU the shapes of a batch of its own would stay in oneDNN's caches, a megabyte for a
    # small encoder; elsewhere each call of `encode` may
    # bring the text encoder to the device and back
    at_once = 1 if model.device.type == "cpu" else 64
    total, count = torch.zeros(()), 0
    for first in range(0, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        encoded = model.family.encode(model.pipeline, batch, resolution)
        states = encoded.encoder_hidden_states.flatten(0, 1).float().cpu()  # (B * L, D)
        total = total + states.T @ states
        count += len(states)
    return total / count


def keeping_filter(second_moment: torch.Tensor, strength: float) -> torch.Tensor:
    """F (D, D), symmetric, eigenvalues in (0, 1]; the module says what it is.

    The inverse by Newton's iteration (Schulz 1933), X <- X (2 - A X): products alone, which run on
    any device. The first call of a LAPACK costs 2 MiB that stay, the last ones of a small run's peak.
    """
    size = len(second_moment)
    identity = torch.eye(size, dtype=second_moment.dtype, device=second_moment.device)
    matrix = identity + strength * size / second_moment.trace() * second_moment
    inverse = identity / matrix.abs().sum(0).max()  # every eigenvalue of A X is in (0, 1]
    for _ in range(ITERATIONS_AT_MOST):
        product = matrix @ inverse
        inverse = inverse @ (2 * identity - product)
        # each step squares the error
        if (identity - product).abs().max() < torch.finfo(product.dtype).eps ** 0.5:
            break
    return (inverse + inverse.T) / 2


def reads_text(unet: torch.nn.Module, name: str) -> bool:
    """Whether parameter `name` is a key or value matrix of cross-attention."""
    if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        return False
    width = plain_parameters(unet)[name].shape[-1]
    return bool(width == unet.config.cross_attention_dim)  # type: ignore[union-attr]


def filters_for(
    model: Model,
    names: Sequence[str],
    strength: float,
    resolution: int,
    words: Sequence[str] | None = None,
    erased: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], int]:
    """By parameter name the filter (float32, on the UNet's device), and the number of words.

    Empty where `strength` is 0 or nothing that reads the text is among `names`. `words` replaces
    the tokenizer's own, which are held to but for those of several `erased` concepts.
    """
    reading = [n for n in names if reads_text(model.unet, n)]
    if not strength or not reading:
        return {}, 0
    if words is None:
        words = without(words_of(model.pipeline.tokenizer), erased)
    moment = second_moment(model, words, resolution)
    exact = torch.float32 if model.device.type == "mps" else torch.float64
    shared = keeping_filter(moment.to(model.device, exact), strength).float()
    return dict.fromkeys(reading, shared), len(words)
