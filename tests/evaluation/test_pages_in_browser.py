"""Reports as a browser shows them, at the width of a desk and of a telephone."""

import numpy as np
import pytest
from PIL import Image

from esd_fast.evaluation.drawn import Drawn, DrawnFolder, DrawnPicture
from esd_fast.evaluation.evaluate import evaluate, write_evaluation
from esd_fast.evaluation.metrics import Result, Subject
from esd_fast.evaluation.pictures import GridRow, before_after_grid, loss_curve, save_png
from esd_fast.evaluation.report import write_report
from esd_fast.evaluation.retention import interference_row, retention

from .browser import measured, needs_chromium, screenshot
from .test_report import REPORT

pytestmark = needs_chromium
LONG = "a very long name of a concept in " + "w" * 80


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tiles = [Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")]
    save_png(
        before_after_grid([GridRow(LONG, "erased", tiles, tiles)]), folder / "before_after.png"
    )
    save_png(loss_curve(np.geomspace(1, 0.01, 50)), folder / "loss.png")
    more = {"config": REPORT["config"] | {LONG: LONG}, "interrupted": True, "erase_from": LONG}
    return write_report(folder, REPORT | more)


class Asked:
    """A metric that needs no network."""

    def measure(self, subject, _):
        questions = subject.questions
        shown = questions.asks.copy()
        rows = [interference_row("nothing", questions, (), shown)]
        tables = {}
        for folder in subject.drawn.erased:
            erased = subject.erased[folder.name]
            now = shown & ~np.array([c in erased for c in questions.concepts])
            tables[folder.name] = retention(questions, erased, shown, now)
            rows.append(interference_row(folder.name, questions, erased, now))
        told = {"detector": LONG, "version": "1", "threshold": 0.5}
        return Result(told, tables, tuple(rows))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    concepts = {f"thing {i}": "object" for i in range(40)} | {LONG: "style"}
    pictures = [DrawnPicture(f"{i}.png", name) for i, name in enumerate(concepts)]
    for name in ("base", "one", "two"):
        (folder / name).mkdir()
        for number, picture in enumerate(pictures):
            colour = (number * 6, 200, 90)
            save_png(Image.new("RGB", (64, 64), colour), folder / name / picture.name)
    erased = [
        DrawnFolder(folder / n, {"erased_concept": c})
        for n, c in (("one", "thing 1"), ("two", LONG))
    ]
    drawn = Drawn(tuple(pictures), DrawnFolder(folder / "base", {"model": LONG}), tuple(erased))
    subject = Subject.of(drawn, concepts)
    told, rows = evaluate(subject, {"asked": Asked()}, {"fid": LONG}, lambda _: lambda *_: None)
    return write_evaluation(folder, subject, told, rows)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["report", "evaluation"])
def test_page_fits_and_shows_everything(which, width, profile, request):
    page = request.getfixturevalue(which)
    found = measured(page, width, profile)
    assert not found["sticking_out"]
    assert found["width"] <= width
    assert found["widest"] == "1020px"  # the style is in force
    assert not found["flat"]
    assert all(
        complete and natural > 100 and shown > 100 for complete, natural, shown in found["pictures"]
    )
    titles = {
        "report": [
            "Before and after",
            "Kept, one by one",
            "Loss",
            "Manifest",
            "Weights moved",
            "Versions",
        ],
        "evaluation": [
            "Before and after: one",
            "Kept, one by one",
            "Interference, as asked sees it",
        ],
    }[which]
    assert set(titles) <= set(found["titles"])
    assert len(found["pictures"]) == 2


def test_page_is_not_blank(report, profile):
    shown = Image.open(screenshot(report, 1280, 1600, profile)).convert("RGB")
    assert len(shown.getcolors(1 << 24)) > 100
    assert shown.getpixel((5, 5)) == (246, 247, 249)
