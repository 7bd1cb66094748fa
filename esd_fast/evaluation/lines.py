"""The numbers of an evaluation as lines of a table: for the screen and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .intervals import wilson_interval
from .markup import number, percent, short

RATES = {
    "UA": "erased, not recognised",
    "IRA": "kept, same domain",
    "CRA": "kept, other domain",
}


@dataclass(frozen=True)
class Line:
    """One number before and after; a distance between both stands in `after` alone."""

    metric: str
    of: str
    before: float | None
    after: float | None
    images: str
    is_rate: bool = False
    count: int | None = None  # of a rate: pictures

    def shown(self, value: float | None) -> str:
        if value is None:
            return ""
        return percent(value) if self.is_rate else short(value)

    def interval(self, value: float | None) -> str:
        """ "94 to 99%", Wilson's 95% interval of a rate."""
        if not self.is_rate or value is None or not self.count:
            return ""
        low, high = wilson_interval(round(value * self.count), self.count)
        return f"{100 * low:.0f} to {100 * high:.0f}%"


def lines_of(metric: str, values: Mapping[str, Any]) -> list[Line]:
    """Of one metric's table for one erasure."""
    if "skipped" in values:
        return [Line(metric, f"skipped: {values['skipped']}", None, None, "")]
    lines = [rate_line(metric, name, values[name]) for name in RATES if name in values]
    lines += [
        line(metric, f"score of {group} pictures", score, score)
        for group, score in values.get("score", {}).items()
    ]
    if "UA" not in values and "by_class" in values:
        classes = values["by_class"].items()
        lines += [line(metric, name, counts, values) for name, counts in classes]
        if not classes:
            lines.append(Line(metric, "detections", 0, 0, images_of(values)))
    return lines + distance_lines(metric, values)


def rate_line(metric: str, name: str, group: Mapping[str, Any]) -> Line:
    before, after = number(group.get("before")), number(group.get("after"))
    count = int(group["images"])
    return Line(metric, f"{name}: {RATES[name]}", before, after, str(count), True, count)


def line(metric: str, of: str, group: Mapping[str, Any], counted: Mapping[str, Any]) -> Line:
    before, after = number(group.get("before")), number(group.get("after"))
    return Line(metric, of, before, after, images_of(counted))


def distance_lines(metric: str, values: Mapping[str, Any]) -> list[Line]:
    """LPIPS of pairs, FID and KID of sets; those of both sets to a reference are one line."""
    if "before" in values:
        was, now = values["before"], values["after"]
        return [Line(metric, "kept, to the reference", was["value"], now["value"], images_of(now))]
    names = {"erased": "erased, before to after", "kept": "kept, before to after"}
    return [
        Line(metric, names.get(group, group), None, distance["value"], images_of(distance))
        for group, distance in values.items()
        if isinstance(distance, Mapping) and "value" in distance
    ]


def images_of(group: Mapping[str, Any]) -> str:
    images = group.get("images", "")
    return " and ".join(map(str, images)) if isinstance(images, list) else str(images)


def as_text(lines: Iterable[Line]) -> str:
    """Columns that line up."""
    rows = [["metric", "of", "before", "after", "images"]]
    for each in lines:
        cells = (
            f"{each.shown(v)} ({each.interval(v)})" if each.interval(v) else each.shown(v)
            for v in (each.before, each.after)
        )
        rows.append([each.metric, each.of, *cells, each.images])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
