"""Pictures of a run: grids, the loss curve, PNG files. Pillow and numpy only."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from esd_fast.terminal import one_line

from . import write_atomically

WHITE, INK, MUTED, HAIR = "#ffffff", "#16181d", "#6b7280", "#e5e7eb"
KIND_COLOURS = {"erased": "#be123c", "kept": "#0f766e", "style": "#6d28d9"}
ERASED_BAND = "#fff1f2"
SMALLEST, LARGEST = 128, 256  # pixels of a tile's longer side
MOST_PIXELS = 2**26  # of a picture that is read
README_WIDTH = 1000  # text is sized to be read when the picture is shown this wide
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class GridRow:
    """One prompt of a before/after grid: pictures of the same seeds, without and with the edit."""

    label: str
    kind: str  # "erased", "kept" or "style"
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


# --- before/after grid -------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonRow:
    """One prompt drawn several ways: a block of pictures for each, of the same seeds."""

    label: str
    kind: str  # as a GridRow's; anything else is a note below the label
    blocks: Sequence[Sequence[Image.Image]]


def before_after_grid(rows: Sequence[GridRow], title: str = "") -> Image.Image:
    """One row a prompt, "before" at the left and "after" at the right, one seed a column."""
    both = [ComparisonRow(row.label, row.kind, (row.before, row.after)) for row in rows]
    return comparison_grid(both, ("before", "after"), title)


def comparison_grid(
    rows: Sequence[ComparisonRow], headings: Sequence[str], title: str = ""
) -> Image.Image:
    """One row a prompt, one block a heading, one seed a column of each block."""
    if not rows:
        return notice(title, "no pictures")
    tiles = [[[tile(p) for p in block] for block in row.blocks] for row in rows]
    layout = _GridLayout.of(tiles, len(headings), bool(title))
    canvas = Image.new("RGB", (layout.width, layout.height(len(rows))), WHITE)
    draw = ImageDraw.Draw(canvas)
    if title:
        picture_title(draw, title, layout.margin, layout.margin, layout.width, layout.title_size)
    for number, heading in enumerate(headings):
        _block_heading(draw, heading, layout.block_x(number), layout)
    for index, (row, blocks) in enumerate(zip(rows, tiles, strict=True)):
        y = layout.row_y(index)
        _row_background(draw, row.kind, index, y, layout)
        _row_label(draw, row.label, row.kind, y, layout)
        for number, block in enumerate(blocks):
            for column, picture in enumerate(block):
                corner = layout.block_x(number) + column * layout.pitch, y
                _paste(canvas, picture, corner, layout.cell)
    return canvas


@dataclass(frozen=True)
class _GridLayout:
    """Where things are, in pixels."""

    cell: tuple[int, int]
    blocks: int
    columns: int  # of a block
    scale: float  # how much the picture exceeds README_WIDTH: text grows with it
    titled: bool

    @classmethod
    def of(
        cls, tiles: Sequence[Sequence[Sequence[Image.Image]]], blocks: int, titled: bool
    ) -> _GridLayout:
        each = [block for row in tiles for block in row]
        sizes = [picture.size for block in each for picture in block] or [(SMALLEST, SMALLEST)]
        cell = max(w for w, _ in sizes), max(h for _, h in sizes)
        columns = max(1, *(len(block) for block in each), 1)
        # the pictures take about 82% of the width
        scale = max(1.0, blocks * columns * cell[0] / (0.82 * README_WIDTH))
        return cls(cell, blocks, columns, scale, titled)

    def px(self, pixels: float) -> int:
        return round(pixels * self.scale)

    @property
    def margin(self) -> int:
        return self.px(14)

    @property
    def title_size(self) -> int:
        return self.px(20)

    @property
    def text_size(self) -> int:
        return self.px(15)

    @property
    def label_width(self) -> int:
        return self.px(138)

    @property
    def pitch(self) -> int:
        return self.cell[0] + self.px(5)

    @property
    def block_width(self) -> int:
        return self.columns * self.pitch - self.px(5)

    def block_x(self, number: int) -> int:
        first = self.margin + self.label_width + self.px(12)
        return first + number * (self.block_width + self.px(24))

    @property
    def width(self) -> int:
        return self.block_x(self.blocks - 1) + self.block_width + self.margin

    @property
    def heading_y(self) -> int:
        return self.margin + (self.px(38) if self.titled else 0)

    def row_y(self, index: int) -> int:
        return self.heading_y + self.px(36) + index * (self.cell[1] + self.px(14))

    def height(self, rows: int) -> int:
        return self.row_y(rows) + self.margin - self.px(7)


def _block_heading(draw: ImageDraw.ImageDraw, name: str, x: int, layout: _GridLayout) -> None:
    font = font_of(layout.text_size)
    for line in wrap(name, font, layout.block_width, 1):
        draw.text((x, layout.heading_y), line, fill=INK, font=font)


def _row_background(
    draw: ImageDraw.ImageDraw, kind: str, index: int, y: int, layout: _GridLayout
) -> None:
    left, right = layout.margin // 2, layout.width - layout.margin // 2
    top, bottom = y - layout.px(7), y + layout.cell[1] + layout.px(7) - 1
    if kind == "erased":
        draw.rectangle((left, top, right, bottom), fill=ERASED_BAND)
        draw.rectangle((left, top, left + layout.px(3), bottom), fill=KIND_COLOURS["erased"])
    elif index:
        draw.line((left, top, right, top), fill=HAIR, width=max(1, layout.px(1)))


def _row_label(
    draw: ImageDraw.ImageDraw, label: str, note: str, y: int, layout: _GridLayout
) -> None:
    font, small = font_of(layout.text_size), font_of(layout.px(13))
    step = round(layout.text_size * 1.3)
    fitting = max(1, layout.cell[1] // step - 1)
    lines = wrap(label, font, layout.label_width, min(5, fitting)) or ["(empty prompt)"]
    kind = wrap(note, small, layout.label_width, 1)
    x = layout.margin + layout.px(4)
    top = y + (layout.cell[1] - step * (len(lines) + len(kind))) // 2
    for number, line in enumerate(lines):
        draw.text((x, top + number * step), line, fill=INK, font=font)
    for line in kind:
        colour = KIND_COLOURS.get(note, MUTED)
        draw.text((x, top + len(lines) * step + layout.px(1)), line, fill=colour, font=small)


# --- loss curve --------------------------------------------------------------------------------

CURVE_SIZE = (1600, 560)  # shown half as large: crisp on dense screens
SUPERSAMPLE = 3
LOG_RANGE = 30  # a linear axis hides what happens below a thirtieth of its height
RAW, SMOOTH = "#c7d2fe", "#4338ca"


def loss_curve(losses: Sequence[float], title: str = "") -> Image.Image:
    """Loss by step: every value as a light line, their running mean as a strong one.

    The axis is logarithmic where the values span more than a factor of 30. Values that are not
    finite leave a gap, and a note says how many there are.
    """
    values = np.asarray(losses, dtype=np.float64).reshape(-1)
    finite = np.isfinite(values)
    if not finite.any():
        return notice(title, "no finite loss was recorded" if values.size else "no loss recorded")
    axis = _ValueAxis.of(values[finite])
    heights = axis.positions(values)  # 0 at the bottom, 1 at the top
    widest = max((font_of(24).getlength(label) for _, label in axis.ticks), default=0)
    box = (round(widest) + 52, 84 if title else 44, CURVE_SIZE[0] - 36, CURVE_SIZE[1] - 84)
    canvas = _curve_lines(heights, axis, box)
    draw = ImageDraw.Draw(canvas)
    if title:
        picture_title(draw, title, 36, 24, CURVE_SIZE[0], 32)
    _curve_text(draw, axis, box, values.size)
    if lost := int(values.size - finite.sum()):
        note = f"{lost:,} of {values.size:,} values not finite"
        draw.text((box[2], box[1] - 32), note, fill="#be123c", font=font_of(24), anchor="ra")
    return canvas


@dataclass(frozen=True)
class _ValueAxis:
    """The vertical axis; `low`, `high` and the ticks are logarithms where `log` is set."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, values: np.ndarray) -> _ValueAxis:
        values = np.clip(values, -1e300, 1e300)  # so that differences stay finite
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low > LOG_RANGE:
            ticks = _log_ticks(low, high)
            low, high = math.log10(low), math.log10(high)
            edge = 0.04 * (high - low)
            return cls(low - edge, high + edge, True, ticks)
        if low == high:
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        elif 0 < low < high / 2:
            low = 0.0
        top = high + 0.04 * (high - low)
        bottom = low if low == 0 else low - 0.04 * (high - low)
        return cls(bottom, top, False, _linear_ticks(bottom, top))

    def positions(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.log10(values) if self.log else np.clip(values, -1e300, 1e300)
            place = (scaled - self.low) / (self.high - self.low)
        return np.where(np.isfinite(values), place, np.nan)


def _linear_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    step = _round_step((high - low) / 4.5)
    first, last = math.ceil(low / step), math.floor(high / step)
    return tuple((i * step, _tick_label(i * step, step)) for i in range(first, last + 1))


def _round_step(raw: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next((f * power for f in (1, 2, 5) if f * power >= raw), 10 * power)


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 7))
    factors = (1, 3) if last - first <= 4 else (1,)
    ticks = [(p, f) for p in range(first, last + 1) if p % every == 0 for f in factors]
    inside = [(p + math.log10(f), p, f) for p, f in ticks]
    return tuple(
        (place, _tick_label(f * 10.0**p, 10.0**p))
        for place, p, f in inside
        if math.log10(low) - 0.1 <= place <= math.log10(high) + 0.1
    )


