"""What held_out_words.py leaves out is left out, and is what its pictures ask for."""

import held_out_words as suite

from esd_fast.demo import world


def test_no_erased_concept_is_held_out():
    held_out = suite.held_out()
    assert not held_out & set(suite.CONCEPTS)
    assert len(held_out) == (len(world.OBJECTS) - len(suite.CONCEPTS)) // 2


def test_names_synonyms_and_their_pieces_are_left_out():
    objects = {o: world.OBJECTS[o][1] for o in ("doughnut", "frog")}
    synonym = objects["doughnut"].replace("-", " ").split()[0]
    words = ["doughnut", synonym, "nut", "cat", "style", "frog"]
    assert suite.words_without(set(objects), words) == ["cat", "style"]


def test_kept_pictures_ask_for_what_was_held_out():
    asked = suite.questions("cat", 0)
    assert len(asked) == suite.KEPT
    assert {q.concept for q in asked} <= suite.held_out()
    assert not any("cat" in q.shot.prompt.split() for q in asked)


def test_table_is_relative_to_the_base():
    rows = [
        {"concept": c, "held_to": h, "erased": 0.0, "kept": 0.5 if h == "base" else 0.25}
        for c in suite.CONCEPTS
        for h in ("base", "no word", "words left", "all words")
    ]
    assert suite.table(rows).count("0.0% / 50.0%") == 3 * len(suite.CONCEPTS)
