"""The same pictures in other words, and the table of what was seen in them."""

import pytest
import synonyms

from esd_fast.demo import world
from esd_fast.evaluation.recognition import Question
from esd_fast.generate import Shot


@pytest.mark.parametrize(
    ("prompt", "concept", "expected"),
    [
        ("a cat in ink style", "cat", "a kitty in ink style"),
        ("an umbrella on a blue background", "umbrella", "a parasol on a blue background"),
        ("a turtle", "turtle", "a tortoise"),
        ("a robot", "robot", "an android"),
        ("a pixel style dog", "dog", "a pixel style puppy"),
        ("cake", "cake", "gateau"),
    ],
)
def test_only_the_word_and_its_article_change(prompt, concept, expected):
    assert synonyms.in_other_words(Question(Shot(prompt, 7), concept)) == Question(
        Shot(expected, 7), concept
    )


@pytest.mark.parametrize("concept", synonyms.CONCEPTS)
def test_no_picture_of_the_synonym_names_the_word(concept):
    asked = synonyms.questions(concept, 0)
    synonym = world.OBJECTS[concept][1]
    assert len(asked["word"]) == len(asked["synonym"]) == synonyms.ASKED
    for one, other in zip(asked["word"], asked["synonym"], strict=True):
        assert concept in one.shot.prompt.split()
        assert concept not in other.shot.prompt.split()
        assert synonym in other.shot.prompt
        assert one.shot.seed == other.shot.seed
    assert not any({concept, synonym} & set(q.shot.prompt.split()) for q in asked["kept"])


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    run = []

    def measured(concept, recipe, seed):
        run.append((concept, recipe, seed))
        seen = {"word": [1, 0], "synonym": [1, 1], "kept": [1, 1, 1, 0]}
        return {"concept": concept, "recipe": recipe, "seed": seed, **seen}

    monkeypatch.setattr(synonyms, "measure", measured)
    file = tmp_path / "rows.jsonl"
    rows = synonyms.run_all(["cat"], 1, file)
    assert synonyms.run_all(["cat", "dog"], 1, file)[: len(rows)] == rows
    assert len(run) == len(set(run)) == 2 * (1 + len(synonyms.RECIPES))
    assert "| esd-u | 50.0% (9 to 91%) | 100.0% (34 to 100%) | 75.0% (30 to 95%) |" in (
        synonyms.table(rows)
    )
    assert "| cat / kitty | 50% / 100% |" in synonyms.by_concept(rows)
