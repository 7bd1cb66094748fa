"""The questions: balanced, reproducible, and never about the erased concept."""

from esd_fast.demo import world
from esd_fast.evaluation.recognition import Answers, erased_questions, kept_questions


def test_kept_questions_never_name_the_erased_concept():
    for erased in ("cat", "ink"):
        questions = kept_questions(erased, 300)
        assert len(questions) == 300
        assert all(erased not in q.shot.prompt.split() for q in questions)
        assert all(q.concept != erased and q.concept in q.shot.prompt.split() for q in questions)
        styles = sum(q.concept in world.STYLES for q in questions) / 300
        assert 0.2 < styles < 0.4


def test_kept_questions_name_none_of_several_erased_concepts():
    erased = ["cat", "ink", "cake"]
    questions = kept_questions(erased, 300)
    assert all({*erased}.isdisjoint(q.shot.prompt.split()) for q in questions)
    allowed = [
        q for q in kept_questions("cat", 400) if {"ink", "cake"}.isdisjoint(q.shot.prompt.split())
    ]
    assert questions[:200] == allowed[:200]


def test_different_concepts_share_their_kept_pictures():
    shared = set(kept_questions("cat", 200, 1)) & set(kept_questions("ink", 200, 1))
    assert len(shared) > 120
    assert kept_questions("cat", 50, 1) == kept_questions("cat", 50, 1)
    assert kept_questions("cat", 50, 1) != kept_questions("cat", 50, 2)


def test_erased_questions_use_every_form_of_caption():
    forms = world.captions_of("cat")
    asked = {q.shot.prompt for q in erased_questions("cat", len(forms))}
    assert asked == set(forms)


def test_rates_count_by_concept_and_domain():
    questions = (*erased_questions("cat", 2), *erased_questions("ink", 2))
    answers = Answers(questions, {"judge": (True, False, True, True)})
    assert answers.rate() == 0.75
    assert answers.rate(where=lambda c: c in world.STYLES) == 1.0
    assert answers.by_concept() == {"cat": (1, 2), "ink": (2, 2)}
