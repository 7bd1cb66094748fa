"""The filter that holds updates of keys and values to what other words mean."""

from typing import Any

import pytest
import torch

from esd_fast import EraseConfig
from esd_fast.models import load_model
from esd_fast.vocabulary import (
    WORDS_AT_MOST,
    filters_for,
    keeping_filter,
    second_moment,
    words_of,
)

from . import pipelines
from .pipelines import SHORT, relative, same_bits, watched_run
from .truth.reference_loops import encode

one_thread = pipelines.one_thread
KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


def config(**settings: Any) -> EraseConfig:
    return EraseConfig(concept="red apple", **SHORT | {"keep_vocabulary": 1.0} | settings)


class Tokenizer:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens)}


def test_filtered_step_is_the_penalised_one() -> None:
    """The gradient of <G, dW> + |dW|^2 / 2 lr + strength / (2 lr c) mean |dW e|^2 is zero there."""
    states = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    moment = sum(torch.outer(e, e) for e in states) / len(states)
    gradient, lr, strength = torch.randn(4, 6, dtype=torch.float64), 0.3, 2.5
    found = (-lr * gradient @ keeping_filter(moment, strength)).requires_grad_()
    mean_eigenvalue = torch.linalg.eigvalsh(moment).mean()
    answers = sum((found @ e).square().sum() for e in states) / len(states)
    objective = (gradient * found).sum() + found.square().sum() / (2 * lr)
    objective = objective + strength / (2 * lr * mean_eigenvalue) * answers
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() <= 1e-10


def test_words_are_whole_and_the_draw_is_fixed() -> None:
    few = Tokenizer("cat</w>", "ca", "Ünd</w>", "at</w>", "<|end|>", "b2b</w>", "dog</w>")
    assert words_of(few) == ["cat", "dog"]
    letters = "abcdefghij"
    many = [a + b + c for a in letters for b in letters for c in letters]
    drawn = words_of(Tokenizer(*(w + "</w>" for w in many)))
    assert len(drawn) == len(set(drawn)) == WORDS_AT_MOST
    assert drawn == words_of(Tokenizer(*(w + "</w>" for w in reversed(many))))
    with pytest.raises(ValueError, match=r"keep_vocabulary.*ends of words.*0 turns it off"):
        words_of(Tokenizer("▁cat", "▁dog"))


def test_words_are_single_tokens_of_the_tokenizer_itself() -> None:
    tokenizer = load_model(None, EraseConfig("cat")).pipeline.tokenizer
    words = words_of(tokenizer)
    assert {"cat", "dog", "flat"} <= set(words)
    assert all(len(tokenizer(w).input_ids) == 3 for w in words)  # start, the word, end


def test_second_moment_is_that_of_a_plain_loop() -> None:
    pipe = pipelines.pipeline()
    words = ["cat", "dog", "house"]
    found = second_moment(load_model(pipe, config()), words, 64)
    states = torch.cat([encode(pipe, w, 1)[0] for w in ("", *words)]).double()
    assert relative(found, states.T @ states / len(states)) <= 1e-5


def filter_of(pipe: Any, strength: float) -> torch.Tensor:
    """From the formula, over the words that the package says it used."""
    words = ["", *words_of(pipe.tokenizer)]
    states = torch.cat([encode(pipe, w, 1)[0] for w in words]).double()
    moment = states.T @ states / len(states)
    c = torch.linalg.eigvalsh(moment).mean()
    return torch.linalg.inv(torch.eye(len(moment)).double() + strength / c * moment)


def test_first_step_is_adams_in_the_filtered_coordinates() -> None:
    """W = W0 + A F: Adam moves A by lr * sign, and only matrices that read the text have an F."""
    gradients: dict[str, torch.Tensor] = {}
    pipe = pipelines.pipeline()
    truth = filter_of(pipe, 1.0)
    for name, parameter in pipe.unet.named_parameters():
        if "attn2" in name:
            parameter.register_hook(lambda g, name=name: gradients.update({name: g.clone()}))
    ours = watched_run(pipe, config(iterations=1))
    plain = watched_run(pipelines.pipeline(), config(iterations=1, keep_vocabulary=0.0))
    filtered = [n for n in ours.erasure.tensors if n.endswith(KEYS_AND_VALUES)]
    assert 0 < len(filtered) < len(ours.erasure.tensors)
    for name, tensor in ours.erasure.tensors.items():
        if name not in filtered:
            assert same_bits(tensor, plain.erasure.tensors[name])
            continue
        mixed = gradients[name].double() @ truth
        steps = -ours.config.learning_rate * mixed / (mixed.abs() + 1e-8)
        assert relative(tensor - ours.start[name], steps @ truth) <= 1e-3
        assert same_bits(pipe.unet.get_parameter(name), tensor)


def test_other_words_answers_move_less_for_the_same_move() -> None:
    """What it is for: |dW e| of words that were not erased, for each unit of |dW|."""
    moved: dict[float, float] = {}
    for strength in (0.0, 1.0, 100.0):
        pipe = pipelines.pipeline()
        states = torch.cat([encode(pipe, w, 1)[0] for w in ("", *words_of(pipe.tokenizer))])
        ours = watched_run(pipe, config(keep_vocabulary=strength, train_method="esd-x-strict"))
        changes = [t - ours.start[n] for n, t in ours.erasure.tensors.items()]
        moved[strength] = sum(float((states @ d.T).norm() / d.norm()) for d in changes)
    assert moved[100.0] < moved[1.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_coordinates(dtype: torch.dtype) -> None:
    pipe = pipelines.pipeline(dtype=dtype)
    before = pipelines.weights(pipe)
    ours = watched_run(pipe, config(learning_rate=1e-6))
    for name, tensor in ours.erasure.tensors.items():
        assert tensor.dtype == torch.float32
        assert same_bits(pipe.unet.get_parameter(name), tensor.to(dtype))
        assert (tensor - before[name].float()).norm() > 0  # below what the weights can show
    ours.erasure.revert(pipe)
    pipelines.assert_same_weights(pipe, before)


def test_the_manifest_says_what_was_filtered() -> None:
    told = watched_run(pipelines.pipeline(), config()).erasure.manifest["kept_vocabulary"]
    assert told["words"] == len(words_of(pipelines.pipeline().tokenizer)) > 0
    assert told["tensors"] > 0
    nothing = {"words": 0, "tensors": 0}
    for settings in ({"keep_vocabulary": 0.0}, {"train_method": "esd-u"}):
        manifest = watched_run(pipelines.pipeline(), config(**settings)).erasure.manifest
        assert manifest["kept_vocabulary"] == nothing


def test_no_filter_without_strength() -> None:
    model = load_model(pipelines.pipeline(), config())
    names = [n for n, _ in model.unet.named_parameters() if n.endswith(KEYS_AND_VALUES)]
    assert filters_for(model, names, 0.0, 64) == ({}, 0)
    filters, _ = filters_for(model, names, 1.0, 64)
    assert list(filters) == names
    assert len({id(f) for f in filters.values()}) == 1  # one matrix, shared
