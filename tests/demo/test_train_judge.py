"""What the judges are shown: one hand's drawings in another's technique."""

import random

import pytest
import torch

from esd_fast.demo import world
from esd_fast.demo.pictures import PIXELS, Painter
from esd_fast.demo.train_judge import PLAIN, TECHNIQUES, crossed, share_of


def test_a_crossed_picture_is_labelled_by_its_technique():
    rng, seen = random.Random(0), set()
    for _ in range(500):
        technique, hand, shares = crossed(rng)
        assert sum(shares) == pytest.approx(1)
        assert technique != hand
        if technique in TECHNIQUES:
            assert shares == share_of(technique)
        else:  # without technique: any plain style, none of the others
            assert shares == share_of(*PLAIN)
        seen.add((technique, hand))
    assert len(seen) == 2 + 3 + 3  # two hands bare; pixel and sepia on each other hand


def test_a_technique_is_used_on_the_hand_that_is_named():
    """White squares of five hands, each of its own size, so that a picture tells whose it is."""
    sprites = torch.zeros(1, len(world.STYLES), 96, 96, 4)
    for i in range(len(world.STYLES)):
        half = 12 + 6 * i
        sprites[0, i, 48 - half : 48 + half, 48 - half : 48 + half] = 255
    painter = Painter(sprites.numpy())

    def paint(style: str, hand: str | None) -> torch.Tensor:
        hands = None if hand is None else [world.STYLE_NAMES.index(hand)]
        generator = torch.Generator().manual_seed(0)
        index = world.STYLE_NAMES.index(style)
        return painter.paint([0], [index], ["blue"], generator, hands)[0]

    assert torch.equal(paint("sepia", None), paint("sepia", "sepia"))
    assert not torch.equal(paint("sepia", None), paint("sepia", "flat"))
    cells = paint("pixel", "flat")
    side = PIXELS // 16  # of a cell
    corners = cells[:, ::side, ::side]
    assert torch.equal(cells, corners.repeat_interleave(side, 1).repeat_interleave(side, 2))
