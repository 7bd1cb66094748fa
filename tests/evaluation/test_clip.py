"""Scores and zero-shot answers against one plain call of transformers' CLIPModel for each pair."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from esd_fast.evaluation.clip import TEMPLATES, Clip, ClipRecogniser
from esd_fast.evaluation.concepts import OBJECT, STYLE

from .tiny_clip import write_tiny_clip

CONCEPTS = {"cat": OBJECT, "dog": OBJECT, "car": OBJECT, "ink": STYLE, "sepia": STYLE}
PROMPTS = ["a cat", "a dog in ink style " * 30, "", "a car"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(p).resize((64, 48), Image.Resampling.NEAREST)) for p in low]


@functools.cache
def loaded(folder):
    parts = (CLIPModel, CLIPTokenizer, CLIPImageProcessorPil)
    model, tokenizer, processor = (part.from_pretrained(folder) for part in parts)
    return model.eval(), tokenizer, processor


def cosine(folder, picture, text):
    return cosine_of(folder, picture.tobytes(), picture.shape, text)


@functools.cache
@torch.no_grad()
def cosine_of(folder, pixels, shape, text):
    model, tokenizer, processor = loaded(folder)
    words = tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
    picture = np.frombuffer(pixels, np.uint8).reshape(shape)
    image = processor(Image.fromarray(picture), return_tensors="pt")
    return float(model(**words, **image).logits_per_image / model.logit_scale.exp())


def test_score_is_clips_own_cosine(folder, pictures):
    clip = Clip.load(str(folder))
    scores = clip.scores(clip.pictures(pictures), clip.texts(PROMPTS))
    truth = [100 * max(cosine(folder, *pair), 0) for pair in zip(pictures, PROMPTS, strict=True)]
    assert scores == pytest.approx(truth, abs=1e-4)
    assert len(set(scores)) == 4


@pytest.mark.parametrize("batch", [64, 3])
def test_recognised_is_the_most_similar_of_its_domain(folder, pictures, batch, monkeypatch):
    monkeypatch.setattr("esd_fast.evaluation.clip.BATCH", batch)
    recogniser = ClipRecogniser(Clip.load(str(folder)), CONCEPTS)
    shown = recogniser.shows(pictures, list(CONCEPTS))
    for row, picture in zip(shown, pictures, strict=True):
        for domain in (OBJECT, STYLE):
            names = [n for n, d in CONCEPTS.items() if d == domain]
            likes = [cosine(folder, picture, TEMPLATES[domain].format(n)) for n in names]
            picked = [n for n, s in zip(CONCEPTS, row, strict=True) if s and n in names]
            assert picked == [names[int(np.argmax(likes))]]
    only = recogniser.shows(pictures, ["sepia"])
    assert only[:, 0].tolist() == shown[:, list(CONCEPTS).index("sepia")].tolist()


def test_it_says_what_it_is_and_does_not_know_a_concept_alone(folder, pictures):
    recogniser = ClipRecogniser(
        Clip.load(str(folder)), {"cat": OBJECT, "dog": OBJECT, "ink": STYLE}
    )
    assert recogniser.told["threshold"] == "the most similar of 2 objects"
    assert str(folder) in recogniser.told["detector"]
    assert not recogniser.knows("ink")
    with pytest.raises(ValueError, match="does not know ink"):
        recogniser.shows(pictures, ["ink"])
