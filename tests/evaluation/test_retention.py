"""UA, IRA and CRA against loops over pictures; the matrix against its counts, pixel by pixel."""

import numpy as np
import pytest
from scipy.stats import binomtest

from esd_fast.evaluation.concepts import OBJECT, STYLE
from esd_fast.evaluation.interference import (
    CELL,
    LABELS,
    MARGIN,
    column_order,
    interference_picture,
    lost,
    tint,
)
from esd_fast.evaluation.retention import (
    InterferenceRow,
    Questions,
    interference_row,
    retention,
)

CONCEPTS = {"cat": OBJECT, "dog": OBJECT, "ink": STYLE, "flat": STYLE, "unasked": OBJECT}
ASKED = [("cat",), ("cat", "ink"), ("dog",), ("dog", "ink"), ("flat",), ("cat",), ("dog",), ()]


def answers(seed):
    questions = Questions.of(CONCEPTS, ASKED)
    rng = np.random.default_rng(seed)
    return questions, *(rng.random(questions.asks.shape) < p for p in (0.8, 0.4))


def counted(erased, domain, was, now, names):
    """Seen before, seen after, pictures: as one would count by hand."""
    totals = [0, 0, 0]
    for picture, asked in enumerate(ASKED):
        for column, name in enumerate(names):
            if name not in asked or (name != erased and erased in asked):
                continue
            group = "UA" if name == erased else CONCEPTS[name]
            if group == domain:
                totals[0] += was[picture, column]
                totals[1] += now[picture, column]
                totals[2] += 1
    return totals


@pytest.mark.parametrize("erased", ["cat", "ink"])
def test_rates_are_those_counted_by_hand(erased):
    questions, was, now = answers(3)
    names = list(questions.concepts)
    assert "unasked" not in names
    found = retention(questions, (erased,), was, now)
    own, other = (OBJECT, STYLE) if erased == "cat" else (STYLE, OBJECT)
    for rate, domain in (("UA", "UA"), ("IRA", own), ("CRA", other)):
        before, after, images = counted(erased, domain, was, now, names)
        seen = [images - before, images - after] if rate == "UA" else [before, after]
        assert found[rate]["images"] == images > 0
        assert [found[rate]["before"], found[rate]["after"]] == [n / images for n in seen]
        for when, n in zip(("before", "after"), seen, strict=True):
            truth = binomtest(int(n), images).proportion_ci(method="wilson")
            assert found[rate][f"{when}_interval"] == pytest.approx([truth.low, truth.high])
    assert found["by_concept"][erased]["erased"]
    assert sum(t["images"] for t in found["by_concept"].values()) == sum(
        found[r]["images"] for r in ("UA", "IRA", "CRA")
    )


def test_a_rate_of_no_pictures_is_not_there():
    questions = Questions.of(CONCEPTS, [("cat",), ("dog",)])
    shown = np.ones((2, 2), bool)
    assert "CRA" not in retention(questions, ("cat",), shown, shown)
    assert "UA" not in retention(questions, ("ink",), shown, shown)


def test_the_matrix_shows_its_counts():
    questions, was, now = answers(5)
    rows = [
        interference_row("nothing", questions, (), was),
        interference_row("erased-ink", questions, ("ink",), now),
    ]
    assert rows[1].seen["cat"] == (int(now[[0, 5], 0].sum()), 2)  # the second also asks for ink
    order = column_order(rows)
    assert order[0] == "ink"
    assert set(order) == set(questions.concepts)
    picture = interference_picture(rows)
    y = picture.height - 110 - CELL[1]  # the last row's
    for number, name in enumerate(order):
        x = MARGIN + LABELS + number * CELL[0]
        inside = picture.getpixel((x + 5, y + 5))  # within the frame, beside the number
        assert inside == tint(lost(rows[1], rows[0], name)), name


def test_loss_is_relative_to_before():
    base = InterferenceRow("nothing", (), {"cat": (3, 4)})
    row = InterferenceRow("dog", ("dog",), {"cat": (1, 4), "dog": (0, 2)})
    assert lost(row, base, "cat") == 0.5
    assert lost(row, None, "cat") == 0.75
    assert lost(base, row, "cat") == 0
    assert interference_picture([]).width > 0
