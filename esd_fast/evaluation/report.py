"""The report of a run: report.json for programs, report.html (one file, no script) for people."""

from __future__ import annotations

import base64
import html
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from . import write_atomically

# report.json lists what people look for first; other keys follow in alphabetical order
KEY_ORDER = (
    *(
        "concept",
        "concepts",
        "erase_from",
        "method",
        "preset",
        "model",
        "family",
        "seed",
        "interrupted",
    ),
    *("erased", "kept", "seconds", "unet_passes", "peak_memory_bytes", "paths_taken", "losses"),
    *("config", "versions", "weights"),
)
# judged on the share of images in which the concept is still recognised
GONE, MOSTLY_GONE = 0.05, 0.20
# and on how much of what was recognised before still is
KEPT, MOSTLY_KEPT = 0.93, 0.80
TONES = ("good", "unknown", "fair", "bad")
TABLE_ROWS, WEIGHT_ROWS = 12, 20
Z95 = 1.959963984540054

PATH_NOTES = {
    "attention": "which implementation computed attention in the UNet",
    "device": "where the UNet ran",
    "dtype": "number format of the weights",
    "graphs": "whether steps were recorded once as CUDA graphs and replayed",
    "cuda_graphs": "whether steps were recorded once as CUDA graphs and replayed",
    "guidance_loss": "target, loss and gradient of the edited UNet's prediction in one pass",
    "kernels": "which implementation computed loss, guidance and normalisation",
    "optimizer": "what moved the weights, and how",
    "memory_format": "how pictures lie in memory; channels_last suits convolutions",
    "scheduler": "how the sampler stepped: from a table, or by calling the scheduler",
    "checkpointing": "whether activations were computed again in the backward pass to save memory",
}


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write report.json and report.html into `folder`; returns the path of report.html.

    Every key of `report` may be missing: its section is then left out. Pictures named
    before_after.png and loss.png in `folder` are embedded, so report.html can be sent alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: plain_data(report[key]) for key in sorted(report, key=_key_rank)}
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a lone surrogate has no UTF-8 form; backslashreplace makes it a JSON escape, which is one
    write_atomically(folder / "report.json", text.encode("utf-8", "backslashreplace"))
    page = render_html(plain, _picture(folder, "before_after.png"), _picture(folder, "loss.png"))
    return write_atomically(folder / "report.html", page.encode("utf-8", "replace"))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a rate; (0, 1) where nothing was counted."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z95 * Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, not 1e-17
    return low, 1.0 if successes == n else min(1.0, centre + half)


