"""Checkpoints, lists of prompts and pictures that are none, through the commands that read them: one line that names
the file and what is wrong, and nothing written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esd_fast.cli import main
from esd_fast.erasure import Erasure
from esd_fast.evaluation.drawn import read_drawn
from esd_fast.evaluation.gallery import DECISIVE, Variant, rows_of, unfinished
from esd_fast.evaluation.pictures import read_png_text
from esd_fast.models.checkpoint import Checkpoint
from esd_fast.models.folder import described_at
from esd_fast.models.single_file import blank, check_fits
from esd_fast.prompt_list import Case, read_prompts
from esd_fast.terminal import visible

from . import broken_models, pipelines
from .broken_files import CHECKPOINTS, CSV, FORMULAS, LISTS, PICTURES, png
from .broken_models import tree
from .pipelines import GOLDEN
from .single_files import original

one_thread = pipelines.one_thread
call = broken_models.call
Result = tuple[int, str, str]
Call = Callable[..., Result]
MODEL = str(GOLDEN / "sd-ddim")
QUICK = ["--num-inference-steps", "2", "--device", "cpu"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole() -> Tensors:
    return {n: t.contiguous() for n, t in original(pipelines.pipeline()).items()}


@pytest.fixture(scope="module")
def erasure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = pipelines.pipeline().unet
    tensors = {n: p.detach() + 0.01 for n, p in unet.named_parameters() if "attn2.to_k" in n}
    made = Erasure(tensors, {"concept": "cat", "method": "esd-x", "model": MODEL})
    return made.save(tmp_path_factory.mktemp("erasure"))


def assert_one_line(result: Result, *named: str) -> None:
    code, out, err = result
    assert code in (1, 2)
    assert out == ""
    assert err.startswith("esd-fast: ")
    assert "\n" not in err
    assert "Error: " not in err  # the name of a class says nothing
    assert "Traceback" not in err
    assert visible(err) == err
    assert all(re.search(name, err) for name in named), err


# --- checkpoints


def readers(file: str, erasure: Path) -> dict[str, list[str]]:
    model, config = ["--model", file], ["--config", MODEL]
    return {
        "train": ["train", "--concept", "cat", "--iterations", "1", "--pictures", "0", *QUICK, *model, *config],
        "apply": ["apply", str(erasure), *model, "--allow-other-base", "--output", "out.safetensors"],
        "diff": ["diff", file, file],
        "info": ["info", file],
    }  # fmt: skip


# to these commands such a file is whole
FINE = {
    **dict.fromkeys(("no tensors", "no UNet", "a LoRA", "a VAE"), ("diff",)),
    **dict.fromkeys(("no VAE", "no text encoder", "another family"), ("apply", "diff")),
    **dict.fromkeys(("a tensor lost", "a bias lost", "a tensor more"), ("apply", "diff")),
    **dict.fromkeys(("a tensor bent", "a tensor of no shape"), ("apply", "diff")),
    "NaN": ("apply", "diff", "info"),
    "names that climb": ("train", "apply", "diff"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_broken_checkpoint(
    kind: str, whole: Tensors, erasure: Path, tmp_path: Path, call: Call
) -> None:
    name = kind if "." in kind else f"{kind}.safetensors"
    CHECKPOINTS[kind](tmp_path / name, whole)
    before = tree(tmp_path)
    for command, line in readers(name, erasure).items():
        if command in FINE.get(kind, ()):
            continue
        result = call(*line)
        if command != "info" or result[0]:  # which shows what is no checkpoint as well
            found = kind == "NaN" and command == "train"
            assert_one_line(result, "of its layers conv_in" if found else re.escape(kind))
        assert tree(tmp_path) == before, command
    if kind == "names that climb":  # what nothing asks for is left where it is
        assert call(*readers(name, erasure)["apply"])[0] == 0
        assert {p.name for p in tmp_path.iterdir()} == {name, "out.safetensors"}
    assert not list(tmp_path.parent.glob("climbed*"))
    assert not (tmp_path / "ran").exists()


def test_every_tensor_of_a_model_is_asked_for(whole: Tensors, tmp_path: Path) -> None:
    """A bias that is lost, or a weight that is a number: converters of diffusers stumble over some."""
    meta = {n: t.to("meta") for n, t in whole.items() if "position_ids" not in n}
    made = blank(MODEL, described_at(MODEL))
    check_fits(Checkpoint(tmp_path / "whole", meta, {}), made, "auto")
    for name in meta:
        other = {} if name.endswith("bias") else {name: torch.empty((), device="meta")}
        lacking = {n: t for n, t in meta.items() if n != name} | other
        with pytest.raises(ValueError, match="lacking does not fit "):
            check_fits(Checkpoint(tmp_path / "lacking", lacking, {}), made, "auto")


# --- lists of prompts


@pytest.mark.parametrize("kind", LISTS)
def test_broken_list(
    kind: str, erasure: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in ("esd_fast.models.load_model", "esd_fast.erasure.load"):
        monkeypatch.setattr(home, lambda *_, **__: pytest.fail("loaded"))
    content, said = LISTS[kind]
    (tmp_path / kind).write_bytes(content)
    before = tree(tmp_path)
    lines = (
        ["generate", "--prompts", kind, "--model", MODEL],
        ["eval", str(erasure), "--prompts", kind, "--model", MODEL],
        ["attack", str(erasure), "--paraphrases", kind, "--model", MODEL],
        ["train", "--concepts-file", kind, "--model", MODEL],
        ["train", "--concept", "cat", "--preserve-file", kind, "--model", MODEL],
    )
    for line in lines:
        if line[0] == "eval":  # which opens the erasure first, to know what it is of
            monkeypatch.setattr("esd_fast.erasure.load", lambda *_: Erasure({}, {}))
        assert_one_line(call(*line, *QUICK), re.escape(kind), said)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder.csv", "loop.csv", "pipe.txt", "gone.csv"])
def test_lists_that_are_no_files(kind: str, tmp_path: Path, call: Call) -> None:
    name = kind.split(".")[0]
    if name in CHECKPOINTS:
        CHECKPOINTS[name](tmp_path / kind, {})
    for option in ("--concepts-file", "--preserve-file"):
        line = ["train", option, kind, "--model", MODEL, *QUICK]
        line += ["--concept", "cat"] if option == "--preserve-file" else []
        assert_one_line(call(*line), re.escape(kind), "does not exist")


def test_odd_prompts_are_text(tmp_path: Path) -> None:
    rows = [f'{i},"{text}",{i}' for i, text in enumerate(FORMULAS)]
    (tmp_path / "list.csv").write_bytes(CSV + "\r\n".join(rows).encode())
    assert [case.prompt for case in read_prompts(tmp_path / "list.csv")] == FORMULAS
    twice = CSV + b"7,a cat,1\n7,a dog,1\n7,a cat,1\n"
    (tmp_path / "twice.csv").write_bytes(twice)
    assert [case.number for case in read_prompts(tmp_path / "twice.csv")] == [7, 7, 7]


# --- pictures


@pytest.fixture(scope="module")
def drawn(erasure: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `generate` writes: three pictures of the model, and of an erasure."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    line = ["generate", "--prompt", "cat", "--images", "3", "--resolution", "16", "--no-grid"]
    line += ["--erasure", str(erasure), "--model", MODEL, "--output", str(folder)]
    assert main([*line, *QUICK]) == 0
    return folder


def broken(kind: str, file: Path) -> None:
    if kind in NO_FILES:
        file.unlink()
        CHECKPOINTS[kind](file, {})
    else:
        file.write_bytes(PICTURES[kind](file.read_bytes()))


NO_FILES = ("folder", "loop", "link to nothing")
IN_PIXELS = ("cut in the pixels", "pixels damaged", "no pixels", "larger than its pixels")


@pytest.mark.parametrize("kind", [*PICTURES, *NO_FILES])
def test_broken_picture(
    kind: str, erasure: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one's own, for `attack` to learn from and for `eval` to compare with: before anything is loaded."""
    for home in ("esd_fast.models.load_model", "esd_fast.erasure.load"):
        monkeypatch.setattr(home, lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "mine").mkdir()
    for name in ("a.png", "b.PNG"):
        (tmp_path / "mine" / name).write_bytes(png())
    broken(kind, tmp_path / "mine" / "b.PNG")
    before = tree(tmp_path)
    lines = [["attack", str(erasure), "--train-data-dir", "mine", "--model", MODEL]]
    if kind not in IN_PIXELS:  # of many pictures the beginnings alone are read
        lines.append(
            ["eval", str(erasure), "--prompt", "cat", "--reference", "mine", "--model", MODEL]
        )
    for line in lines:
        assert_one_line(call(*line, *QUICK), r"mine/b\.PNG", "leave it out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", [*PICTURES, *NO_FILES])
