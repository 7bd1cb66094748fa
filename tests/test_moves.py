"""Moves against float64, tensor by tensor and together."""

import pytest
import torch

from esd_fast.moves import by_layer, layer_of, moves_of, together


def example():
    generator = torch.Generator().manual_seed(0)
    names = ("down_blocks.0.attentions.1.to_k.weight", "down_blocks.0.attentions.1.to_v.weight")
    before = {n: torch.randn(4, 3, generator=generator) for n in (*names, "conv_out.bias")}
    after = {n: t + 0.1 * torch.randn(4, 3, generator=generator) for n, t in before.items()}
    after["conv_out.bias"] = before["conv_out.bias"].clone()
    after["conv_out.bias"][0, 0] *= 1 + 2**-12  # lost in bfloat16
    return before, after


def truth(names, before, after):
    was, now = (torch.cat([t[n].double().flatten() for n in names]) for t in (before, after))
    return float((now - was).norm() / was.norm())


def test_moves_and_their_sums():
    before, after = example()
    rows = moves_of(after, before)
    assert [r["relative_move"] for r in rows] == sorted(r["relative_move"] for r in rows)[::-1]
    for row in rows:
        assert row["relative_move"] == pytest.approx(truth([row["name"]], before, after), rel=1e-5)
    assert together(rows)["relative_move"] == pytest.approx(truth(before, before, after), rel=1e-5)
    assert together(rows)["weights"] == 36
    assert together(rows)["moved"] == 25
    layers = {row["name"]: row for row in by_layer(rows)}
    attention = layers["down_blocks.0.attentions.1"]
    assert attention["tensors"] == 2
    names = [n for n in before if "attentions" in n]
    assert attention["relative_move"] == pytest.approx(truth(names, before, after), rel=1e-5)


def test_what_the_models_dtype_rounds_away_is_counted():
    before, _ = example()
    low = {n: t.bfloat16() for n, t in before.items()}
    base = {n: t.float() for n, t in low.items()}
    base["conv_out.bias"][0, 0] *= 1 + 2**-12
    row = next(r for r in moves_of(base, low) if r["name"] == "conv_out.bias")
    assert (row["moved"], row["moved_here"]) == (1, 0)


def test_layers_have_two_numbers_at_most():
    assert layer_of("down_blocks.0.attentions.1.to_k.weight") == "down_blocks.0.attentions.1"
    assert layer_of("conv_out.bias") == "conv_out"