def plain_data(value: Any) -> Any:
    """`value` as JSON knows it: non-finite numbers are null, what is unknown becomes its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain_data(item) for item in sorted(value, key=str)]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, torch's tensors
        return plain_data(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, bytes | Path):
        return [plain_data(item) for item in value]
    return str(value)


def _key_rank(key: str) -> tuple[int, str]:
    return (KEY_ORDER.index(key) if key in KEY_ORDER else len(KEY_ORDER), str(key))


# --- HTML: whatever is not Html gets escaped, so that forgetting is impossible -----------------


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`; a child that is not Html is escaped, None is nothing.

    Attribute names lose a trailing underscore (`class_`) and trade others for dashes.
    """
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    opening = "".join(f' {k}="{html.escape(_clean(v))}"' for k, v in pairs.items() if v is not None)
    if name in ("img", "meta"):
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Children one after the other, escaped where they are not Html."""
    return Html(
        "".join(
            c if isinstance(c, Html) else html.escape(_clean(c)) for c in children if c is not None
        )
    )


def _clean(value: object) -> str:
    """Control characters have no place in HTML; tab and line feed do."""
    return "".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in str(value))


def user_text(value: object) -> Html:
    """Text that people wrote: its writing direction must not reorder what surrounds it."""
    return element("bdi", value)


# --- numbers in words --------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number, or None for whatever else a report may hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def data(value: object, shown: str) -> Html:
    """`shown` for people, the exact value in the markup."""
    return element("data", shown, value=value)


def percent(rate: float) -> str:
    """A rate with one decimal where it says something; never 0% or 100% for what only rounds."""
    if 0 < rate < 0.0005:
        return "<0.1%"
    if 0.9995 <= rate < 1:
        return ">99.9%"
    return f"{100 * rate:.1f}".removesuffix(".0") + "%"


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def short(value: float) -> str:
    """Four digits; whole numbers in full."""
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def shown_value(value: Any) -> Html:
    """Any value of a settings table."""
    if value is None:
        return element("span", "none", class_="muted")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    if isinstance(value, int | float):
        return Html(html.escape(str(value)))
    if isinstance(value, Mapping):
        parts = [join((user_text(k), ": ", shown_value(v))) for k, v in value.items()]
        return Html("<br>".join(parts)) if parts else shown_value(None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Html(", ".join(shown_value(item) for item in value)) if value else shown_value(None)
    return user_text(value)


def _mapping(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


# --- the page ----------------------------------------------------------------------------------


def render_html(
    report: Mapping[str, Any], before_after: bytes | None = None, loss: bytes | None = None
) -> str:
    """The page as text; `report` holds plain data, the pictures are PNG bytes."""
    concept = str(report.get("concept", "") or "")
    sections = (
        _headline(report, concept),
        _interrupted(report),
        _cards(report),
        _before_after(before_after),
        _erased_by_concept(report),
        _by_concept(_mapping(_mapping(report, "kept"), "by_concept")),
        _loss(loss, _mapping(report, "losses")),
        _phases(_mapping(report, "seconds")),
        _settings(report),
        _paths_taken(report.get("paths_taken")),
        _weights(report.get("weights")),
        _key_table("Versions", _mapping(report, "versions")),
        _key_table("More", {k: v for k, v in report.items() if k not in KEY_ORDER}),
        element("footer", "Made by esd-fast. report.json beside this file holds the same numbers."),
    )
    head = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # the page needs nothing from anywhere: say so, and the browser holds it to that
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        element("title", f"Erased: {concept}" if concept else "Erasure report"),
        element("style", Html(CSS)),
    )
    page = element(
        "html", element("head", *head), element("body", element("main", *sections)), lang="en"
    )
    return f"<!doctype html>\n{page}\n"


def _section(title: str, *children: object, note: object = None) -> Html:
    caption = element("p", note, class_="note") if note else None
    return element("section", element("h2", title), caption, *children)


def _headline(report: Mapping[str, Any], concept: str) -> Html:
    tone, verdict = verdict_of(report)
    size = "long" if len(concept) > 60 else None
    title = join(("Erased: ", user_text(concept))) if concept else "Erasure report"
    origin = report.get("erase_from")
    facts = [
        join((f"{name} ", element("b", user_text(report[key]))))
        for key, name in (
            *(
                ("model", "model"),
                ("family", "family"),
                ("method", "trained"),
                ("preset", "preset"),
            ),
            ("seed", "seed"),
        )
        if report.get(key) is not None
    ]
    return element(
        "header",
        element("h1", title, class_=size),
        element("p", "erased from ", user_text(origin), class_="from") if origin else None,
        element("p", verdict, class_=f"verdict {tone}"),
        element("p", *(element("span", fact) for fact in facts), class_="facts") if facts else None,
    )


def verdict_of(report: Mapping[str, Any]) -> tuple[str, str]:
    """(tone, sentences): did the concept go, and did the rest stay?"""
    left = _left_of_each(report)
    gone_tone, gone = _gone(*_rates(_mapping(report, "erased")), several=bool(left))
    worst = max(left, key=lambda name: left[name], default="")
    if worst and left[worst] > GONE:
        gone += f" Least gone is {worst}, recognised in {percent(left[worst])}."
        weak = "fair" if left[worst] <= MOSTLY_GONE else "bad"
        gone_tone = max(gone_tone, weak, key=TONES.index)
    kept_tone, kept = _stayed(*_rates(_mapping(report, "kept")))
    return max(gone_tone, kept_tone, key=TONES.index), f"{gone} {kept}".strip()


def _left_of_each(report: Mapping[str, Any]) -> dict[str, float]:
    """Of several erased concepts how often each is recognised afterwards; empty for one."""
    by_concept = _mapping(_mapping(report, "erased"), "by_concept")
    rates = {n: _rates(g)[1] for n, g in by_concept.items() if isinstance(g, Mapping)}
    return {n: r for n, r in rates.items() if r is not None} if len(rates) > 1 else {}


def _rates(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return number(group.get("before")), number(group.get("after"))


def _gone(before: float | None, after: float | None, several: bool = False) -> tuple[str, str]:
    one, many = ("concept is", "it was", "its"), ("concepts are", "they were", "their")
    what, it, its = many if several else one
    if after is None:
        return "unknown", "Not measured: no judge was asked whether the concept is gone."
    was = f", where {it} in {percent(before)} before" if before is not None else ""
    seen = f"recognised in {percent(after)} of {its} images{was}."
    if before is not None and before <= after:
        return "bad", f"Not erased: {seen}"
    if after <= GONE:
        return "good", f"The {what} gone: {seen}"
    if after <= MOSTLY_GONE:
        return "fair", f"The {what} mostly gone: {seen}"
    return "bad", f"The {what} weaker, not gone: {seen}"


def _stayed(before: float | None, after: float | None) -> tuple[str, str]:
    if after is None or not before:
        return "good", ""
    share = percent(min(1.0, after / before))
    if after >= KEPT * before:
        return "good", f"The rest is kept: recognised {share} as often as before."
    if after >= MOSTLY_KEPT * before:
        return "fair", f"Most of the rest is kept: recognised {share} as often as before."
    return "bad", f"The rest suffered: recognised only {share} as often as before."


def _interrupted(report: Mapping[str, Any]) -> Html | None:
    if report.get("interrupted") is not True:
        return None
    message = "This run was interrupted: what follows describes the steps it had made by then."
    return element("p", message, class_="warning")


def _cards(report: Mapping[str, Any]) -> Html | None:
    cards = (
        _rate_card("Erased concept recognised", "erased", _mapping(report, "erased")),
        _rate_card("Kept concepts recognised", "kept", _mapping(report, "kept")),
        _seconds_card(_mapping(report, "seconds")),
        _passes_card(report.get("unet_passes")),
        _memory_card(report.get("peak_memory_bytes")),
    )
    shown = [card for card in cards if card is not None]
    return element("div", *shown, class_="cards") if shown else None


def _card(label: str, big: Html, *details: object, class_: str = "card") -> Html:
    return element(
        "div",
        element("p", label, class_="label"),
        element("p", big, class_="big"),
        *details,
        class_=class_,
    )


def _rate_card(label: str, kind: str, group: Mapping[str, Any]) -> Html | None:
    before, after = _rates(group)
    images = number(group.get("images"))
    rates = [(n, r) for n, r in (("before", before), ("after", after)) if r is not None]
    if not rates:
        return None
    arrow = Html(' <span class="arrow" aria-label="to">→</span> ')
    big = Html(arrow.join(data(rate, percent(rate)) for _, rate in rates))
    bars = [_rate_bar(name, rate, images) for name, rate in rates]
    counted = None
    if images is not None:
        times = " each time" if len(rates) == 2 else ""
        counted = element(
            "p",
            data(group["images"], short(images)),
            f" images{times}; 95% intervals",
            class_="note",
        )
    return _card(label, big, *bars, counted, class_=f"card rate {kind}")


def _rate_bar(name: str, rate: float, images: float | None) -> Html:
    """A bar from 0 to 100% with its Wilson interval as a whisker."""
    rate = min(1.0, max(0.0, rate))
    fill = element("i", class_=f"fill {name}", style=f"width:{100 * rate:.2f}%")
    whisker = interval = None
    if images and images >= 1:
        low, high = wilson_interval(round(rate * int(images)), int(images))
        place = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        whisker = element("i", class_="whisker", style=place)
        interval = element("span", f"{100 * low:.0f} to {100 * high:.0f}%", class_="interval")
    track = element("span", fill, whisker, class_="track")
    return element("p", element("span", name), track, interval, class_="bar")


def _seconds_card(seconds: Mapping[str, Any]) -> Html | None:
    total = number(seconds.get("total"))
    if total is None:
        return None
    return _card("Time", data(seconds["total"], duration(total)), _note("start to end"))


def _passes_card(passes: object) -> Html | None:
    by_phase = passes if isinstance(passes, Mapping) else {"total": passes}
    numbers = {k: n for k, v in by_phase.items() if (n := number(v)) is not None}
    if not numbers:
        return None
    total = numbers.pop("total", None)
    parts = [join((f"{name} ", data(by_phase[name], short(n)))) for name, n in numbers.items()]
    value = sum(numbers.values()) if total is None else total
    detail = element("p", Html(", ".join(parts)), class_="note") if parts else None
    return _card("UNet passes", data(by_phase.get("total", value), short(value)), detail)


def _memory_card(peak: object) -> Html | None:
    size = number(peak)
    if size is None:
        return None
    return _card(
        "Peak memory", data(peak, f"{size / 2**20:,.0f} MiB"), _note("at the highest moment")
    )


def _note(text: str) -> Html:
    return element("p", text, class_="note")


def _picture(folder: Path, name: str) -> bytes | None:
    """The PNG, or None where there is none or it is something else."""
    try:
        content = (folder / name).read_bytes()
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 24 else None


def _image(content: bytes, alt: str) -> Html:
    width, height = struct.unpack(">II", content[16:24])  # IHDR is always first
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return element("img", src=source, alt=alt, width=width, height=height)


def _before_after(content: bytes | None) -> Html | None:
    if content is None:
        return None
    alt = "Grid of pictures: each row is a prompt, before at the left, after at the right"
    note = "The same seeds in the same columns. Tinted rows ask for what was erased."
    return _section("Before and after", element("figure", _image(content, alt)), note=note)


def _erased_by_concept(report: Mapping[str, Any]) -> Html | None:
    """For several alone."""
    left = _left_of_each(report)
    groups = _mapping(_mapping(report, "erased"), "by_concept")
    lines = [
        _concept_row(name, *_rates(groups[name]), groups[name], red=False)
        for name in sorted(left, key=lambda name: -left[name])
    ]
    if not lines:
        return None
    note = "How often each is still recognised, the least gone first."
    return _section("Erased, one by one", *_folded(lines), note=note)


def _by_concept(concepts: Mapping[str, Any]) -> Html | None:
    rows = [(n, *_rates(g), g) for n, g in concepts.items() if isinstance(g, Mapping)]
    if not rows:
        return None
    rows.sort(key=lambda row: _change(row[1], row[2]))
    lines = [_concept_row(name, before, after, group) for name, before, after, group in rows]
    note = (
        "How often each was recognised, the greatest losses first. "
        "Red: more than chance explains (95%)."
    )
    return _section("Kept, one by one", *_folded(lines), note=note)


def _folded(lines: list[Html]) -> tuple[Html, Html | None]:
    """A table of concepts, and the rest of a long one to unfold."""
    head = ("concept", "", "before", "after", "change", "images")
    first, rest = lines[:TABLE_ROWS], lines[TABLE_ROWS:]
    more = _table(head, rest, "numbers")
    hidden = element("details", element("summary", f"{len(rest)} more"), more) if rest else None
    return _table(head, first, "numbers"), hidden


def _change(before: float | None, after: float | None) -> float:
    return math.inf if before is None or after is None else after - before


def _concept_row(
    name: str,
    before: float | None,
    after: float | None,
    group: Mapping[str, Any],
    red: bool = True,
) -> Html:
    change = _change(before, after)
    points = (
        "" if math.isinf(change) else f"{100 * change:+.1f}".removesuffix(".0").replace("-", "−")
    )
    images = number(group.get("images"))
    lost = "lost" if red and _surely_lost(before, after, images) else None
    return element(
        "tr",
        element("th", user_text(name), scope="row"),
        element("td", _rate_track(before, after), class_="wide"),
        *(element("td", None if r is None else data(r, percent(r))) for r in (before, after)),
        element("td", "0" if points in ("+0", "−0") else points, class_=lost),
        element("td", None if images is None else data(group["images"], short(images))),
    )


def _surely_lost(before: float | None, after: float | None, images: float | None) -> bool:
    """Whether Newcombe's 95% interval of the difference of two rates lies below zero."""
    if before is None or after is None or images is None or images < 1:
        return False
    n = int(images)
    if not (0 <= after < before <= 1):
        return False
    low_before, _ = wilson_interval(round(before * n), n)
    _, high_after = wilson_interval(round(after * n), n)
    return before - after > math.hypot(before - low_before, high_after - after)