def test_broken_drawn_picture(kind: str, drawn: Path, tmp_path: Path) -> None:
    """Of a folder that `generate` wrote: what is none by its ends is passed over, what is damaged within is named."""
    shutil.copytree(drawn, tmp_path / "out")
    file = tmp_path / "out" / "base" / "cat-1.png"
    broken(kind, file)
    read = read_drawn(tmp_path / "out")
    if file.name in {picture.name for picture in read.pictures}:
        with pytest.raises(ValueError, match=r"base/cat-1\.png (is no whole picture|has )"):
            read.base.read(read.pictures)
    else:
        assert len(read.base.read(read.pictures)) == 2
    # drawn again where it is a PNG that was cut, kept where it is somebody's
    told = read_png_text(tmp_path / "out" / "base" / "cat-0.png")
    variant = Variant(
        file.parent, None, {k: v for k, v in (told or {}).items() if k in DECISIVE[3:]}
    )
    asked = (rows_of([Case("cat")], 3, 0), variant)
    if kind in (
        "empty",
        "cut in the signature",
        "cut in the header",
        "cut in the pixels",
        "of no size",
    ):
        assert [missing.name for _, missing in unfinished(*asked, False)] == [file.name]
    elif kind in ("pixels damaged", "no pixels", "larger than its pixels"):
        assert not unfinished(*asked, False)  # its ends are whole
    else:
        with pytest.raises(FileExistsError, match=r"cat-1\.png.*--(overwrite|output)"):
            unfinished(*asked, False)
        if kind != "folder":
            assert [missing.name for _, missing in unfinished(*asked, True)] == [file.name]
