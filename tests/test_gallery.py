"""Pictures as files: named, described, resumed, and laid side by side."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from esd_fast.cli import main
from esd_fast.commands import generate as command
from esd_fast.erasure import Erasure
from esd_fast.evaluation.gallery import (
    PAGE_COLUMNS,
    PAGE_ROWS,
    Variant,
    draw,
    folders_of,
    metadata_of,
    rows_of,
    unfinished,
    write_pages,
)
from esd_fast.evaluation.pictures import read_png_text, save_png
from esd_fast.generate import Shot
from esd_fast.prompt_list import Case
from esd_fast.prompts import RESERVED, safe_name

from . import pipelines
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2}
CSV = """,case_number,prompt,evaluation_seed,artist,class
0,4,"a cat, asleep",11,Zoë,cat
1,5,a dog,12,,dog
2,8,AC/DC "live",13,AC/DC,
"""

AWKWARD = [
    *("AC/DC", "AC\\DC", 'the "cat"', "two\nlines", "nul\0byte", "x" * 300, "many words " * 60),
    *(".", "..", "../../etc/passwd", "/etc/passwd", "CON", "con", "-rf", "~", "猫" * 300),
    *("\U0001f431", "\u202egnp.exe", "a cat", "a-cat", "A cat", "A CAT", "a  cat"),
]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# --- names


def test_no_prompt_leads_out_of_the_folder_or_takes_anothers_name(tmp_path: Path) -> None:
    cases = [Case(text) for text in AWKWARD]
    names = [file.name for row in rows_of(cases, 2, 0) for file in row.files]
    assert len({name.casefold() for name in names}) == len(names) == 2 * len(cases)
    for name in names:
        assert (tmp_path / name).parent == tmp_path
        assert name.endswith(".png")
        assert len(name.encode()) <= 120
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(names)


HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            (*("../", "..\\", "/", "/etc/passwd", "C:\\", "~", "-rf ", ".", "\0", "\n", "\r", "\x1b[2J"),
             *("%2e%2e%2f", "CON", "aux.txt", "nul", "COM1", "$HOME", "`id`", ";", "|", "*", "?", '"', "'"),
             *("\u202e", "\u200b", "\ufeff", "\uff0f", "\u2215", "e\u0301", "\U0001f431\u200d", "\ud800"),
             *("x" * 300, "猫" * 100, " ", "...", "<script>", "=1+1"))
        ),
    ),
    min_size=1,
    max_size=4,
).map("".join)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(HOSTILE, min_size=1, max_size=5),
    st.dictionaries(HOSTILE, HOSTILE, max_size=2),
    st.none() | st.integers(0, 10**18),
)
def test_no_prompt_writes_outside_the_folder(
    prompts: list[str], columns: dict[str, str], number: int | None
) -> None:
    """Pictures under names made of prompts, with all that their list says in the metadata."""
    rows = rows_of([Case(text, number, number, columns) for text in prompts], 2, 0)
    files = {file.name: (row, file) for row in rows for file in row.files}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "a" / "out"
        run = prompts[0].encode(errors="ignore").replace(b"\0", b"")[:200].decode(errors="ignore")
        (named,) = folders_of(out, [Path(run)], ["0" * 64])
        assert named.parent == out
        variant = Variant(named, None, {"model": prompts[0], "erased_concept": prompts[-1]})
        named.mkdir(parents=True)
        for name, (row, file) in files.items():
            assert len(name.encode()) <= 120
            assert name[0] not in "-."
            save_png(Image.new("RGB", (1, 1)), named / name, metadata_of(row, file, variant))
        everything = {p for p in Path(place).rglob("*") if not p.is_dir()}
        assert everything == {named / name for name in files}
        assert not unfinished(rows, variant, False)
        for name, (_, file) in files.items():
            told = read_png_text(named / name) or {}
            lost = file.shot.prompt.replace("\0", "").replace("\ud800", "?")
            assert told["prompt"] == lost.encode("utf-8", "replace").decode()


@settings(max_examples=60, deadline=None)
@given(HOSTILE, HOSTILE, HOSTILE)
def test_names_of_results_are_names(concept: str, source: str, method: str) -> None:
    """Of erasures, and of what `train`, `collect` and `attack` write: a part of a path, and no option."""
    told = {"concept": concept, "erase_from": source, "method": method}
    for name in (Erasure({}, told).file_name, safe_name(concept), f"{safe_name(source)}-after"):
        assert Path(name).name == name
        assert name[0] not in "-.~"
        assert len(f"{name}.part".encode()) <= 255
        assert all(c.isprintable() and c not in "<>:\"/\\|?*%$`'" for c in name)
        assert name.split(".")[0].upper() not in RESERVED


def test_names_of_cases_are_the_references() -> None:
    rows = rows_of([Case("a cat", 5, 70), Case("a dog", 9)], 2, seed=3)
    shots = {file.name: file.shot for row in rows for file in row.files}
    assert shots == {
        "5_0.png": Shot("a cat", 70, 0),
        "5_1.png": Shot("a cat", 70, 1),
        "9_0.png": Shot("a dog", 3, 0),
        "9_1.png": Shot("a dog", 3, 1),
    }


def test_cases_of_one_number() -> None:
    rows = rows_of([Case("a cat", 5, 1), Case("a dog", 5, 1), Case("a cat", 5, 1)], 1, 0)
    first, second, third = (row.files[0].name for row in rows)
    assert first == third == "5_0.png"  # the very same picture
    assert second.startswith("5_0-")


def test_folders_of_erasures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("base", "a/erased-cat", "b/Erased-Cat"):
        (tmp_path / run).mkdir(parents=True)
    (tmp_path / "esd-cat.v2.safetensors").touch()
    monkeypatch.chdir(tmp_path / "a" / "erased-cat")
    paths = [
        Path(),
        tmp_path / "b/Erased-Cat",
        tmp_path / "base",
        tmp_path / "esd-cat.v2.safetensors",
    ]
    out = tmp_path / "out"
    found = folders_of(out, paths, ["1" * 64, "2" * 64, "3" * 64, "4" * 64])
    assert [f.name for f in found] == [
        "erased-cat",
        "Erased-Cat-22222222",
        "base-33333333",
        "esd-cat.v2",
    ]
    assert {f.parent for f in found} == {out}


# --- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in this process: run(*arguments) -> exit code."""
    monkeypatch.setattr(command, "keep_pages", lambda: None)
    (tmp_path / "prompts.csv").write_text(CSV)

    def call(*arguments: object, steps: int = 2) -> int:
        fixed = ["generate", "--model", GOLDEN / "sd-ddim", "--output", tmp_path / "out"]
        fixed += ["--num-inference-steps", steps, "--device", "cpu"]
        return main([str(a) for a in (*fixed, *arguments)])

    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two erasures of the golden model."""
    folders = []
    for number, shift in enumerate((0.5, -0.5)):
        unet = pipelines.pipeline().unet
        tensors = {n: p.detach() + shift for n, p in unet.named_parameters() if "attn2" in n}
        folder = tmp_path_factory.mktemp(f"run-{number}-")
        Erasure(tensors, {"concept": f"thing {number}", "method": "esd-x"}).save(folder)
        folders.append(folder)
    return folders


def tree(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_csv_with_two_erasures(run: Any, runs: list[Path], tmp_path: Path) -> None:
    """In the reference's own words; every picture says how to make it again."""
    arguments = ["--prompts_path", tmp_path / "prompts.csv", "--num_samples", 2, "--from_case", 5]
    arguments += ["--esd_path", runs[0], "--erasure", runs[1], "--batch-size", 3]
    assert run(*arguments) == 0
    out = tmp_path / "out"
    pngs = {f"{case}_{sample}.png" for case in (5, 8) for sample in (0, 1)}
    for folder in ("base", runs[0].name, runs[1].name):
        assert {p.name for p in (out / folder).iterdir()} == pngs
    with Image.open(out / runs[1].name / "8_1.png") as picture:
        told = picture.text  # type: ignore[attr-defined]
        assert picture.size == (64, 64)
    assert told["prompt"] == 'AC/DC "live"'
    assert (told["case_number"], told["seed"], told["sample"]) == ("8", "13", "1")
    assert json.loads(told["columns"]) == {"artist": "AC/DC"}
    assert told["num_inference_steps"] == "2"
    assert (told["guidance_scale"], told["size"], told["dtype"]) == ("7.5", "64x64", "float32")
    assert told["model"].endswith("sd-ddim")
    assert told["erased_concept"] == "thing 1"
    (file,) = runs[1].iterdir()
    assert told["erasure_sha256"] == command.sha256_of(file)
    with Image.open(out / "base" / "8_1.png") as picture:
        base = picture.text  # type: ignore[attr-defined]
    assert base["model_fingerprint"] == told["model_fingerprint"]
    assert "erasure_sha256" not in base
    # each erasure alone changes the picture, not the one before with it
    first, second, third = (
        pixels(out / f / "8_1.png") for f in ("base", runs[0].name, runs[1].name)
    )
    assert np.abs(first - second).max() > 1
    assert np.abs(second - third).max() > 1
    # the second erasure alone gives the same picture: the first was taken off
    assert (
        run(*arguments[:6], "--erasure", runs[1], "--output", tmp_path / "alone", "--no-grid") == 0
    )
    assert np.abs(pixels(tmp_path / "alone" / runs[1].name / "8_1.png") - third).max() <= 1
    assert not list((tmp_path / "alone").glob("grid*"))