def _rate_track(before: float | None, after: float | None) -> Html:
    """Both rates on one track: what is left in front, what was behind it."""
    fills = [
        element("i", class_=f"fill {name}", style=f"width:{100 * min(1.0, max(0.0, rate)):.2f}%")
        for name, rate in (("before", before), ("after", after))
        if rate is not None
    ]
    return element("span", *fills, class_="track kept")


def _table(head: Sequence[str], rows: Sequence[Html], class_: str | None = None) -> Html:
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    table = element("table", element("thead", titles), element("tbody", *rows), class_=class_)
    return element("div", table, class_="scroll")


def _loss(content: bytes | None, losses: Mapping[str, Any]) -> Html | None:
    said = [
        join((f"{name} ", data(losses[key], short(value))))
        for key, name in (("first", "first"), ("last", "last"), ("steps", "steps"))
        if (value := number(losses.get(key))) is not None
    ]
    if content is None and not said:
        return None
    figure = None
    if content is not None:
        figure = element("figure", _image(content, "Loss by step"), class_="curve")
    return _section("Loss", figure, note=Html(" · ".join(said)))


def _phases(seconds: Mapping[str, Any]) -> Html | None:
    phases = {k: n for k, v in seconds.items() if k != "total" and (n := number(v)) and n > 0}
    if not phases:
        return None
    total = number(seconds.get("total"))
    if total is not None and (other := total - sum(phases.values())) > 0.005 * total:
        phases["other"] = phases.get("other", 0.0) + other
    whole = sum(phases.values())
    parts = [
        element("i", class_=f"c{index % 6}", style=f"width:{100 * spent / whole:.3f}%")
        for index, spent in enumerate(phases.values())
    ]
    legend = [
        element(
            "li",
            element("i", class_=f"c{index % 6}"),
            user_text(name.replace("_", " ")),
            element("b", data(seconds.get(name, round(spent, 3)), duration(spent))),
            element("span", f"{100 * spent / whole:.0f}%", class_="muted"),
        )
        for index, (name, spent) in enumerate(phases.items())
    ]
    return _section(
        "Where the time went",
        element("div", *parts, class_="phases", aria_hidden="true"),
        element("ul", *legend, class_="legend"),
    )


