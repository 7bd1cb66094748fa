"""report.html read back with html.parser, report.json with json, Wilson against scipy."""

import base64
import dataclasses
import json
import math
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from esd_fast.evaluation.eval_page import render_evaluation
from esd_fast.evaluation.intervals import wilson_interval
from esd_fast.evaluation.markup import Html, duration, element, percent
from esd_fast.evaluation.pictures import loss_curve, save_png
from esd_fast.evaluation.report import verdict_of, write_report
from esd_fast.moves import moves_of

REPORT = {
    "versions": {"torch": "2.14.0+cpu", "esd-fast": "0.1.0"},
    "concept": "cat",
    "erase_from": "animal",
    "method": "esd-x",
    "preset": "fast",
    "model": "embedded",
    "family": "sd",
    "seed": 17,
    "seconds": {"total": 71.42, "load": 3.81, "collect": 6.2, "fit": 18.93, "evaluate": 38.6},
    "unet_passes": {"collect": 404, "fit": 408, "total": 812},
    "paths_taken": {"attention": "torch SDPA", "dtype": "bfloat16"},
    "peak_memory_bytes": 1_312_903_168,
    "erased": {"before": 0.984375, "after": 0.015625, "images": 64},
    "kept": {
        "before": 0.9609375,
        "after": 0.921875,
        "images": 128,
        "by_concept": {
            "dog": {"before": 0.96875, "after": 0.90625, "images": 32},
            "car": {"before": 1.0, "after": 0.25, "images": 16},
        },
    },
    "config": {"iterations": 203, "learning_rate": 3e-4, "anchor": None, "train": [1, 2.5]},
    "losses": {"first": 0.08123, "last": 0.007134, "steps": 203},
    "interrupted": False,
    "weights": [{"name": f"up.{i}.to_k.weight", "relative_move": 0.01 * i} for i in range(1, 30)],
}
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style><svg/onload=alert(1)>",
    "a & b &lt;b&gt; &#60;i>",
    "AC/DC \"quoted\" 'too'\nline",
    "חתול \u202e \U0001f431 猫",
    "\ud800 \x00 \x1b[31m",
    "x" * 3000,
]


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and what is never closed."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.open, self.titles = [], "", [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)
            if tag not in ("b", "bdi", "code", "data", "span"):
                self.text += "\n"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.titles.append(data)
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def written(folder, report):
    path = write_report(folder, report)
    assert path == Path(folder) / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page, json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))


def numbers_in(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_is_on_the_page(tmp_path):
    report = REPORT | {"weights": REPORT["weights"][:20]}
    page, data = written(tmp_path, report)
    assert data == report
    exact = {float(v) for tag, attrs in page.elements if tag == "data" for v in [attrs["value"]]}
    words = {w.strip(",") for w in page.text.split()}
    for value in numbers_in(report):
        assert value in exact or str(value) in words, value
    for shown in ("98.4%", "1.6%", "96.1%", "92.2%", "1,252 MiB", "71.4 s", "812", "torch SDPA"):
        assert shown in page.text
    assert "64 images" in page.text
    assert "128 images" in page.text


@pytest.mark.parametrize(
    ("rounds", "tokens", "said"),
    [
        (2, 4, "2 rounds of concept inversion; 4 tokens found and erased as well; 8,000 passes"),
        (1, 1, "1 round of concept inversion; 1 token found and erased as well; 8,000 passes"),
    ],
)
def test_hardening_in_one_line(tmp_path, rounds, tokens, said):
    told = {"hardening": {"rounds": rounds, "unet_passes": 8000}, "extra_concepts": tokens}
    page, _ = written(tmp_path, REPORT | told)
    assert f"{said} of the UNet in all." in page.text
    page, _ = written(tmp_path, REPORT | {"hardening": {"rounds": None}})
    assert "concept inversion" not in page.text


def test_intervals_on_the_page_are_wilsons(tmp_path):
    page, _ = written(tmp_path, REPORT)
    for seen, n in ((63, 64), (1, 64), (123, 128), (118, 128)):
        interval = binomtest(seen, n).proportion_ci(method="wilson")
        assert f"{100 * interval.low:.0f} to {100 * interval.high:.0f}%" in page.text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_any_string_is_text_and_nothing_else(tmp_path, payload):
    plain, _ = written(tmp_path / "plain", REPORT | {"more": {"k": "v"}})
    hostile = REPORT | {
        **dict.fromkeys(("concept", "erase_from", "method", "preset", "model", "family"), payload),
        "paths_taken": {payload: payload, "dtype": payload},
        "config": {payload: payload, "b": [payload], "c": {payload: payload}, "d": 1},
        "versions": {payload: payload, "x": payload},
        "kept": REPORT["kept"]
        | {"by_concept": {payload: REPORT["erased"], "car": REPORT["erased"]}},
        "weights": [{"name": payload, "relative_move": 0.1}, *REPORT["weights"][1:]],
        "seconds": REPORT["seconds"] | {payload: 1.0},
        "unet_passes": REPORT["unet_passes"] | {payload: 1},
        "more": {payload: payload},
    }
    page, data = written(tmp_path / "hostile", hostile)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {tag for tag, _ in plain.elements} | {"br"}
    names = {name for _, attrs in page.elements for name in attrs}
    assert names <= {name for _, attrs in plain.elements for name in attrs}
    seen = payload.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "?")
    assert page.text.count(seen) >= 12
    if "\ud800" not in payload:
        assert data["concept"] == payload


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None), min_size=1, max_size=40))
def test_any_text_comes_back_as_it_was(text):
    page = Page(element("p", text, title=text, data_of=text))
    seen = "".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in text)
    assert page.elements == [("p", {"title": seen, "data-of": seen})]
    assert page.text.removeprefix("\n") == seen
    assert page.open == []