def _tick_label(value: float, step: float) -> str:
    largest = max(abs(value), step)
    if 1e-4 <= largest < 1e6:
        return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    digits = min(6, max(0, math.ceil(math.log10(largest / step) - 1e-9)))
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a thirtieth of the run, twice; gaps stay gaps."""
    half = max(1, len(values) // 60) if len(values) >= 8 else 0
    known = np.isfinite(values)
    starts = np.maximum(np.arange(len(values)) - half, 0)
    stops = np.minimum(np.arange(len(values)) + half + 1, len(values))
    smooth = values
    for _ in range(2):  # two boxes make a triangle: no corner where an outlier leaves the window
        total = np.concatenate(([0.0], np.cumsum(np.where(known, smooth, 0.0))))
        count = np.concatenate(([0], np.cumsum(known)))
        within = np.maximum(count[stops] - count[starts], 1)
        smooth = np.where(known, (total[stops] - total[starts]) / within, np.nan)
    return smooth


def _curve_lines(
    heights: np.ndarray, axis: _ValueAxis, box: tuple[int, int, int, int]
) -> Image.Image:
    """Grid and both lines, drawn large and shrunk: Pillow's own lines have hard edges."""
    canvas = Image.new("RGB", (CURVE_SIZE[0] * SUPERSAMPLE, CURVE_SIZE[1] * SUPERSAMPLE), WHITE)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = (SUPERSAMPLE * edge for edge in box)
    for place, _ in axis.ticks:
        y = bottom - (place - axis.low) / (axis.high - axis.low) * (bottom - top)
        draw.line((left, y, right, y), fill=HAIR, width=2 * SUPERSAMPLE)
    draw.line((left, bottom, right, bottom), fill="#9ca3af", width=2 * SUPERSAMPLE)
    count = len(heights)
    steps = np.arange(count) / (count - 1) if count > 1 else np.full(1, 0.5)
    x = left + steps * (right - left)
    for line, colour, width in ((heights, RAW, 3), (_running_mean(heights), SMOOTH, 5)):
        ys = bottom - line * (bottom - top)
        for run in _finite_runs(ys):
            points = list(zip(x[run].tolist(), ys[run].tolist(), strict=True))
            _stroke(draw, points, colour, width * SUPERSAMPLE)
    return canvas.resize(CURVE_SIZE, Image.Resampling.LANCZOS)