def _settings(report: Mapping[str, Any]) -> Html | None:
    return _key_table("How it was made", _mapping(report, "config"))


def _key_table(title: str, values: Mapping[str, Any]) -> Html | None:
    if not values:
        return None
    rows = [
        element("div", element("dt", user_text(key)), element("dd", shown_value(value)))
        for key, value in values.items()
    ]
    return _section(title, element("dl", *rows))


def _paths_taken(paths: object) -> Html | None:
    if not isinstance(paths, Mapping) or not paths:
        return None
    rows = [
        element(
            "tr",
            element("th", user_text(name), scope="row"),
            element("td", element("b", shown_value(value))),
            element("td", PATH_NOTES.get(str(name), ""), class_="muted"),
        )
        for name, value in paths.items()
    ]
    note = "What was really used on this machine, not what was asked for."
    return _section("Paths taken", _table(("part", "ran", "what it is"), rows), note=note)


def _weights(weights: object) -> Html | None:
    moves: list[tuple[float, Mapping[str, Any]]] = []
    for item in weights if isinstance(weights, list) else []:
        move = number(item.get("relative_move")) if isinstance(item, Mapping) else None
        if move is not None:
            moves.append((move, item))
    if not moves:
        return None
    moves.sort(key=lambda pair: -pair[0])
    largest = min(moves[0][0], 1.0) or 1.0  # a tensor that was zero moves without bound
    rows = [_weight_row(item, move, largest) for move, item in moves[:WEIGHT_ROWS]]
    count = f"the {len(rows)} of {len(moves)} that moved most" if len(moves) > len(rows) else "all"
    note = f"Length of each tensor's change over the length of the tensor; {count}."
    return _section("Weights moved", _table(("tensor", "moved", ""), rows), note=note)


