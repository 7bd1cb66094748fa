"""`esd-fast export`, `apply` and `diff`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esd_fast.cli import main
from esd_fast.export.compare import compare, layer_of

from . import tiny
from .tiny import applied, assert_same, erasure_of, original, state

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture
def delta(folders: dict[str, Path], tmp_path: Path) -> Path:
    return erasure_of(original("sd1"), model=str(folders["sd1"])).save(tmp_path / "run")


def test_export_in_every_format(
    delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is the one that the erasure names; a second run does not overwrite."""
    for format in ("delta", "single-file", "lora", "kohya", "diffusers"):
        output = tmp_path / (format if format == "diffusers" else f"{format}.safetensors")
        arguments = ["export", str(delta.parent), "--format", format, "--output", str(output)]
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert said.out.startswith(str(output))
        assert said.err == ""
        assert main(arguments) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert main([*arguments, "--overwrite"]) == 0
        kept = re.search(r"rank 64: 100\.0000% of the energy", capsys.readouterr().out)
        assert bool(kept) == (format in ("lora", "kohya"))
    pipe = type(original("sd1")).from_pretrained(tmp_path / "diffusers")
    assert_same(state(pipe), state(applied("sd1", erasure_of(original("sd1")))))


def test_apply_keeps_the_form_of_the_base(
    delta: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, again = (str(tmp_path / n) for n in ("f.safetensors", "folder", "g.safetensors"))
    plain = str(tmp_path / "plain.safetensors")
    base = str(folders["sd1"])
    assert main(["apply", str(delta), "--output", folder]) == 0
    assert main(["export", str(delta), "--format", "single-file", "--output", file]) == 0
    arguments = ["export", str(delta), "--format", "single-file", "--strength", "0"]
    assert main([*arguments, "--output", plain]) == 0
    assert main(["apply", str(delta), "--model", plain, "--output", again]) == 0
    capsys.readouterr()
    for a, b in (
        (file, again),
        (folder, file),
        (file, folder),
        (base, plain),
        (folder, str(delta)),
    ):
        assert main(["diff", a, b]) == 0, (a, b)
    assert "0 differ" in capsys.readouterr().out
    for a, b in ((base, folder), (base, file), (plain, file), (base, str(delta))):
        assert main(["diff", a, b]) == 1, (a, b)
    assert "20" not in capsys.readouterr().err


def test_diff_says_how_much(
    delta: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(folders["sd1"]), str(delta), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    tensors = load_file(delta)
    before = dict(original("sd1").unet.named_parameters())
    assert {d["name"] for d in told["differing"]} == tensors.keys()
    for row in told["differing"]:
        a, b = before[row["name"]].detach().double(), tensors[row["name"]].double()
        assert row["relative"] == pytest.approx(float((b - a).norm() / a.norm()))
        assert row["largest"] == pytest.approx(float((b - a).abs().max()))
    relatives = [row["relative"] for row in told["differing"]]
    assert relatives == sorted(relatives, reverse=True)
    assert main(["diff", str(folders["sd1"]), str(delta)]) == 1
    text = capsys.readouterr().out
    assert "0 tensors are equal, 80 differ" in text
    assert "down_blocks.0.attentions.0 " in text


def test_diff_of_what_is_no_match(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(2), "b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    save_file(
        {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1).half(), "d\n": torch.ones(1)},
        tmp_path / "b.safetensors",
    )
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [d.relative for d in found.differing] == [float("inf")]
    assert (found.equal, found.shapes, found.dtypes) == (1, ["b"], ["c"])
    assert (found.only_a, found.only_b) == ([], ["d\n"])
    assert not found.same
    with pytest.raises(FileNotFoundError):
        compare(tmp_path / "a.safetensors", tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_diff_of_a_folder_and_its_single_file(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    nothing = erasure_of(original(family))
    file = tmp_path / "f.safetensors"
    nothing.export(file, "single-file", model=folders[family], strength=0)
    assert compare(folders[family], file).same
    assert compare(file, folders[family]).same


def test_layers() -> None:
    assert (
        layer_of("unet.down_blocks.0.attentions.1.norm.weight") == "unet.down_blocks.0.attentions.1"
    )
    assert layer_of("conv_in.weight") == "conv_in"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--rank", "0", "--format", "lora"], "rank is 0"),
        (["--format", "single-file", "--rank", "3"], "rank and energy are a LoRA's"),
        (["--format", "single-file", "--model", "./nowhere"], "'./nowhere' does not exist"),
        (["--format", "single-file", "--strength", "nan"], "strength is nan"),
    ],
)
def test_bad_arguments_are_one_line(
    extra: list[str], said: str, delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output: Any = tmp_path / "o.safetensors"
    assert main(["export", str(delta), "--output", str(output), *extra]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not output.exists()


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == set(tiny.TINY) == set(tiny.FULL)