def _stroke(
    draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str, width: int
) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")
    radius = width / 2 if len(points) > 1 else width  # a value alone between gaps is a dot
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _finite_runs(values: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive finite values."""
    padded = np.concatenate(([False], np.isfinite(values), [False])).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(start, stop)


def _curve_text(
    draw: ImageDraw.ImageDraw, axis: _ValueAxis, box: tuple[int, int, int, int], count: int
) -> None:
    left, top, right, bottom = box
    font = font_of(24)
    for place, label in axis.ticks:
        y = bottom - (place - axis.low) / (axis.high - axis.low) * (bottom - top)
        draw.text((left - 16, y), label, fill=MUTED, font=font, anchor="rm")
    for step in _step_ticks(count):
        x = left + ((step - 1) / (count - 1) if count > 1 else 0.5) * (right - left)
        x = min(x, CURVE_SIZE[0] - 8 - font.getlength(f"{step:,}") / 2)
        draw.text((x, bottom + 14), f"{step:,}", fill=MUTED, font=font, anchor="ma")
    caption = "loss by step, log scale" if axis.log else "loss by step"
    draw.text(((left + right) / 2, bottom + 48), caption, fill=MUTED, font=font, anchor="ma")


def _step_ticks(count: int) -> list[int]:
    """1, round numbers, and the last step; round numbers that would touch it give way."""
    every = max(1, round(_round_step(count / 8)))
    ticks = [s for s in range(every, count, every) if count - s > every / 2 and s > 1]
    return sorted({1, *ticks, count})


# --- files -------------------------------------------------------------------------------------


def picture_files(folder: Path) -> list[Path]:
    """The pictures that lie in a folder: kinds that Pillow reads by itself, no program called."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """Within: the picture, whose pixels are read when they are asked for. Raises ValueError, naming
    the file, where it is none, is damaged, or holds more pixels than anybody draws."""
    try:
        # by name: Pillow would start Ghostscript for an EPS, whatever the file is called
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            check_pixels(image)
            yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{path} has too many pixels for a picture; leave it out") from None
    except Exception as error:  # noqa: BLE001 -- Pillow has no error of its own for a damaged file
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(f"{path} is no whole picture: {reason}; leave it out") from None


def check_pixels(image: Image.Image) -> None:
    """Pillow itself raises at twice as many, and warns in between (commands keep that quiet)."""
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError


def read_picture(path: Path) -> Image.Image:
    """RGB, the right way up. Raises what `opened_picture` does."""
    with opened_picture(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def check_picture(path: Path) -> None:
    """By its beginning alone: of many that would take long. Raises what `opened_picture` does."""
    with opened_picture(path):
        pass


def save_png(
    image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a PNG whole or not at all; `metadata` goes into its text chunks, in any script."""
    chunks = PngInfo()
    for key, value in (metadata or {}).items():
        if not 1 <= len(key) <= 79 or not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"metadata key {key!r}: PNG keys are 1 to 79 printable ASCII characters"
            )
        chunks.add_text(key, png_text(value))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True, pnginfo=chunks)
    return write_atomically(path, data.getvalue())


