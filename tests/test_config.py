"""EraseConfig: every bad value is refused at once, and the message says what would do."""

import ast
import dataclasses
import inspect
import itertools
import json
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast.config import PRESETS, EraseConfig


def config(**settings: Any) -> EraseConfig:
    return EraseConfig(**{"concept": "cat"} | settings)


@pytest.mark.parametrize(
    ("name", "value", "would_do"),
    [
        ("concept", "", "must name something"),
        ("concept", " \n\t ", "must name something"),
        ("concept", "\u200b", "must name something"),  # blank to the eye
        ("concept", None, "must be a text"),
        ("concept", {"cat"}, "must be a text"),  # no order
        ("concept", [], "holds one at least"),
        ("concept_weights", [1.0, 2.0], "left out where one concept is erased"),
        ("concept", "cat \udcff", "valid Unicode"),
        ("erase_from", "", "must name something"),
        ("erase_from", 3, "must be a text"),
        ("preset", "quick", "'fast' or 'reference'"),
        ("train_method", "esd-y", "must be one of esd-x"),
        ("train_method", "", "must be one of esd-x"),
        ("train_method", None, "must be one of esd-x"),
        ("train_method", "attn2(", "no regular expression"),
        ("iterations", 0, "a whole number from 1"),
        ("iterations", 2.5, "a whole number from 1"),
        ("iterations", True, "a whole number from 1"),
        ("batch_size", -1, "a whole number from 1"),
        ("collect_batch_size", 0, "a whole number from 1"),
        ("num_inference_steps", 1001, "at most 1000"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", -1e-5, "above 0"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", "1e-5", "a finite number"),
        ("negative_guidance", float("nan"), "a finite number"),
        ("guidance_scale", None, "a finite number"),
        ("keep_vocabulary", -0.5, "0 (off) or above"),
        ("optimizer", "sgd", "'adam' or 'adamw' or 'adam8bit'"),
        ("optimizer", None, "'adam' or 'adamw'"),
        ("weight_decay", 0.1, "left out where no AdamW is the optimizer"),
        ("weight_decay", -0.1, "0 (off) or above"),
        ("weight_decay", float("nan"), "a finite number"),
        ("max_grad_norm", -1.0, "0 (off) or above"),
        ("max_grad_norm", float("inf"), "a finite number"),
        ("max_grad_norm", "1", "a finite number"),
        ("resolution", 100, "a multiple of 8"),
        ("resolution", 0, "a whole number from 1"),
        ("seed", -1, "from 0"),
        ("seed", 1.0, "a whole number from 0"),
        ("seed", 2**63, "below 2**63"),
        ("anchor", "erase_from", "'concept' or 'null'"),
        ("rollout", "teacher", "'frozen' or 'student'"),
        ("samples", "some", "'all' or 'last'"),
        ("schedule", "ddim", "'model' or 'paper'"),
        ("dtype", "fp16", "'float16'"),
        ("device", torch.device("cpu"), "a text"),
        ("cuda_graphs", "on", "'auto' or 'off'"),
        ("cuda_graphs", True, "'auto' or 'off'"),
        ("ema", True, "'auto' or 'yes' or 'no'"),
        ("allow_pickle", "yes", "True or False"),
        ("prediction_type", "v", "'v_prediction'"),
        ("variant", "", "such as 'fp16'"),
        ("model_config", 3, "a folder"),
    ],
)
def test_refused_naming_argument_and_value(name: str, value: object, would_do: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        config(**{name: value})
    assert would_do in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concept": ["cat", "dog", " cat"]}, "concept holds 'cat' more than once"),
        ({"concept": ["cat", ""]}, "concept is ''; it must name something"),
        ({"concept": ["cat", 3]}, "concept is 3; it must be a text"),
        ({"erase_from": ["a", "b", "c"]}, "or one for each of 2 concepts"),
        ({"erase_from": []}, "or one for each of 2 concepts"),
        ({"erase_from": ["a", ""]}, "erase_from is ''"),
        ({"concept": "cat", "erase_from": ["a", "b"]}, "must be one text"),
        ({"erase_from": ["a", None], "anchor": "null"}, "one for each concept where anchor"),
        ({"concept_weights": [1.0]}, "a list of 2 numbers, one a concept"),
        ({"concept_weights": 1.0}, "a list of 2 numbers, one a concept"),
        ({"concept_weights": [1.0, 0]}, "above 0"),
        ({"concept_weights": [1.0, float("nan")]}, "a finite number"),
    ],
)
def test_refused_of_several_concepts(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"concept|erase_from") as error:
        config(**{"concept": ["cat", "dog"]} | settings)
    assert said in str(error.value)


