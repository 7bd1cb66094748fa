"""The interference matrix as a picture: what each erasure does to the recognition of each concept."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .pictures import HAIR, INK, MUTED, WHITE, drawable, font_of, notice, picture_title, wrap
from .retention import InterferenceRow

CELL = (52, 40)
TEXT, SMALL = 20, 17
MARGIN, LABELS, HEADINGS = 28, 230, 230  # pixels around, left of and (at most) above the cells
ROSE = (225, 29, 72)
GREY = "#f3f4f6"


def interference_picture(rows: Sequence[InterferenceRow], title: str = "") -> Image.Image:
    """A row an erasure, a column a recognised concept: in how many percent of the pictures that ask
    for it, and from how many points fewer than before the colour. Framed: meant to be gone.

    A row that erases nothing (`erased` empty) is the model before; without one before is 100%. The
    erased concepts' columns come first, in the order of the rows.
    """
    columns = column_order(rows)
    if not columns:
        return notice(title, "nothing was recognised, or asked for")
    longest = max(font_of(TEXT).getlength(drawable(name)) for name in columns)
    top = MARGIN + (48 if title else 0) + min(HEADINGS, round(longest) + 24)
    width = MARGIN + LABELS + len(columns) * CELL[0] + MARGIN
    canvas = Image.new("RGB", (max(width, 760), top + len(rows) * CELL[1] + 110), WHITE)
    draw = ImageDraw.Draw(canvas)
    if title:
        picture_title(draw, title, MARGIN, MARGIN - 6, canvas.width, 28)
    for number, name in enumerate(columns):
        heading(canvas, name, MARGIN + LABELS + number * CELL[0], top)
    corner = MARGIN + LABELS - 14, top - 16
    draw.text(corner, "erased", fill=MUTED, font=font_of(SMALL), anchor="rm")
    base = next((row for row in rows if not row.erased), None)
    for index, row in enumerate(rows):
        y = top + index * CELL[1]
        row_name(draw, row.name, y)
        for number, name in enumerate(columns):
            cell(draw, row, base, name, (MARGIN + LABELS + number * CELL[0], y))
    legend(draw, MARGIN + LABELS, top + len(rows) * CELL[1] + 26)
    return canvas


def column_order(rows: Sequence[InterferenceRow]) -> list[str]:
    """Of the concepts that any row has pictures of."""
    asked = dict.fromkeys(name for row in rows for name, (_, n) in row.seen.items() if n)
    gone = dict.fromkeys(name for row in rows for name in row.erased if name in asked)
    return [*gone, *(name for name in asked if name not in gone)]


def rate(row: InterferenceRow | None, name: str) -> float | None:
    seen, images = row.seen.get(name, (0, 0)) if row else (0, 0)
    return seen / images if images else None


def lost(row: InterferenceRow, base: InterferenceRow | None, name: str) -> float:
    """How much of the recognition before is lost, 0 to 1."""
    now, was = rate(row, name), rate(base, name)
    return max(0.0, (1.0 if was is None else was) - (now or 0.0))


def cell(
    draw: ImageDraw.ImageDraw,
    row: InterferenceRow,
    base: InterferenceRow | None,
    name: str,
    corner: tuple[int, int],
) -> None:
    x, y = corner
    box = (x, y, x + CELL[0] - 3, y + CELL[1] - 3)
    now = rate(row, name)
    if now is None:
        draw.rectangle(box, fill=GREY)
        return
    share = lost(row, base, name)
    draw.rectangle(box, fill=tint(share))
    if name in row.erased:
        draw.rectangle(box, outline=INK, width=3)
    colour = WHITE if share > 0.55 else INK
    middle = x + (CELL[0] - 3) / 2, y + (CELL[1] - 3) / 2
    draw.text(middle, f"{100 * now:.0f}", fill=colour, font=font_of(SMALL), anchor="mm")


def tint(share: float) -> tuple[int, int, int]:
    """From nearly white to rose."""
    red, green, blue = (round(250 + (end - 250) * share) for end in ROSE)
    return red, green, blue


def row_name(draw: ImageDraw.ImageDraw, name: str, y: int) -> None:
    (line,) = wrap(name, font_of(TEXT), LABELS - 18, 1) or [""]
    place = MARGIN + LABELS - 14, y + (CELL[1] - 3) / 2
    draw.text(place, line, fill=INK, font=font_of(TEXT), anchor="rm")


def heading(canvas: Image.Image, name: str, x: int, bottom: int) -> None:
    """Upwards, from `bottom`."""
    (line,) = wrap(drawable(name), font_of(TEXT), HEADINGS - 14, 1) or [""]
    length = round(font_of(TEXT).getlength(line)) + 8
    strip = Image.new("RGB", (length, CELL[0] - 3), WHITE)
    ImageDraw.Draw(strip).text(
        (4, strip.height / 2), line, fill=INK, font=font_of(TEXT), anchor="lm"
    )
    turned = strip.rotate(90, expand=True)
    canvas.paste(turned, (x, bottom - 6 - turned.height))


def legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    font, steps, width = font_of(SMALL), 50, 4
    draw.text((x, y + 11), "points lost", fill=MUTED, font=font, anchor="lm")
    left = x + 100
    draw.text((left, y + 11), "0", fill=MUTED, font=font, anchor="lm")
    left += 18
    for step in range(steps):
        place = (left + step * width, y, left + (step + 1) * width - 1, y + 22)
        draw.rectangle(place, fill=tint(step / (steps - 1)))
    draw.rectangle((left, y, left + steps * width - 1, y + 22), outline=HAIR)
    left += steps * width + 10
    draw.text((left, y + 11), "100", fill=MUTED, font=font, anchor="lm")
    draw.rectangle((left + 58, y, left + 88, y + 22), outline=INK, width=3)
    draw.text((left + 98, y + 11), "erased", fill=MUTED, font=font, anchor="lm")
    note = "numbers: % of the pictures that ask for the column in which it is recognised"
    draw.text((x, y + 52), note, fill=MUTED, font=font, anchor="lm")
