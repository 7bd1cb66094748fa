"""Which concepts prompts, columns and erasures name."""

import pytest

from esd_fast.evaluation.concepts import (
    OBJECT,
    STYLE,
    asked,
    erased_among,
    gathered,
    named,
    with_erased,
)

CONCEPTS = {"cat": OBJECT, "truck": OBJECT, "fire truck": OBJECT, "Vincent van Gogh": STYLE}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a Cat.", ("cat",)),
        ("a catalogue", ()),
        ("concatenate", ()),
        ("a fire truck", ("fire truck",)),
        ("a fire truck and a truck", ("truck", "fire truck")),
        ("cats", ()),
        ("", ()),
    ],
)
def test_names_are_whole_words_and_the_longest_counts(text, expected):
    assert named(text, CONCEPTS) == expected


def test_columns_say_more_than_the_prompt():
    assert asked("a cat by Vincent van Gogh", {}, CONCEPTS) == ("cat", "Vincent van Gogh")
    assert asked("a cat by Vincent van Gogh", {"class": "truck"}, CONCEPTS) == ("truck",)
    both = {"class": "cat", "artist": "vincent van gogh"}
    assert asked("nothing", both, CONCEPTS) == ("cat", "Vincent van Gogh")
    assert asked("a cat", {"concept": "truck", "class": "cat"}, CONCEPTS) == ("truck",)
    assert asked("a cat", {"class": " ", "note": "dog"}, CONCEPTS) == ("cat",)
    assert asked("a cat", {"class": "unknown"}, CONCEPTS) == ()


def test_concepts_come_from_the_command_line_and_from_columns():
    columns = [{"class": "tench", "artist": "Monet"}, {"artist": "monet"}, {"concept": "Cat"}]
    found = gathered(["cat"], ["Picasso"], columns, embedded=False)
    assert found == {"cat": OBJECT, "Picasso": STYLE, "tench": OBJECT, "Monet": STYLE}
    assert gathered([], [], [], embedded=True)["ink"] == STYLE


def test_what_an_erasure_is_of():
    assert erased_among("cat", CONCEPTS) == ("cat",)
    assert erased_among("Van Gogh", CONCEPTS) == ("Vincent van Gogh",)
    assert erased_among("cat, fire truck", CONCEPTS) == ("cat", "fire truck")
    assert erased_among("nudity", CONCEPTS) == ()
    assert with_erased(CONCEPTS, ["nudity", "Van Gogh", "ink style"]) == {
        **CONCEPTS,
        "nudity": OBJECT,
        "ink style": STYLE,
    }
