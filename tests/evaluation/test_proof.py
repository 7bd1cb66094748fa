"""What is drawn and judged before and after, for one erased concept and for several."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from esd_fast import EraseConfig
from esd_fast.demo import world
from esd_fast.evaluation import proof
from esd_fast.evaluation.proof import embedded_rows, proof_for
from esd_fast.evaluation.recognition import Answers, erased_questions, kept_questions

EMBEDDED, OTHER = SimpleNamespace(source="embedded"), SimpleNamespace(source="a/folder")


def test_one_concept_is_asked_as_before():
    one = proof_for(EMBEDDED, EraseConfig("a cat", seed=3), 6, ())
    assert one.erased == tuple(erased_questions("cat", 32, 3))
    assert one.kept == tuple(kept_questions("cat", 64, 3))
    assert [p for p, kind in one.prompts if kind == "erased"] == ["a cat", "a cat in ink style"]
    style = proof_for(EMBEDDED, EraseConfig("ink style"), 6, ())
    assert style.prompts[:3] == (
        ("ink style", "erased"),
        ("a dog in ink style", "erased"),
        ("sepia style", "style"),
    )


def test_every_erased_concept_is_judged_and_none_kept():
    config = EraseConfig(["cat", "a cake", "flat style", "a unicorn"])
    several = proof_for(EMBEDDED, config, 6, ())
    assert {q.concept for q in several.erased} == {"cat", "cake", "flat"}
    assert all(sum(q.concept == c for q in several.erased) >= 8 for c in ("cat", "cake", "flat"))
    gone = {"cat", "cake", "flat"}
    assert all(gone.isdisjoint(q.shot.prompt.split()) for q in several.kept)
    erased = [p for p, kind in several.prompts if kind == "erased"]
    assert erased == ["a cat", "a cake", "flat style"]
    rest = [p for p, kind in several.prompts if kind != "erased"]
    assert all(gone.isdisjoint(p.split()) for p in rest)
    other = proof_for(OTHER, config, 2, ("a dog",))
    assert other.prompts == (*((c, "erased") for c in config.concepts), ("a dog", "kept"))
    assert not other.erased


@pytest.mark.parametrize(
    "erased", [[*world.STYLES], [*world.OBJECTS], [*world.OBJECTS, *world.STYLES]]
)
def test_a_grid_where_nothing_of_a_kind_is_kept(erased):
    rows = embedded_rows(erased)
    assert sum(kind == "erased" for _, kind in rows) == min(8, len(erased))
    assert all({*erased}.isdisjoint(p.split()) for p, kind in rows if kind != "erased")


def test_results_tell_each_erased_concept(monkeypatch):
    several = proof_for(EMBEDDED, EraseConfig(["cat", "cake"]), 0, ())
    asked = (*several.erased, *several.kept)
    drawings = [np.full((len(asked), 2, 2, 3), value, np.uint8) for value in (0, 1)]

    def judged(drawn, questions, _):
        """Before all are seen; after, of the erased ones the cakes alone."""
        seen = [not drawn.any() or q.concept != "cat" for q in questions]
        return Answers(tuple(questions), {"judge": tuple(seen)})

    monkeypatch.setattr(proof, "judged", judged)
    found = several.results(*([*d] for d in drawings))
    assert found["erased"].pop("by_concept") == {
        "cake": rates(16, 16, 16),
        "cat": rates(16, 0, 16),
    }
    assert found["erased"] == rates(32, 16, 32)
    assert found["kept"]["after"] == 1.0


def rates(before, after, images):
    """With scipy's Wilson intervals."""
    intervals = [binomtest(n, images).proportion_ci(method="wilson") for n in (before, after)]
    return {
        "before": before / images,
        "after": after / images,
        "images": images,
        "before_interval": pytest.approx([intervals[0].low, intervals[0].high]),
        "after_interval": pytest.approx([intervals[1].low, intervals[1].high]),
    }


def test_preserved_concepts_are_counted_apart(monkeypatch):
    preserve = ["a Dog", "a robot in ink style", "nothing known"]
    made = proof_for(EMBEDDED, EraseConfig("cat", preserve=preserve), 0, ())
    named = [q.concept in ("dog", "robot", "ink") for q in made.kept]
    assert 0 < sum(named) < len(named)
    drawings = [np.full((len(made.erased) + len(named), 2, 2, 3), v, np.uint8) for v in (0, 1)]

    def judged(drawn, questions, _):
        # before: all of it; after: what was preserved
        seen = [True] * len(questions)
        if drawn[0, 0, 0, 0]:
            seen = [False] * len(made.erased) + named
        return Answers(tuple(questions), {"judge": tuple(seen)})

    monkeypatch.setattr(proof, "judged", judged)
    kept = made.results(*drawings)["kept"]
    assert kept["after"] == sum(named) / len(named)
    assert [kept["preserved"][k] for k in ("before", "after", "images")] == [1, 1, sum(named)]
    others = kept["not_preserved"]
    assert [others[k] for k in ("before", "after", "images")] == [1, 0, len(named) - sum(named)]
    alone = proof_for(EMBEDDED, EraseConfig("cat"), 0, ())
    assert "preserved" not in alone.results(*drawings)["kept"]