@pytest.mark.parametrize("payload", PAYLOADS)
def test_any_string_is_text_on_the_page_of_an_evaluation(payload):
    def read(text):
        rates = {"UA": {"before": 0.5, "after": 0.25, "images": 4}}
        told = {
            "erasures": {text: {"concept": text, "erased": [text], "file": text}},
            "metrics": {"judge": {"detector": text, "version": text, "by_erasure": {text: rates}}},
            "not_measured": {text: text},
            "pictures": {"model": text, "images": 3, text: text},
            "versions": {text: text},
        }
        return Page(render_evaluation(told, None, {text: None}))

    plain, page = read("cat"), read(payload)
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"br"}
    names = [{name for _, attrs in p.elements for name in attrs} for p in (page, plain)]
    assert names[0] <= names[1]
    assert page.text.count(payload.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")) >= 8


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    save_png(Image.new("RGB", (64, 48), "red"), tmp_path / "before_after.png")
    save_png(loss_curve([1.0, 0.5]), tmp_path / "loss.png")
    page, _ = written(tmp_path, REPORT)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    sources = page.attributes("src") + page.attributes("href")
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    whole = (tmp_path / "report.html").read_text()
    assert "http://" not in whole
    assert "https://" not in whole
    assert "url(" not in whole
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_pictures_are_embedded_whole(tmp_path):
    picture = Image.new("RGB", (64, 48), (10, 200, 30))
    save_png(picture, tmp_path / "before_after.png")
    page, _ = written(tmp_path, REPORT)
    (image,) = [attrs for tag, attrs in page.elements if tag == "img"]
    assert (image["width"], image["height"]) == ("64", "48")
    assert image["alt"]
    content = base64.b64decode(image["src"].partition(",")[2])
    assert content == (tmp_path / "before_after.png").read_bytes()
    assert Image.open(BytesIO(content)).getpixel((5, 5)) == (10, 200, 30)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_left_out(tmp_path, content):
    (tmp_path / "loss.png").write_bytes(content)
    page, _ = written(tmp_path, REPORT)
    assert page.attributes("src") == []


SECTIONS = {
    "kept": "Kept, one by one",
    "losses": "Loss",
    "seconds": "Where the time went",
    "config": "How it was made",
    "paths_taken": "Paths taken",
    "weights": "Weights moved",
    "versions": "Versions",
}


@pytest.mark.parametrize("key", [None, *REPORT])
def test_any_key_may_be_missing(tmp_path, key):
    page, _ = written(tmp_path, {k: v for k, v in REPORT.items() if k != key})
    for name, title in SECTIONS.items():
        assert (title in page.titles) == (name != key)


@pytest.mark.parametrize("key", [k for k in REPORT if k != "concept"])
def test_each_key_alone_is_enough(tmp_path, key):
    page, data = written(tmp_path, {key: REPORT[key]})
    assert data == {key: REPORT[key]}
    assert set(page.titles) & set(SECTIONS.values()) == (
        {SECTIONS[key]} if key in SECTIONS else set()
    )


@pytest.mark.parametrize("value", [None, "text", 3, [], {}, [1], {"a": 1}, math.nan, True])
def test_a_value_of_another_kind_never_stops_the_report(tmp_path, value):
    for key in REPORT:
        written(tmp_path, REPORT | {key: value})
    for group in ("erased", "kept"):
        for key in ("before", "after", "images", "by_concept"):
            written(tmp_path, REPORT | {group: REPORT[group] | {key: value}})


def test_an_empty_report(tmp_path):
    page, data = written(tmp_path / "made" / "for it", {})
    assert data == {}
    assert "Not measured" in page.text


def test_unknown_keys_are_shown_too(tmp_path):
    page, _ = written(tmp_path, {"concept": "cat", "something": "0badc0de"})
    assert "More" in page.titles
    assert "0badc0de" in page.text


def test_the_manifest_is_on_the_page(tmp_path):
    told = {"base_fingerprint": "0badc0de", "resolution": 512}
    page, data = written(tmp_path, REPORT | told)
    assert "Manifest" in page.titles
    for value in ("0badc0de", "512", "embedded", "esd-x", "17", "animal"):
        assert value in page.text
    assert data["base_fingerprint"] == "0badc0de"


def test_weights_are_shown_by_layer_and_tensor(tmp_path):
    before = {f"up.{i}.attn.{k}.weight": torch.full((2, 2), 2.0) for i in (0, 1) for k in "kv"}
    tensors = {n: t + ("up.1" in n) for n, t in before.items()}
    rows = moves_of(tensors, before)
    page, data = written(tmp_path, REPORT | {"weights": rows})
    assert data["weights"] == rows
    assert "8 of 16 values in 4 tensors changed, by 35.4% of their length" in page.text
    for shown in ("up.0.attn", "up.1.attn", "up.1.attn.k.weight", "50%", "0%"):
        assert shown in page.text, shown


def test_interrupted_is_said(tmp_path):
    assert "interrupted" in written(tmp_path, REPORT | {"interrupted": True})[0].text
    assert "interrupted" not in written(tmp_path, REPORT)[0].text


def test_long_lists_are_cut_or_folded(tmp_path):
    concepts = {f"thing {i}": {"before": 1.0, "after": 1 - i / 99, "images": 9} for i in range(48)}
    page, _ = written(tmp_path, REPORT | {"kept": REPORT["kept"] | {"by_concept": concepts}})
    assert page.text.index("thing 47") < page.text.index("thing 3\n")  # greatest loss first
    assert "36 more" in page.text
    assert "up.29.to_k.weight" in page.text
    assert page.text.index("9 more") < page.text.index("up.9.to_k.weight")  # all are there


def test_red_is_for_losses_that_the_images_show(tmp_path):
    concepts = {
        "noise": {"before": 1.0, "after": 0.875, "images": 8},
        "harm": {"before": 1.0, "after": 0.5, "images": 32},
    }
    write_report(tmp_path, {"kept": {"by_concept": concepts}})
    rows = (tmp_path / "report.html").read_text().split("<tr>")
    marked = {name: any(name in row and 'class="lost"' in row for row in rows) for name in concepts}
    assert marked == {"noise": False, "harm": True}


@dataclasses.dataclass
class Setting:
    value: int = 3


def test_json_is_plain_and_never_nan(tmp_path):
    report = {
        "zeta": (1, 2),
        "seed": np.int64(3),
        "erased": {"before": np.float32(0.5), "after": math.nan, "images": 8},
        "losses": {"first": math.inf, "last": -math.inf, "steps": 1},
        "array": np.array([1.0, math.nan]),
        "path": Path("a/b"),
        "names": {"b", "a"},
        "other": Setting(),
        "interrupted": np.bool_(True),
        "concept": "猫",
        7: "a key that is no string",
    }
    page, data = written(tmp_path, report)
    assert data == {
        "concept": "猫",
        "seed": 3,
        "interrupted": True,
        "erased": {"before": 0.5, "after": None, "images": 8},
        "losses": {"first": None, "last": None, "steps": 1},
        "7": "a key that is no string",
        "array": [1.0, None],
        "names": ["a", "b"],
        "other": "Setting(value=3)",
        "path": "a/b",
        "zeta": [1, 2],
    }
    assert list(data) == [*("concept", "seed", "interrupted", "erased", "losses"),
                          *("7", "array", "names", "other", "path", "zeta")]  # fmt: skip
    assert "nan" not in page.text.lower()


def files(folder):
    return [path.name for path in folder.iterdir()]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    write_report(tmp_path, REPORT)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert set(before) == {"report.html", "report.json"}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, {"concept": "dog"})
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