def _breakable(name: object) -> Html:
    """A dotted name that may be broken after its dots."""
    return Html(user_text(name).replace(".", ".<wbr>"))


def _weight_row(item: Mapping[str, Any], move: float, largest: float) -> Html:
    fill = element(
        "i", class_="fill after", style=f"width:{100 * min(1.0, max(0.0, move / largest)):.2f}%"
    )
    return element(
        "tr",
        element("th", element("code", _breakable(item.get("name", ""))), scope="row"),
        element("td", data(item["relative_move"], f"{100 * move:.3g}%")),
        element("td", element("span", fill, class_="track"), class_="wide"),
    )


CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #16181d; --muted: #5d6573; --line: #e4e7ec; --track: #eceff3;
  --erased: #e11d48; --kept: #0d9488; --before: #a3abb8; --accent: #4f46e5;
  --good: #0f766e; --fair: #a16207; --bad: #be123c; --unknown: #5d6573 }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1014; --card: #171a20; --ink: #eceef2; --muted: #9aa3b2; --line: #2a2f38; --track: #262b34;
  --erased: #fb7185; --kept: #2dd4bf; --before: #6b7484; --accent: #a5b4fc;
  --good: #2dd4bf; --fair: #fbbf24; --bad: #fb7185; --unknown: #9aa3b2 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 56px }
