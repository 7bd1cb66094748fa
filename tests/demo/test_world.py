"""The embedded world's captions, and what is drawn when a caption leaves things open."""

import random
from collections import Counter

import pytest

from esd_fast.demo import world


def test_every_caption_names_what_it_asks_for():
    for concept in (*world.OBJECTS, *world.STYLES):
        for caption in world.captions_of(concept):
            assert concept in caption.split()


def test_articles_follow_the_word_that_comes_next():
    assert "an ink style cat" in world.captions_of("cat")
    assert "an umbrella" in world.captions_of("umbrella")
    assert "a picture of an airplane" in world.captions_of("airplane")


def test_unknown_concept_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'unknown'.*airplane.*sepia"):
        world.captions_of("unknown")


def test_no_two_objects_share_a_word():
    words = [w for name, (_, synonym) in world.OBJECTS.items() for w in (name, synonym)]
    assert len(set(words)) == len(words)
    assert len(world.OBJECTS) >= 40
    assert len(world.STYLES) >= 5


def test_neutral_style_takes_most_of_what_no_caption_asks_for():
    rng = random.Random(0)
    scenes = [world.draw_scene(rng, neutral_share=0.6) for _ in range(20_000)]
    open_style = Counter(s.style for s in scenes if "style" not in s.caption)
    share = open_style[world.NEUTRAL_STYLE] / open_style.total()
    assert share == pytest.approx(0.6, abs=0.02)
    assert min(open_style.values()) / open_style.total() > 0.07
    empty = sum(s.caption == "" for s in scenes) / len(scenes)
    assert empty == pytest.approx(world.EMPTY_SHARE, abs=0.01)


def test_captions_say_what_is_drawn():
    rng = random.Random(1)
    for _ in range(2_000):
        scene = world.draw_scene(rng, neutral_share=0.6)
        words = scene.caption.split()
        if "style" in words:
            assert words[words.index("style") - 1] == scene.style or f"in {scene.style}" in (
                scene.caption
            )
        if "background" in words:
            assert words[words.index("background") - 1] == scene.background


def test_named_in_finds_object_or_style():
    assert world.named_in("a cat on a blue background") == "cat"
    assert world.named_in("Ink style") == "ink"
    assert world.named_in("Van Gogh") is None
