"""The matrix is the rows' own answers, put to the concept that each picture asked for."""

import interference

from esd_fast.evaluation.recognition import erased_questions, kept_questions


def test_counts_are_those_of_the_questions():
    kept = kept_questions("cat", 40, 1)
    dogs = [i for i, q in enumerate(kept) if q.concept == "dog"]
    answers = [0 if i in dogs else 1 for i in range(40)]
    rows = [
        {
            "settings": "base",
            "seed": 1,
            "erased": {"cat": {"judge": [1] * 8}},
            "kept": {"cat": {"judge": [1] * 40}},
        },
        {
            "settings": {},
            "concept": "cat",
            "seed": 1,
            "erased": {"judge": [0] * 7 + [1]},
            "kept": {"judge": answers},
        },
        {"settings": {"train_method": "esd-u"}, "concept": "cat", "seed": 1},
    ]
    base, row = interference.matrix(rows, {})
    assert (row.name, row.erased) == ("cat", ("cat",))
    assert row.seen["cat"] == (1, len(erased_questions("cat", 8, 1)))
    assert row.seen["dog"] == (0, len(dogs))
    assert sum(n for _, n in row.seen.values()) == 48
    assert all(seen == n for seen, n in base.seen.values())
    assert interference.worst([row], base).startswith(
        f"cat erased: dog recognised in 0 of {len(dogs)} (-100 points)"
    )