h1, h2, p, dl, dd, ul, figure { margin: 0 }
h1 { font-size: clamp(30px, 6vw, 44px); line-height: 1.12; letter-spacing: -.022em;
  overflow-wrap: anywhere }
h1.long { font-size: 21px; line-height: 1.35; letter-spacing: 0 }
h2 { font-size: 19px; letter-spacing: -.01em }
code { font: 13px/1.4 ui-monospace, "Liberation Mono", Menlo, monospace; overflow-wrap: anywhere }
.muted, .note, .from, footer { color: var(--muted) }
.note { font-size: 14px; margin-top: 2px }
.verdict { margin-top: 14px; padding-left: 14px; border-left: 4px solid var(--tone);
  font-size: 18px; max-width: 60ch }
.good { --tone: var(--good) } .fair { --tone: var(--fair) } .bad { --tone: var(--bad) }
.unknown { --tone: var(--unknown) }
.facts { margin-top: 16px; display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px;
  color: var(--muted) }
.facts b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere }
.warning { margin-top: 20px; padding: 12px 16px; border-radius: 10px; color: var(--fair);
  border: 1px solid currentColor }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 14px }
section { margin-top: 16px; padding: 22px 24px 24px }
section > :last-child:not(h2) { margin-bottom: 0 }
h2 ~ div, h2 ~ dl, h2 ~ ul, figure, details { margin-top: 14px }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 16px; margin-top: 28px }
.card { grid-column: span 2; padding: 18px 22px 20px; min-width: 0 }
.card.rate { grid-column: span 3 }
.label { font-size: 14px; color: var(--muted) }
.big { font-size: 32px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums }
.rate .big { font-size: 40px; margin-bottom: 8px }
.rate .big data:first-child:not(:last-child) { color: var(--muted); font-weight: 500 }
.arrow { color: var(--muted); font-weight: 400 }
.bar { display: grid; grid-template-columns: 52px 1fr 84px; align-items: center; gap: 8px;
  font-size: 14px; color: var(--muted); margin-top: 4px }
