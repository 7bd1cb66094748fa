"""The report of a run: report.json for programs, report.html (one file, no script) for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esd_fast.moves import by_layer, together

from .markup import (
    Html,
    data,
    duration,
    element,
    join,
    number,
    percent,
    short,
    shown_value,
    user_text,
)
from .page import (
    card,
    folded,
    image,
    key_table,
    mapping,
    note_line,
    page,
    picture,
    plain_data,
    section,
    table,
    write_pair,
)
from .rates import CONCEPT_HEAD, TABLE_ROWS, concept_row, concept_table, rate_card, rates_of

# report.json lists what people look for first; other keys follow in alphabetical order
KEY_ORDER = (
    *(
        "concept",
        "concepts",
        "erase_from",
        "preserved",
        "method",
        "preset",
        "model",
        "base_fingerprint",
    ),
    *("family", "seed", "resolution", "interrupted"),
    *("erased", "kept", "seconds", "unet_passes", "peak_memory_bytes", "paths_taken", "losses"),
    *("config", "versions", "weights"),
)
# judged on the share of images in which the concept is still recognised
GONE, MOSTLY_GONE = 0.05, 0.20
# and on how much of what was recognised before still is
KEPT, MOSTLY_KEPT = 0.93, 0.80
TONES = ("good", "unknown", "fair", "bad")
WEIGHT_ROWS, MOVE_HEAD = 20, ("moved", "")
MOVE_NOTE = "Moved: length of the change over the length of what was there."
MEASURED = {"length", "size", "new_size", "weights", "moved", "moved_here"}

MANIFEST = {
    "concept": "erased",
    "erase_from": "erased from",
    "model": "base model",
    "base_fingerprint": "base hash (of the weights that train)",
    "base_digest": "base hash (UNet, text encoders, scheduler)",
    "result_fingerprint": "hash of the result",
    "family": "family",
    "preserved": "preserved",
    "method": "method",
    "preset": "preset",
    "seed": "seed",
    "resolution": "resolution",
    "threads": "threads",
    "processor": "processor",
}
PATH_NOTES = {
    "attention": "which implementation computed attention in the UNet",
    "device": "where the UNet ran",
    "dtype": "number format of the weights",
    "graphs": "whether steps were recorded once as CUDA graphs and replayed",
    "cuda_graphs": "whether steps were recorded once as CUDA graphs and replayed",
    "guidance_loss": "target, loss and gradient of the edited UNet's prediction in one pass",
    "kernels": "which implementation computed loss, guidance and normalisation",
    "optimizer": "what moved the weights, and how",
    "quantize": "how the frozen weights were stored while the edit was trained",
    "memory_format": "how pictures lie in memory; channels_last suits convolutions",
    "scheduler": "how the sampler stepped: from a table, or by calling the scheduler",
    "other_networks": "text encoders and VAE, which the training itself does not need",
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
    page = render_html(plain, picture(folder, "before_after.png"), picture(folder, "loss.png"))
    return write_pair(folder, "report", plain, page)


def _key_rank(key: str) -> tuple[int, str]:
    return (KEY_ORDER.index(key) if key in KEY_ORDER else len(KEY_ORDER), str(key))


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
        _hardening(report),
        _before_after(before_after),
        _erased_by_concept(report),
        concept_table(mapping(mapping(report, "kept"), "by_concept")),
        _loss(loss, mapping(report, "losses")),
        _phases(mapping(report, "seconds")),
        _manifest(report),
        _settings(report),
        _paths_taken(report.get("paths_taken")),
        _weights(report.get("weights")),
        key_table("Versions", mapping(report, "versions")),
        key_table("More", {k: v for k, v in report.items() if k not in KEY_ORDER}),
        element("footer", "Made by esd-fast. report.json beside this file holds the same numbers."),
    )
    return page(f"Erased: {concept}" if concept else "Erasure report", sections)


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
    gone_tone, gone = _gone(*rates_of(mapping(report, "erased")), several=bool(left))
    worst = max(left, key=lambda name: left[name], default="")
    if worst and left[worst] > GONE:
        gone += f" Least gone is {worst}, recognised in {percent(left[worst])}."
        weak = "fair" if left[worst] <= MOSTLY_GONE else "bad"
        gone_tone = max(gone_tone, weak, key=TONES.index)
    kept_tone, kept = _stayed(*rates_of(mapping(report, "kept")))
    return max(gone_tone, kept_tone, key=TONES.index), f"{gone} {kept}".strip()


def _left_of_each(report: Mapping[str, Any]) -> dict[str, float]:
    """Of several erased concepts how often each is recognised afterwards; empty for one."""
    by_concept = mapping(mapping(report, "erased"), "by_concept")
    rates = {n: rates_of(g)[1] for n, g in by_concept.items() if isinstance(g, Mapping)}
    return {n: r for n, r in rates.items() if r is not None} if len(rates) > 1 else {}


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
        rate_card("Erased concept recognised", "erased", mapping(report, "erased")),
        rate_card("Kept concepts recognised", "kept", mapping(report, "kept")),
        rate_card("Of them preserved", "kept", mapping(mapping(report, "kept"), "preserved")),
        rate_card(
            "Of them not preserved", "kept", mapping(mapping(report, "kept"), "not_preserved")
        ),
        _seconds_card(mapping(report, "seconds")),
        _passes_card(report.get("unet_passes")),
        _memory_card(report.get("peak_memory_bytes")),
    )
    shown = [card for card in cards if card is not None]
    return element("div", *shown, class_="cards") if shown else None


def _seconds_card(seconds: Mapping[str, Any]) -> Html | None:
    total = number(seconds.get("total"))
    if total is None:
        return None
    return card("Time", data(seconds["total"], duration(total)), note_line("start to end"))


def _passes_card(passes: object) -> Html | None:
    by_phase = passes if isinstance(passes, Mapping) else {"total": passes}
    numbers = {k: n for k, v in by_phase.items() if (n := number(v)) is not None}
    if not numbers:
        return None
    total = numbers.pop("total", None)
    parts = [join((f"{name} ", data(by_phase[name], short(n)))) for name, n in numbers.items()]
    value = sum(numbers.values()) if total is None else total
    detail = element("p", Html(", ".join(parts)), class_="note") if parts else None
    return card("UNet passes", data(by_phase.get("total", value), short(value)), detail)


def _memory_card(peak: object) -> Html | None:
    size = number(peak)
    if size is None:
        return None
    return card(
        "Peak memory", data(peak, f"{size / 2**20:,.0f} MiB"), note_line("at the highest moment")
    )


def _hardening(report: Mapping[str, Any]) -> Html | None:
    """The passes of the cards are the last erasure's alone."""
    told, tokens = mapping(report, "hardening"), report.get("extra_concepts")
    facts = ((told.get("rounds"), "round"), (tokens, "token"), (told.get("unet_passes"), "pass"))
    shown = [
        data(value, counted(n, thing)) for value, thing in facts if (n := number(value)) is not None
    ]
    if len(shown) < len(facts):
        return None
    rounds, learnt, passes = shown
    note = join((rounds, " of concept inversion; ", learnt, " found and erased as well; "))
    return section("Hardening", note=join((note, passes, " of the UNet in all.")))


