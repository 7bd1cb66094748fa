"""Grids, curves and PNG files, looked at pixel by pixel with Pillow."""

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from esd_fast.evaluation.pictures import (
    CURVE_SIZE,
    ERASED_BAND,
    ComparisonRow,
    GridRow,
    _linear_ticks,
    _log_ticks,
    _running_mean,
    before_after_grid,
    comparison_grid,
    drawable,
    font_of,
    loss_curve,
    read_png_text,
    save_png,
    wrap,
)

RED, BLUE = (200, 30, 40), (30, 60, 200)
AWKWARD = [
    "",
    " \n\t ",
    "a \"cat\"\nand 'dog'",
    "AC/DC <script>alert(1)</script>",
    "קטן חתול \u202e gnp.exe",
    "\U0001f431\u200d\u2b1b cat \ufe0f",
    "\ud800 lone surrogate \x00 and NUL",
    "x" * 300,
    "many words " * 100,
    "猫" * 300,
]


def plain(colour, size=(64, 64), mode="RGB"):
    return Image.new(mode, size, colour)


def rgb(image):
    return np.asarray(image.convert("RGB")).astype(int)


def extent(image, colour):
    """(left, top, right, bottom) of the pixels of exactly this colour."""
    ys, xs = np.nonzero((rgb(image) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def near(image, colour, tolerance=40):
    return abs(rgb(image) - colour).sum(-1) < tolerance


# --- before/after grid


def test_before_is_left_after_is_right_in_the_same_row():
    grid = before_after_grid([GridRow("a cat", "erased", [plain(RED)] * 3, [plain(BLUE)] * 3)])
    red, blue = extent(grid, RED), extent(grid, BLUE)
    assert red[2] < blue[0]
    assert (red[1], red[3]) == (blue[1], blue[3])
    assert 900 <= grid.width <= 1100  # three seeds of small pictures: README width


@pytest.mark.parametrize(
    ("side", "shown"), [(1, 128), (16, 128), (64, 128), (100, 200), (127, 254), (128, 128), (200, 200),
                        (256, 256), (512, 256), (1024, 256)]
)  # fmt: skip
def test_tile_sizes(side, shown):
    grid = before_after_grid([GridRow("", "kept", [plain(RED, (side, side))], [])])
    left, top, right, bottom = extent(grid, RED)
    assert (right - left, bottom - top) == (shown - 2, shown - 2)  # a hair line each side


def test_small_pictures_stay_crisp():
    """Nearest neighbour: no colour that was not in the picture, every pixel a square."""
    checks = np.zeros((32, 32, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = RED
    grid = rgb(before_after_grid([GridRow("", "kept", [Image.fromarray(checks)], [])]))
    left, top, _, _ = extent(Image.fromarray(grid.astype(np.uint8)), RED)
    left, top = left + 8, top + 8  # away from the rounded corner
    inside = grid[top : top + 96, left : left + 96]
    colours = {tuple(c) for c in inside.reshape(-1, 3).tolist()}
    assert colours == {RED, (0, 0, 0)}
    changes = np.flatnonzero((inside[2, 1:] != inside[2, :-1]).any(-1))
    assert set(np.diff(changes).tolist()) == {4}  # 128 / 32


def test_erased_rows_are_tinted_and_others_are_not():
    rows = [GridRow(kind, kind, [plain(RED)], [plain(RED)]) for kind in ("kept", "erased", "style")]
    grid = before_after_grid(rows)
    tinted = near(grid, (0xFF, 0xF1, 0xF2), 3).any(1)
    assert ERASED_BAND == "#fff1f2"
    band = np.flatnonzero(tinted)
    assert grid.height / 4 < band.min() < band.max() < grid.height * 3 / 4


@pytest.mark.parametrize("label", AWKWARD)
@pytest.mark.parametrize("kind", ["erased", "anything"])
def test_grid_takes_any_label(label, kind):
    grid = before_after_grid([GridRow(label, kind, [plain(RED)], [plain(BLUE)])], title=label)
    assert extent(grid, RED) < extent(grid, BLUE)
    # neither label nor title runs into the pictures: what surrounds them is as without a label
    bare = before_after_grid([GridRow("", kind, [plain(RED)], [plain(BLUE)])], title="x")
    assert extent(grid, RED)[0] == extent(bare, RED)[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F"])
def test_grid_takes_any_mode(mode):
    picture = Image.new(mode, (64, 64))
    assert before_after_grid([GridRow("", "kept", [picture], [picture])]).mode == "RGB"


def test_transparent_is_white():
    grid = before_after_grid([GridRow("", "kept", [plain((255, 0, 0, 0), mode="RGBA")], [])])
    assert not near(grid, (255, 0, 0)).any()


def test_grid_of_uneven_rows_and_sizes():
    wide, tall = plain(RED, (512, 128)), plain(BLUE, (64, 512))
    rows = [
        GridRow("a", "erased", [wide, wide, wide], []),
        GridRow("b", "kept", [], [tall]),
        GridRow("c", "kept", [], []),
    ]
    grid = before_after_grid(rows)
    left, top, right, bottom = extent(grid, BLUE)
    assert (right - left, bottom - top) == (32 - 2, 256 - 2)
    assert extent(grid, RED)[2] < left


def test_grid_without_rows_says_so():
    assert before_after_grid([]).getcolors(1 << 20) is not None
    assert before_after_grid([], "title").width > 100


# --- text


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("width", [1, 40, 138])
def test_wrap_keeps_to_width_and_lines(text, width):
    font = font_of(15)
    lines = wrap(text, font, width, 4)
    assert len(lines) <= 4
    assert all(line.strip() for line in lines)
    if width >= 40:
        assert all(font.getlength(line) <= width for line in lines)


def test_wrap_breaks_between_words_and_says_what_it_cut():
    font = font_of(15)
    text = "a flat style cat on a blue background"
    lines = wrap(text, font, 120, 5)
    assert " ".join(lines) == text
    assert len(lines) > 1
    assert wrap(text, font, 120, 1)[0].endswith("…")
    assert not any("…" in line for line in lines)


def test_drawable_keeps_latin_letters():
    assert drawable("Café  naïve\n×2 – done") == "Cafe naive x2 - done"


# --- loss curve


def indigo(image):
    return near(image, (0x43, 0x38, 0xCA), 60)


def test_curve_falls_where_the_loss_falls():
    picture = loss_curve(np.linspace(1.0, 0.1, 200).tolist())
    assert picture.size == CURVE_SIZE
    ys, xs = np.nonzero(indigo(picture))
    left, right = ys[xs == xs.min()].mean(), ys[xs == xs.max()].mean()
    assert left < right - 200
    # a straight line on a linear axis
    middle = ys[xs == (xs.min() + xs.max()) // 2].mean()
    assert abs(middle - (left + right) / 2) < 5


def test_wide_range_gets_a_log_axis_where_a_decay_is_straight():
    picture = loss_curve(np.geomspace(1.0, 1e-3, 400).tolist())
    ys, xs = np.nonzero(indigo(picture))
    ends = [ys[xs == x].mean() for x in (xs.min() + 40, xs.max() - 40)]
    middle = ys[xs == (xs.min() + xs.max()) // 2].mean()
    assert abs(middle - sum(ends) / 2) < 5


def test_non_finite_values_leave_a_gap():
    losses = np.full(300, 1.0)
    losses[100:200] = [math.nan, math.inf] * 50
    columns = np.flatnonzero(indigo(loss_curve(losses)).any(0))
    gap = np.diff(columns).max()
    assert 0.28 < gap / (columns.max() - columns.min()) < 0.38


@pytest.mark.parametrize(
    "losses",
    [[0.3], [0.0], [1, 2], [5.0] * 9, [math.nan, 1.0, math.nan], [0.0, 1e-5, 0.0], [1e308, -1e308],
     [1e-320, 1e300], [1e-7, 1.0001e-7], [-3.0, -2.0], [1e-12] * 3, list(range(1, 20001))],
)  # fmt: skip
def test_curve_of_awkward_values(losses):
    picture = loss_curve(losses, "awkward")
    assert picture.size == CURVE_SIZE
    assert indigo(picture).any()


@pytest.mark.parametrize("losses", [[], [math.nan], [math.inf, -math.inf]])
def test_curve_without_values_is_a_notice(losses):
    picture = loss_curve(losses, "t")
    assert not indigo(picture).any()
    assert (rgb(picture) < 180).any()  # but something is written


def test_running_mean_is_a_mean_with_gaps():
    assert np.allclose(_running_mean(np.full(500, 0.7)), 0.7)
    values = np.arange(600.0)
    assert np.allclose(_running_mean(values)[40:-40], values[40:-40])
    values[300] = np.nan
    smooth = _running_mean(values)
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [300]
    noise = np.random.default_rng(0).normal(0, 1, 3000)
    assert _running_mean(noise).std() < 0.2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.37), (-3, 12), (0, 1e-9), (0, 84000)])
def test_linear_ticks_are_round_even_and_labelled_as_what_they_are(low, high):
    ticks = _linear_ticks(low, high)
    places = [place for place, _ in ticks]
    assert 3 <= len(ticks) <= 7
    assert low <= min(places) < max(places) <= high * (1 + 1e-9)
    assert np.allclose(np.diff(places), places[1] - places[0])
    assert [float(label.replace(",", "")) for _, label in ticks] == pytest.approx(places)


@pytest.mark.parametrize(("low", "high"), [(0.002, 0.9), (1e-30, 1e20), (1e-4, 40)])
def test_log_ticks_stand_at_their_own_logarithm(low, high):
    ticks = _log_ticks(low, high)
    assert 2 <= len(ticks) <= 11
    for place, label in ticks:
        assert math.log10(float(label.replace(",", ""))) == pytest.approx(place, abs=1e-6)


# --- any number of blocks


def test_blocks_stand_side_by_side_in_order():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = [
        ComparisonRow("a cat", "case 3, seed 7", [[plain(c)] * 2 for c in colours]),
        ComparisonRow("a dog", "", [[], [plain(RED)], []]),
    ]
    grid = comparison_grid(rows, ["base", "cat", "a name of an erasure " * 9])
    red, green, blue = (extent(grid, c) for c in colours)
    assert (red[1], red[3]) == (green[1], green[3]) == (blue[1], blue[3])
    assert red[2] < green[0]
    assert green[2] < blue[0]
    assert green[0] - red[0] == blue[0] - green[0]
    below = extent(grid, RED)  # in the second row, under the second block
    assert below[0] == green[0]
    assert below[1] > green[3]


@pytest.mark.parametrize("heading", AWKWARD)
def test_one_block_with_any_heading(heading):
    rows = [ComparisonRow(heading, heading, [[plain(RED)]])]
    one, bare = (comparison_grid(rows, [h]) for h in (heading, ""))
    assert one.size == bare.size
    assert extent(one, RED) == extent(bare, RED)


# --- files


@pytest.mark.parametrize(
    "value", ["cat", "Käthe\nline two", 'a "q" <b>', "猫 \U0001f431 חתול", "x" * 5000, ""]
)
def test_metadata_comes_back(tmp_path, value):
    path = save_png(plain(RED), tmp_path / "a.png", {"concept": value, "seed": "3"})
    with Image.open(path) as read:
        assert read.text == {"concept": value, "seed": "3"}
        assert (rgb(read) == RED).all()


def test_what_is_no_whole_png_has_no_metadata(tmp_path):
    path = save_png(plain(RED), tmp_path / "a.png", {"concept": "cat"})
    assert read_png_text(path) == {"concept": "cat"}
    whole = path.read_bytes()
    for part in (b"", whole[:10], whole[:-1], whole[:-12], b"x" * 40 + whole[-12:]):
        path.write_bytes(part)
        assert read_png_text(path) is None
    assert read_png_text(tmp_path) is None
    assert read_png_text(tmp_path / "none.png") is None


def test_metadata_that_png_cannot_hold(tmp_path):
    with Image.open(save_png(plain(RED), tmp_path / "a.png", {"k": "a\0b\ud800"})) as read:
        assert read.text == {"k": "ab?"}
    for key in ("", "k" * 80, "ké", "a\0b"):
        with pytest.raises(ValueError, match="PNG keys"):
            save_png(plain(RED), tmp_path / "b.png", {key: "v"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_png(plain(RED), tmp_path / "a.png")
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_png(plain(BLUE), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_saved_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    path = save_png(plain(RED), tmp_path / ("n" * 250 + ".png"))  # longest name there may be
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_these_modules_load_nothing_heavy():
    script = (
        "import sys, esd_fast.evaluation.pictures, esd_fast.evaluation.report\n"
        "sys.exit(' '.join({'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)
