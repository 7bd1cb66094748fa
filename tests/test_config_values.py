"""EraseConfig with any value in any field: a configuration that its JSON brings back, or a ValueError that names
the field."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esd_fast.config import CHOICES, PRESETS, EraseConfig
from esd_fast.parameters import ALIASES, METHODS

FIELDS = [field.name for field in dataclasses.fields(EraseConfig)]
CHOSEN = [value for values in CHOICES.values() for value in values]
WORDS = [*CHOSEN, *PRESETS, *METHODS, *ALIASES, "cat", "8GB", "fp16", "cuda:1", "attn2(", "[["]
TEXT = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(WORDS)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([8, 64, 512, 2**63 - 1, 2**63, 10**309, -(10**4000), 5e-324, True])
)
ATOMS = st.none() | st.booleans() | NUMBERS | TEXT | st.binary(max_size=5)
ANYTHING = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(TEXT, inner, max_size=2)
        | st.frozensets(ATOMS, max_size=2)
    ),
    max_leaves=5,
)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
# "[[" and the like in an expression; none of a mistake's business
pytestmark = pytest.mark.filterwarnings("ignore:Possible (nested|set):FutureWarning")


def made(**values: Any) -> EraseConfig | None:
    """None where it was refused, as it must be: by name, on a line of a length that can be read."""
    try:
        return EraseConfig(**{"concept": "cat"} | values)
    except ValueError as error:
        said = str(error)
        assert any(name in said for name in values), said
        assert "\n" not in said
        assert len(said) < 1000
        return None


def assert_same_from_json(config: EraseConfig) -> None:
    text = json.dumps(dataclasses.asdict(config), allow_nan=False)
    assert EraseConfig(**json.loads(text)) == config


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_one_field(field: str) -> None:
    @quick
    @given(ANYTHING)
    def check(value: Any) -> None:
        config = made(**{field: value})
        if config is not None:
            assert_same_from_json(config)

    check()


@quick
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=2, max_size=4))
def test_any_values_together(values: dict[str, Any]) -> None:
    config = made(**values)
    if config is not None:
        assert_same_from_json(config)


@quick
@given(
    st.sampled_from(sorted(PRESETS)) | ANYTHING,
    st.dictionaries(st.sampled_from(FIELDS[1:]) | TEXT, ANYTHING, max_size=2),
)
def test_from_preset(preset: Any, values: dict[str, Any]) -> None:
    for taken in ("preset", "concept", "model", "cls"):
        values.pop(taken, None)
    try:
        config = EraseConfig.from_preset(preset, "cat", "any", **values)
    except ValueError as refused:
        said = str(refused)
        names = ("preset", *values)
        found = any(n in said or repr(n) in said for n in names)
        if not found:
            raise
    else:
        assert_same_from_json(config)


def test_numbers_that_python_does_not_write_out() -> None:
    for field in ("iterations", "learning_rate", "seed", "device", "concept"):
        assert made(**{field: -(10**5000)}) is None


@quick
@given(
    st.lists(st.sampled_from(["cat", "dog", "Van Gogh", "猫", "AC/DC"]), unique=True, min_size=2),
    st.data(),
)
def test_several_concepts_come_back(concepts: list[str], data: st.DataObject) -> None:
    """The paths that random values hardly find."""
    many = {"min_size": len(concepts), "max_size": len(concepts)}
    config = EraseConfig(
        concept=concepts,
        erase_from=data.draw(st.lists(st.none() | st.sampled_from(["animal", "art"]), **many)),
        concept_weights=data.draw(st.lists(st.floats(0.1, 10), **many)),
        given=data.draw(st.lists(st.sampled_from(FIELDS))),
    )
    assert config.concepts == tuple(concepts)
    assert_same_from_json(config)