def test_the_noise_is_the_same_with_and_without(run: Any, runs: list[Path], tmp_path: Path) -> None:
    """At strength 0 nothing but the noise decides: the very same pixels."""
    assert run("--prompt", "a cat", "--images", 2, "--erasure", runs[0], "--strength", 0) == 0
    for name in ("a-cat-0.png", "a-cat-1.png"):
        base, erased = (pixels(tmp_path / "out" / f / name) for f in ("base", runs[0].name))
        assert np.array_equal(base, erased)
    assert not np.array_equal(base, pixels(tmp_path / "out" / "base" / "a-cat-0.png"))


def test_finished_files_are_skipped_and_damaged_ones_drawn(run: Any, tmp_path: Path) -> None:
    arguments = ["--prompts", tmp_path / "prompts.csv", "--no-grid"]
    assert run(*arguments) == 0
    before = tree(tmp_path / "out")
    assert run(*arguments) == 0
    assert tree(tmp_path / "out") == before
    (tmp_path / "out/base/4_0.png").unlink()
    cut = tmp_path / "out/base/5_0.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    assert run(*arguments, "--batch-size", 2) == 0  # how many at a time decides nothing
    after = tree(tmp_path / "out")
    assert {n for n in after if before[n] != after[n]} == {"base/4_0.png", "base/5_0.png"}
    assert pixels(cut).shape == (64, 64, 3)


