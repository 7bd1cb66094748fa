"""eval.html: what `evaluate` found, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .lines import Line, lines_of
from .markup import Html, data, element, join, user_text
from .page import image, key_table, mapping, page, section, table
from .rates import concept_table, rate_card

CARDS = {
    "UA": "Erased concept not recognised (UA)",
    "IRA": "Same domain recognised (IRA)",
    "CRA": "Other domain recognised (CRA)",
}


def render_evaluation(
    told: Mapping[str, Any], sample: bytes | None, interference: Mapping[str, bytes | None]
) -> str:
    """The page as text; `told` holds plain data, the pictures are PNG bytes."""
    erasures = mapping(told, "erasures")
    concepts = [str(e.get("concept")) for e in erasures.values()]
    title = "Evaluation: " + ", ".join(concepts)
    metrics = mapping(told, "metrics")
    sections: list[Html | None] = [headline(title, told)]
    for name in erasures:
        sections += erasure_sections(name, metrics)
    sections += [
        sample_section(sample),
        *(interference_section(name, content) for name, content in interference.items()),
        detectors(metrics),
        key_table("Not measured", mapping(told, "not_measured")),
        key_table("Pictures", mapping(told, "pictures")),
        *(key_table(f"Erasure {name}", values) for name, values in erasures.items()),
        key_table("Versions", mapping(told, "versions")),
        element("footer", "Made by esd-fast. eval.json beside this file holds the same numbers."),
    ]
    return page(title, sections)


def headline(title: str, told: Mapping[str, Any]) -> Html:
    pictures = mapping(told, "pictures")
    facts = [
        join((f"{key.replace('_', ' ')} ", element("b", user_text(pictures[key]))))
        for key in ("model", "images", "prompts", "num_inference_steps", "guidance_scale", "size")
        if key in pictures
    ]
    return element(
        "header",
        element("h1", user_text(title), class_="long" if len(title) > 60 else None),
        element("p", *(element("span", fact) for fact in facts), class_="facts"),
    )


def erasure_sections(name: str, metrics: Mapping[str, Any]) -> list[Html | None]:
    """Cards of the first recogniser, a table of all metrics, and its concepts one by one."""
    found = {m: mapping(mapping(v, "by_erasure"), name) for m, v in metrics.items()}
    recognised = next((t for t in found.values() if "by_concept" in t and "UA" in t), None)
    sections: list[Html | None] = []
    if recognised is not None:
        cards = [
            rate_card(label, "kept", recognised[rate])
            for rate, label in CARDS.items()
            if rate in recognised
        ]
        sections.append(element("div", *cards, class_=f"cards of{len(cards)}"))
    lines = [line for metric, values in found.items() for line in lines_of(metric, values)]
    rows = [metric_row(line) for line in lines]
    if rows:
        head = ("metric", "of", "before", "after", "images")
        sections.append(section(f"Before and after: {name}", table(head, rows, "metrics")))
    if recognised is not None:
        kept = {c: g for c, g in mapping(recognised, "by_concept").items() if not g.get("erased")}
        sections.append(concept_table(kept))
    return sections


def metric_row(line: Line) -> Html:
    return element(
        "tr",
        element("th", line.metric, scope="row"),
        element("td", user_text(line.of)),
        *(value_cell(line, value) for value in (line.before, line.after)),
        element("td", line.images),
    )


def value_cell(line: Line, value: float | None) -> Html:
    if value is None:
        return element("td")
    interval = line.interval(value)
    return element(
        "td",
        data(value, line.shown(value)),
        element("span", interval, class_="interval") if interval else None,
    )


def sample_section(content: bytes | None) -> Html | None:
    if content is None:
        return None
    alt = "Grid of pictures: a prompt a row, the model and each erasure side by side"
    note = "The same noise in the same columns. Tinted rows ask for what was erased."
    return section("Pictures", element("figure", image(content, alt)), note=note)


def interference_section(name: str, content: bytes | None) -> Html | None:
    if content is None:
        return None
    alt = "Matrix: an erasure a row, a recognised concept a column"
    figure = element("figure", image(content, alt), class_="wide")
    return section(f"Interference, as {name} sees it", figure)


def detectors(metrics: Mapping[str, Any]) -> Html | None:
    said = {
        name: {key: values.get(key) for key in ("detector", "version", "threshold")}
        for name, values in metrics.items()
    }
    return key_table("Detectors", said)
