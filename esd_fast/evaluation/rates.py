"""How often things are recognised before and after, as cards, bars and tables of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .intervals import surely_lost, wilson_interval
from .markup import Html, data, element, number, percent, short, user_text
from .page import card, folded, section

TABLE_ROWS = 12
CONCEPT_HEAD = ("concept", "", "before", "after", "change", "images")


def rates_of(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return number(group.get("before")), number(group.get("after"))


def rate_card(label: str, kind: str, group: Mapping[str, Any]) -> Html | None:
    before, after = rates_of(group)
    images = number(group.get("images"))
    rates = [(n, r) for n, r in (("before", before), ("after", after)) if r is not None]
    if not rates:
        return None
    arrow = Html(' <span class="arrow" aria-label="to">→</span> ')
    big = Html(arrow.join(data(rate, percent(rate)) for _, rate in rates))
    bars = [rate_bar(name, rate, images) for name, rate in rates]
    counted = None
    if images is not None:
        times = " each time" if len(rates) == 2 else ""
        counted = element(
            "p",
            data(group["images"], short(images)),
            f" images{times}; 95% intervals",
            class_="note",
        )
    return card(label, big, *bars, counted, class_=f"card rate {kind}")


def rate_bar(name: str, rate: float, images: float | None) -> Html:
    """A bar from 0 to 100% with its Wilson interval as a whisker."""
    rate = min(1.0, max(0.0, rate))
    fill = element("i", class_=f"fill {name}", style=f"width:{100 * rate:.2f}%")
    whisker = interval = None
    if images and images >= 1:
        low, high = wilson_interval(round(rate * int(images)), int(images))
        place = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        whisker = element("i", class_="whisker", style=place)
        interval = interval_of(rate, images)
    track = element("span", fill, whisker, class_="track")
    return element("p", element("span", name), track, interval, class_="bar")


def concept_table(concepts: Mapping[str, Any]) -> Html | None:
    rows = [(n, *rates_of(g), g) for n, g in concepts.items() if isinstance(g, Mapping)]
    if not rows:
        return None
    rows.sort(key=lambda row: change_of(row[1], row[2]))
    lines = [concept_row(name, before, after, group) for name, before, after, group in rows]
    note = (
        "How often each was recognised, with 95% intervals, the greatest losses first. "
        "Red: more than chance explains."
    )
    return section(
        "Kept, one by one", *folded(CONCEPT_HEAD, lines, TABLE_ROWS, "numbers"), note=note
    )


def change_of(before: float | None, after: float | None) -> float:
    return math.inf if before is None or after is None else after - before


def concept_row(
    name: str,
    before: float | None,
    after: float | None,
    group: Mapping[str, Any],
    red: bool = True,
) -> Html:
    change = change_of(before, after)
    points = (
        "" if math.isinf(change) else f"{100 * change:+.1f}".removesuffix(".0").replace("-", "−")
    )
    images = number(group.get("images"))
    lost = "lost" if red and surely_lost(before, after, images) else None
    return element(
        "tr",
        element("th", user_text(name), scope="row"),
        element("td", rate_track(before, after), class_="wide"),
        *(rate_cell(rate, images) for rate in (before, after)),
        element("td", "0" if points in ("+0", "−0") else points, class_=lost),
        element("td", None if images is None else data(group["images"], short(images))),
    )


def rate_cell(rate: float | None, images: float | None) -> Html:
    if rate is None:
        return element("td")
    return element("td", data(rate, percent(rate)), interval_of(rate, images))


def interval_of(rate: float, images: float | None) -> Html | None:
    """ "94 to 99%", Wilson's 95% interval; None where it is not known of how many."""
    if not images or images < 1 or not 0 <= rate <= 1:
        return None
    low, high = wilson_interval(round(rate * int(images)), int(images))
    return element("span", f"{100 * low:.0f} to {100 * high:.0f}%", class_="interval")


def rate_track(before: float | None, after: float | None) -> Html:
    """Both rates on one track: what is left in front, what was behind it."""
    fills = [
        element("i", class_=f"fill {name}", style=f"width:{100 * min(1.0, max(0.0, rate)):.2f}%")
        for name, rate in (("before", before), ("after", after))
        if rate is not None
    ]
    return element("span", *fills, class_="track kept")