def counted(count: float, thing: str) -> str:
    plural = thing + ("es" if thing.endswith("s") else "s")
    return f"{short(count)} {thing if count == 1 else plural}"


def _before_after(content: bytes | None) -> Html | None:
    if content is None:
        return None
    alt = "Grid of pictures: each row is a prompt, before at the left, after at the right"
    note = "The same seeds in the same columns. Tinted rows ask for what was erased."
    return section("Before and after", element("figure", image(content, alt)), note=note)


def _erased_by_concept(report: Mapping[str, Any]) -> Html | None:
    """For several alone."""
    left = _left_of_each(report)
    groups = mapping(mapping(report, "erased"), "by_concept")
    lines = [
        concept_row(name, *rates_of(groups[name]), groups[name], red=False)
        for name in sorted(left, key=lambda name: -left[name])
    ]
    if not lines:
        return None
    note = "How often each is still recognised, the least gone first."
    return section(
        "Erased, one by one", *folded(CONCEPT_HEAD, lines, TABLE_ROWS, "numbers"), note=note
    )


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
        figure = element("figure", image(content, "Loss by step"), class_="curve")
    return section("Loss", figure, note=Html(" · ".join(said)))


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
    return section(
        "Where the time went",
        element("div", *parts, class_="phases", aria_hidden="true"),
        element("ul", *legend, class_="legend"),
    )


def _manifest(report: Mapping[str, Any]) -> Html | None:
    """What one must have to do it again, or to know what the file belongs to."""
    known = {name: report[key] for key, name in MANIFEST.items() if key in report}
    return key_table("Manifest", known)


def _settings(report: Mapping[str, Any]) -> Html | None:
    return key_table("How it was made", mapping(report, "config"))


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
    return section("Paths taken", table(("part", "ran", "what it is"), rows), note=note)


def _weights(weights: object) -> Html | None:
    items = [w for w in weights if isinstance(w, Mapping)] if isinstance(weights, list) else []
    moved = [w for w in items if number(w.get("relative_move")) is not None]
    if not moved:
        return None
    tensors = _move_rows(moved)
    if any(number(w.get(key)) is None for w in moved for key in MEASURED):  # an earlier version's
        return section(
            "Weights moved", *folded(("tensor", *MOVE_HEAD), tensors, WEIGHT_ROWS), note=MOVE_NOTE
        )
    whole = together(moved)
    said = join(
        (
            data(whole["moved"], short(whole["moved"])),
            " of ",
            data(whole["weights"], short(whole["weights"])),
            f" values in {len(moved)} tensors changed, by ",
            data(whole["relative_move"], f"{100 * whole['relative_move']:.3g}%"),
            f" of their length. {MOVE_NOTE}",
        )
    )
    layers = folded(("layer", *MOVE_HEAD), _move_rows(by_layer(moved)), WEIGHT_ROWS)
    each = element(
        "details",
        element("summary", f"Each of the {len(moved)} tensors"),
        table(("tensor", *MOVE_HEAD), tensors),
    )
    return section("Weights moved", *layers, each, note=said)


def _move_rows(items: Sequence[Mapping[str, Any]]) -> list[Html]:
    """The farthest first."""
    moves = sorted(((float(item["relative_move"]), item) for item in items), key=lambda p: -p[0])
    largest = min(moves[0][0], 1.0) or 1.0  # a tensor that was zero moves without bound
    return [_weight_row(item, move, largest) for move, item in moves]


def breakable(name: object) -> Html:
    """A dotted name that may be broken after its dots."""
    return Html(user_text(name).replace(".", ".<wbr>"))


def _weight_row(item: Mapping[str, Any], move: float, largest: float) -> Html:
    fill = element(
        "i", class_="fill after", style=f"width:{100 * min(1.0, max(0.0, move / largest)):.2f}%"
    )
    return element(
        "tr",
        element("th", element("code", breakable(item.get("name", ""))), scope="row"),
        element("td", data(item["relative_move"], f"{100 * move:.3g}%")),
        element("td", element("span", fill, class_="track"), class_="wide"),
    )