def test_other_pictures_are_not_replaced(
    run: Any, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", tmp_path / "prompts.csv", "--no-grid"]
    assert run(*arguments) == 0
    before = tree(tmp_path / "out")
    assert run(*arguments, steps=3) == 2
    assert "its num_inference_steps is '2', now it would be '3'" in capsys.readouterr().err
    assert run(*arguments, "--guidance-scale", 0) == 2
    assert "its guidance_scale is '7.5', now it would be '0'" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    # nothing is drawn where a later variant is in the way
    save_png(Image.new("RGB", (9, 9)), tmp_path / "out" / "5_0.png")
    (tmp_path / "out" / runs[0].name).mkdir()
    photo = (tmp_path / "out" / "5_0.png").rename(tmp_path / "out" / runs[0].name / "5_0.png")
    assert run(*arguments, "--erasure", runs[0]) == 2
    assert "its prompt is not said" in capsys.readouterr().err
    assert {*tree(tmp_path / "out")} == {*before, f"{runs[0].name}/5_0.png"}
    assert run(*arguments, "--erasure", runs[0], "--overwrite") == 0
    assert pixels(photo).shape == (64, 64, 3)
    assert run(*arguments, "--erasure", runs[1], "--strength", 2) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", " "], "--prompt is ' '"),
        (["--prompt", "x", "--images", 0], "--images is 0"),
        (["--prompt", "x", "--batch-size", 0], "--batch-size is 0"),
        (["--prompt", "x", "--from-case", 1], "only a CSV has case numbers"),
        (["--prompt", "x", "--seed", -1], "--seed is -1"),
        (["--prompt", "x", "--strength", "nan"], "--strength is nan"),
        (["--prompt", "x", "--erasure", "nowhere"], "erasure 'nowhere' does not exist"),
        (["--prompts", "nowhere.csv"], "'nowhere.csv' does not exist"),
        (["--prompts", "CSV", "--till-case", 3], "the file's go from 4 to 8"),
        (["--prompt", "x", "--resolution", 72], "resolution is 72"),
    ],
)
def test_bad_arguments_draw_nothing(
    arguments: list[Any], said: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = str(tmp_path / "prompts.csv")
    assert run(*[csv if a == "CSV" else a for a in arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


# --- drawing and pages without a model


class Painter:
    """As much of a pipeline as drawing asks for: plain pictures, whose red is the batch's size."""

    vae_scale_factor = 8

    def __init__(self) -> None:
        self.unet = pipelines.pipeline().unet
        self.calls: list[int] = []

    def __call__(self, prompt: list[str], **_: Any) -> Any:
        self.calls.append(len(prompt))
        image = np.full((len(prompt), 8, 8, 3), len(self.calls) / 255)
        return type("Output", (), {"images": image})


def test_a_batch_is_on_disk_before_the_next_is_drawn(tmp_path: Path) -> None:
    rows = rows_of([Case("a cat", i, i) for i in range(7)], 1, 0)
    variant = Variant(tmp_path / "base")
    there = []

    def look(done: int, total: int) -> None:
        assert total == 7
        there.append((done, len(list((tmp_path / "base").iterdir()))))

    painter = Painter()
    draw(painter, unfinished(rows, variant, False), variant, SETTINGS, look)
    assert painter.calls == [2, 2, 2, 1]
    assert there == [(2, 2), (4, 4), (6, 6), (7, 7)]
    assert not unfinished(rows, variant, False)


def painted(folder: Path, rows: Any) -> Variant:
    variant = Variant(folder)
    draw(Painter(), unfinished(rows, variant, False), variant, SETTINGS)
    return variant


def test_long_lists_go_on_pages_and_old_pages_go(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (9, 9)), tmp_path / "grid-of-mine.png", {"kept": "yes"})
    cases = [Case("a cat", i, i) for i in range(PAGE_ROWS + 3)]
    rows = rows_of(cases, 1, 0)
    variants = [painted(tmp_path / name, rows) for name in ("base", "erased")]
    assert [p.name for p in write_pages(tmp_path, rows, variants)] == ["grid-1.png", "grid-2.png"]
    first, second = (size_of(tmp_path / f"grid-{i}.png") for i in (1, 2))
    assert first[0] == second[0]
    assert first[1] > 3 * second[1]
    (one,) = write_pages(tmp_path, rows[:3], variants)
    assert one.name == "grid.png"
    assert {p.name for p in tmp_path.glob("grid*")} == {"grid.png", "grid-of-mine.png"}


def test_many_samples_go_on_below(tmp_path: Path) -> None:
    rows = rows_of([Case("a cat", 0, 0)], PAGE_COLUMNS + 1, 0)
    few = rows_of([Case("a cat", 0, 0)], PAGE_COLUMNS, 0)
    variant = painted(tmp_path / "base", rows)
    (page,) = write_pages(tmp_path, few, [variant])
    small = size_of(page)
    (page,) = write_pages(tmp_path, rows, [variant])
    assert size_of(page)[0] == small[0]
    assert size_of(page)[1] > 1.5 * small[1]


def test_a_picture_of_another_program_is_in_the_way(tmp_path: Path) -> None:
    rows = rows_of([Case("a cat", 0, 0)], 1, 0)
    chunks = PngInfo()
    chunks.add_text("prompt", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "0_0.png", pnginfo=chunks)
    with pytest.raises(FileExistsError, match="its seed is not said, now it would be '0'"):
        unfinished(rows, Variant(tmp_path), overwrite=False)
    assert len(unfinished(rows, Variant(tmp_path), overwrite=True)) == 1