.interval { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.track { position: relative; display: block; height: 10px; border-radius: 5px;
  background: var(--track) }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--before);
  min-width: 3px }
.fill.after { background: var(--accent) }
.erased .fill.after { background: var(--erased) } .kept .fill.after { background: var(--kept) }
.numbers .fill.before { opacity: .55 }
.whisker { position: absolute; top: 4px; height: 2px; background: var(--ink); opacity: .55 }
.card .bar + .note { margin-top: 8px }
figure { overflow-x: auto; background: #fff; border-radius: 10px }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 15px }
th, td { text-align: left; padding: 7px 12px 7px 0; border-top: 1px solid var(--line);
  vertical-align: top; font-weight: 400 }
thead th { color: var(--muted); font-size: 13px; border: 0; padding-top: 0 }
tbody th { overflow-wrap: anywhere; min-width: 90px }
tbody tr:first-child > * { border-top-color: var(--line) }
.numbers th:not(:first-child), .numbers td { text-align: right; width: 90px; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.numbers tr > :last-child { padding-right: 0 }
.lost { color: var(--bad); font-weight: 600 }
.numbers td.wide { width: 46%; padding: 0 12px 0 0; vertical-align: middle }
.numbers tbody th { width: 24% }
td.wide { width: 30%; vertical-align: middle; padding-right: 0 }
summary { cursor: pointer; color: var(--muted); font-size: 14px }
b { font-weight: 600 }
dl { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 36px }
dl > div { display: flex; justify-content: space-between; gap: 16px; padding: 6px 0;
  border-top: 1px solid var(--line); font-size: 15px }
dt { color: var(--muted); overflow-wrap: anywhere }
dd { text-align: right; overflow-wrap: anywhere; min-width: 0 }
.phases { display: flex; gap: 2px; height: 14px; border-radius: 7px; overflow: hidden }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 6px 26px; font-size: 15px }
.legend li { display: flex; align-items: center; gap: 8px }
.legend i { width: 10px; height: 10px; border-radius: 3px }
.legend .muted { font-size: 14px }
.c0 { background: #6366f1 } .c1 { background: #14b8a6 } .c2 { background: #f59e0b }
.c3 { background: #ec4899 } .c4 { background: #38bdf8 } .c5 { background: #94a3b8 }
footer { margin-top: 24px; font-size: 13px }
@media (max-width: 640px) {
  main { padding: 28px 14px 40px }
  section { padding: 18px 16px }
  .card { padding: 14px 16px; grid-column: span 3 }
  .card.rate, .card:last-child:nth-child(odd) { grid-column: 1 / -1 }
  .big { font-size: 27px } .rate .big { font-size: 36px }
  dl { grid-template-columns: minmax(0, 1fr) }
  .numbers th:not(:first-child), .numbers td { width: auto; padding-right: 8px }
  figure { margin-left: -10px; margin-right: -10px }
  td.wide, th:empty { display: none }
}
@media print { body { background: none } section, .card { break-inside: avoid } }
"""