# --- numbers and words


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 400])
def test_wilson_is_scipys(n):
    for seen in range(n + 1):
        expected = binomtest(seen, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(seen, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
        low, high = wilson_interval(seen, n)
        assert 0 <= low <= seen / n <= high <= 1


def test_wilson_at_known_values_and_edges():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
             (1, 29): (0.0061, 0.1718)}  # fmt: skip
    for counts, interval in known.items():
        assert wilson_interval(*counts) == pytest.approx(interval, abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for counts in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(*counts)


def test_percent_never_rounds_to_certainty():
    assert [percent(r) for r in (0, 1, 0.5, 0.984375, 0.0001, 0.99999)] == [
        *("0%", "100%", "50%", "98.4%", "<0.1%", ">99.9%")
    ]


def test_durations():
    assert [duration(s) for s in (0.0123, 3.81, 71.42, 125, 7384)] == [
        *("0.012 s", "3.8 s", "71.4 s", "2 min 5 s", "2 h 3 min")
    ]


@pytest.mark.parametrize(
    ("erased", "kept", "tone", "words"),
    [
        ((0.98, 0.0), (0.96, 0.95), "good", "concept is gone"),
        ((0.98, 0.15), (0.96, 0.95), "fair", "mostly gone"),
        ((0.98, 0.6), (0.96, 0.95), "bad", "weaker, not gone"),
        ((0.98, 0.98), (0.96, 0.96), "bad", "Not erased"),
        ((0.98, 0.0), (0.96, 0.8), "fair", "Most of the rest"),
        ((0.98, 0.0), (0.96, 0.4), "bad", "rest suffered"),
        ((None, None), (None, None), "unknown", "Not measured"),
        ((0.0, 0.0), (0.0, 0.0), "bad", "Not erased"),
        ((None, 0.02), (None, None), "good", "concept is gone"),
    ],
)
def test_verdict(erased, kept, tone, words):
    report = {
        name: {k: v for k, v in zip(("before", "after"), rates, strict=True) if v is not None}
        for name, rates in (("erased", erased), ("kept", kept))
    }
    said = verdict_of(report)
    assert said[0] == tone
    assert words in said[1]


def test_verdict_of_several_is_that_of_the_worst(tmp_path):
    by_concept = {
        "cat": {"before": 1.0, "after": 0.0, "images": 16},
        "<i>cake</i>": {"before": 1.0, "after": 0.125, "images": 16},
        "ink": {"before": 1.0, "after": 0.0, "images": 16},
    }
    erased = {"before": 1.0, "after": 0.0417, "images": 48, "by_concept": by_concept}
    tone, said = verdict_of({"erased": erased})
    assert tone == "fair"
    assert said.startswith("The concepts are gone: recognised in 4.2% of their images")
    assert said.endswith("Least gone is <i>cake</i>, recognised in 12.5%.")
    page = write_report(tmp_path, {"erased": erased}).read_text()
    assert "Erased, one by one" in page
    assert page.index("&lt;i&gt;cake") < page.index("ink</bdi>")
    assert "<i>cake" not in page
    assert 'class="lost"' not in page  # red is for what should have stayed
    one = erased | {"by_concept": {"cat": by_concept["cat"]}}
    assert "Erased, one by one" not in write_report(tmp_path, {"erased": one}).read_text()


def test_elements_escape_what_is_not_markup():
    assert element("p", "<b>", Html("<b>x</b>"), None, 3, title='"<') == (
        '<p title="&quot;&lt;">&lt;b&gt;<b>x</b>3</p>'
    )


def test_preserved_concepts_have_a_card_of_their_own(tmp_path):
    apart = {
        "preserved": {"before": 1.0, "after": 0.9375, "images": 16},
        "not_preserved": {"before": 0.953125, "after": 0.71875, "images": 64},
    }
    told = {"preserved": ["a dog"], "samples_file": {"path": "s.safetensors", "samples": 200}}
    _, plain = written(tmp_path, REPORT | told | {"kept": REPORT["kept"] | apart})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for said in ("Of them preserved", "Of them not preserved", "93.8%", "71.9%", "s.safetensors"):
        assert said in text
    assert plain["preserved"] == ["a dog"]
    written(tmp_path / "x", REPORT)
    assert "Of them" not in (tmp_path / "x" / "report.html").read_text(encoding="utf-8")