def png_text(text: str) -> str:
    """As a PNG holds it: text ends at NUL, and UTF-8 has no lone surrogates; all else is kept."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def read_png_text(path: Path) -> dict[str, str] | None:
    """The metadata that `save_png` wrote; None where there is no whole PNG, and none of it where
    that is larger than anything it wrote."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), io.SEEK_END)
            if file.read() != PNG_END:
                return None
        # .info has what stands before the pixels; .text would decode them to look behind
        with Image.open(path, formats=("PNG",)) as image:
            check_pixels(image)
            return {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return {}
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for a damaged file
        return None


def was_cut(path: Path) -> bool:
    """Of what is no whole PNG: whether it was going to be one, as a full disk leaves it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return PNG_BEGINNING.startswith(file.read(len(PNG_BEGINNING)))


PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

# --- tiles -------------------------------------------------------------------------------------


def tile(image: Image.Image) -> Image.Image:
    """RGB on white as grids show it, which keeps a picture of theirs as it is; small ones are
    enlarged by a whole factor, so that pixels stay square."""
    if image.width < 1 or image.height < 1:
        return Image.new("RGB", (SMALLEST, SMALLEST), HAIR)
    rgb = _on_white(image)
    longer = max(rgb.size)
    if longer < SMALLEST:
        factor = math.ceil(SMALLEST / longer)
        size = rgb.width * factor, rgb.height * factor
        return rgb.resize(size, Image.Resampling.NEAREST)
    if longer > LARGEST:
        size = max(1, rgb.width * LARGEST // longer), max(1, rgb.height * LARGEST // longer)
        return rgb.resize(size, Image.Resampling.LANCZOS)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), with_alpha).convert("RGB")


def _paste(
    canvas: Image.Image, tile: Image.Image, corner: tuple[int, int], cell: tuple[int, int]
) -> None:
    """Centred in its cell, with rounded corners and a hair line that shows white pictures."""
    x, y = corner[0] + (cell[0] - tile.width) // 2, corner[1] + (cell[1] - tile.height) // 2
    framed = Image.composite(
        Image.new("RGB", tile.size, ImageColor.getrgb("#d1d5db")), tile, _frame(tile.size)
    )
    canvas.paste(framed, (x, y), _rounded(tile.size))


@lru_cache(maxsize=32)
def _rounded(size: tuple[int, int]) -> Image.Image:
    large = Image.new("L", (size[0] * 4, size[1] * 4))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, *(n * 4 - 1 for n in size)), 20, fill=255)
    return large.resize(size, Image.Resampling.BOX)  # exact shares: no ringing inside


@lru_cache(maxsize=32)
def _frame(size: tuple[int, int]) -> Image.Image:
    large = Image.new("L", (size[0] * 4, size[1] * 4))
    box = (0, 0, *(n * 4 - 1 for n in size))
    ImageDraw.Draw(large).rounded_rectangle(box, 20, outline=255, width=4)
    return large.resize(size, Image.Resampling.BOX)  # exact shares: no ringing inside


# --- text --------------------------------------------------------------------------------------

# what Pillow's own font lacks and prompts often have
REPLACEMENTS = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "•": "-", "→": "->", "ß": "ss", "ø": "o", "æ": "ae"}
)
MISSING = "\uffff"  # a code point that no font has: draws the font's box


@lru_cache(maxsize=64)
def font_of(size: int) -> Font:
    return cast(Font, ImageFont.load_default(size=size))


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    font = font_of(24)
    return bytes(font.getmask(character)) != bytes(font.getmask(MISSING))


def drawable(text: str) -> str:
    """`text` on one line, in characters that Pillow's own font has.

    Accents are dropped, other scripts and emoji become boxes: the font is the same everywhere,
    which a search for system fonts would not be. The exact prompt belongs in the metadata.
    """
    shown = []
    for character in unicodedata.normalize("NFKD", text.translate(REPLACEMENTS)):
        category = unicodedata.category(character)
        if character.isspace() or category == "Cc":
            shown.append(" ")
        elif category not in ("Mn", "Me", "Cf"):  # accents, joiners and direction marks
            known = character.isascii() or (category != "Cs" and _has_glyph(character))
            shown.append(character if known else MISSING)
    return " ".join("".join(shown).split())


def wrap(text: str, font: Font, width: float, lines: int) -> list[str]:
    """At most `lines` lines no wider than `width`; what does not fit ends in an ellipsis."""
    wrapped: list[str] = []
    rest = drawable(text[:2000])
    while rest and len(wrapped) < lines:
        taken = _fitting(rest, font, width)
        if taken < len(rest) and len(wrapped) == lines - 1:
            taken = _fitting(rest, font, width - font.getlength("…"))
            return [*wrapped, rest[:taken].rstrip() + "…"]
        if taken < len(rest) and rest[taken] != " " and " " in rest[:taken]:
            taken = rest.rindex(" ", 0, taken)  # break between words where there are several
        wrapped.append(rest[:taken])
        rest = rest[taken:].lstrip()
    return wrapped


def _fitting(text: str, font: Font, width: float) -> int:
    """How many characters of `text` fit into `width`; at least one."""
    low, high = 1, min(len(text), 500)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def picture_title(
    draw: ImageDraw.ImageDraw, title: str, x: int, y: int, width: int, size: int
) -> None:
    font = font_of(size)
    for line in wrap(title, font, width - 2 * x, 1):
        # Pillow ships one weight: a thin stroke of the same colour makes it semibold
        draw.text((x, y), line, fill=INK, font=font, stroke_width=size / 60, stroke_fill=INK)


def notice(title: str, message: str) -> Image.Image:
    canvas = Image.new("RGB", (800, 160), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, 799, 159), outline=HAIR)
    if title:
        picture_title(draw, title, 18, 14, 800, 20)
    draw.text((400, 84), message, fill=MUTED, font=font_of(18), anchor="mm")
    return canvas
