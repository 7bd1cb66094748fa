"""What is refused before anything is loaded, and what a plan says of quantized weights; no library is
needed for either."""

import argparse
from typing import Any

import pytest

import esd_fast
from esd_fast.commands.plan import as_text, plan, verdict
from esd_fast.engine import what_needs_less
from esd_fast.memory_plan import plan_memory
from esd_fast.quantize import stored_bytes

from .test_memory_plan import smaller


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": "int4"}, r"quantize is 'int4'; it must be 'int8' or 'nf4', or left out"),
        ({"quantize": True}, r"quantize is True; it must be 'int8' or 'nf4'"),
        (
            {"quantize": "nf4", "train_method": "full"},
            r"train_method 'full' trains every matrix .* another train_method, or no quantize",
        ),
        ({"quantize": "int8", "train_method": "ldm-full"}, r"nothing is left to quantize"),
        (
            {"quantize": "nf4", "train_method": "esd-x"},
            r"quantize is 'nf4', which needs no_such_library .*pip install no_such_library",
        ),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.quantize.EXTRA", "no_such_library")
    monkeypatch.setattr("esd_fast.esd.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        esd_fast.erase(None, "cat", **settings)


def test_plan_refuses_what_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd_fast.memory_plan.plan_memory", lambda *_, **__: pytest.fail("counted"))
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        plan(argparse.Namespace(train_method="esd-all", quantize="nf4"))
    with pytest.raises(ValueError, match=r"proj' leaves no layer to quantize"):
        plan_memory("sd1", smaller(), "conv|to_|ff|time|proj", 64, quantize="nf4")


def test_a_format_takes_what_its_papers_say() -> None:
    weights = 5120 * 1280
    assert stored_bytes("int8", 5120, 1280) == weights + 4 * 5120
    # QLoRA: 4 bits, and 0.127 of the scales
    assert stored_bytes("nf4", 5120, 1280) / weights * 8 == pytest.approx(4.127, abs=0.001)


@pytest.fixture(scope="module")
def plans() -> list[Any]:
    """As it is, and in nf4."""
    return [
        plan_memory("sd1", smaller(), "esd-x-strict", 64, quantize=how) for how in (None, "nf4")
    ]


def test_what_a_plan_says_would_fit_does(plans: list[Any]) -> None:
    plain, nf4 = plans
    assert list(plain.least_quantized) == ["int8", "nf4"]  # of more bits first
    assert plain.least_quantized["nf4"] == nf4.least < plain.least_quantized["int8"] < plain.least
    assert nf4.fitting(nf4.least)
    assert nf4.fitting(nf4.least - 1) is None
    assert nf4.least_quantized == {}
    assert plain.quantized_fitting(plain.least - 1) == "int8"
    assert plain.quantized_fitting(nf4.least) == "nf4"
    assert plain.quantized_fitting(nf4.least - 1) is None
    assert "; --quantize nf4 would fit" in verdict(plain, nf4.least)
    assert "quantize" not in verdict(plain, nf4.least - 1)
    assert what_needs_less(plain, plain.least - 1).endswith("; quantize 'int8' would fit")
    text = as_text(nf4, None)
    assert "weights (nf4)" in text
    assert "peak before and after, weights whole" in text


def test_only_what_is_held_is_less(plans: list[Any]) -> None:
    plain, nf4 = plans
    assert nf4.weights < plain.weights < nf4.whole - nf4.libraries
    assert nf4.masters_and_frozen == plain.masters_and_frozen
    less = plain.weights - nf4.weights
    for ours, theirs in zip(nf4.choices, plain.choices, strict=True):
        assert 0.8 * less < theirs.total - ours.total < less  # a weight at a time is there whole