def test_several_concepts() -> None:
    """A text for one, whatever it came as; a tuple for several."""
    assert config(concept=[" cat "]).concept == "cat"
    assert config(concept="cat, dog").concepts == ("cat, dog",)
    two = config(concept=["cat", "Van Gogh "], erase_from=["an animal", None])
    assert two.concept == two.concepts == ("cat", "Van Gogh")
    assert two.sources == ("an animal", None)
    assert two.target_anchor == "erase_from"
    assert config(concept=["cat", "dog"], erase_from=["a", "a"]).erase_from == "a"
    assert config(concept=["cat", "dog"], erase_from=["a"]).sources == ("a", "a")
    assert config(concept=["cat", "dog"], erase_from=[None, None]).erase_from is None
    assert config(erase_from=["a"]).erase_from == "a"
    assert dataclasses.replace(two, seed=3).concepts == two.concepts
    assert json.loads(json.dumps(dataclasses.asdict(two)))["concept"] == ["cat", "Van Gogh"]


@pytest.mark.parametrize(
    ("preset", "iterations"),
    [("fast", 600), ("reference", 600), ("paper", 1000), ("paper-diffusers", 200)],
)
def test_a_recipes_iterations_are_for_each_concept_unless_one_is_drawn(
    preset: str, iterations: int
) -> None:
    three = ["cat", "dog", "fish"]
    assert EraseConfig.from_preset(preset, three, "any").iterations == iterations
    assert EraseConfig.from_preset(preset, three, "any", iterations=7).iterations == 7
    assert config(concept=three).iterations == 200


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": "student"},  # every state answered by another student
        {"samples": "all", "schedule": "paper"},
        {"samples": "last", "schedule": "paper-diffusers", "num_inference_steps": 2},
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        config(**settings)


def test_nothing_is_loaded_for_a_bad_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd_fast.esd.load_model", lambda *_: pytest.fail("loaded"))
    for bad in ({"train_method": "xatn"}, {"concept": "  "}, {"batch_size": 0}, {"preset": "q"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            esd_fast.erase(None, **{"concept": "cat"} | bad)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="'iteration' is no setting; there are allow_pickle, anchor"
    ):
        esd_fast.erase(None, "cat", iteration=3)


def test_concept_is_stripped_and_else_kept() -> None:
    assert config(concept="  Van Gogh, Monet\n").concept == "Van Gogh, Monet"
    assert config(erase_from=" a cat ").erase_from == "a cat"


def test_frozen_and_plain() -> None:
    one = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 1  # type: ignore[misc]
    assert json.loads(json.dumps(dataclasses.asdict(one)))["concept"] == "cat"


def test_every_field_is_explained() -> None:
    """A docstring below each field, as EraseConfig promises."""
    body = ast.parse(inspect.getsource(EraseConfig)).body[0].body  # type: ignore[attr-defined]
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(field)
            assert isinstance(after.value, ast.Constant), ast.unparse(field)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_can_be_overridden(preset: str) -> None:
    one = EraseConfig.from_preset(preset, "cat", model="some/folder", seed=7, iterations=None)
    assert one.preset == preset
    assert one.seed == 7
    assert one.iterations == PRESETS[preset].get("iterations", 200)  # None keeps the recipe's


def test_both_guidances_are_recorded() -> None:
    """The paper's eta: ep - n (ep - e0) = e0 - (n - 1)(ep - e0)."""
    assert config(negative_guidance=2.0, anchor="concept").eta == 1.0
    assert config(negative_guidance=2.0, anchor="null").eta == 2.0
    assert config(negative_guidance=2.0, erase_from="animal").eta == 2.0
    assert config(erase_from="animal").target_anchor == "erase_from"
    assert config(anchor="null").target_anchor == "null"
