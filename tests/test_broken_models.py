"""Broken models and erasures of every kind, through the commands that read them: one line that names what is broken,
and nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast.config import EraseConfig, Loading
from esd_fast.evaluation.report import write_report
from esd_fast.models import load_model, look_at
from esd_fast.terminal import LONGEST, one_line, quoted, tell, visible

from . import broken_models, pipelines
from .broken_models import ERASURES, ESCAPES, FIRST, FOLDERS, SAID, manifest, tree
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
call = broken_models.call
QUICK = ["--num-inference-steps", "2", "--device", "cpu"]
SHORT = ["--iterations", "2", "--pictures", "0", *QUICK]
# the first words of a kind in FOLDERS -> what its error has to speak of
SPOKEN_OF = {
    "index": r"model_index\.json|cannot be loaded: .* has no class|no UNet",
    "pipeline class": "of no family known",
    "no index": r"model_index\.json",
    "no text encoder": "model/text_encoder is not there",
    "no ": "model/(unet|vae|tokenizer|scheduler) is not there",
    "unet": "unet|cannot be loaded|no UNet",
    "weights": "unet|cannot be loaded: .*shape|of its layers",
    "text encoder": "text.encoder",
    "vae": "vae",
    "tokenizer": "model/tokenizer/tokenizer",
    "scheduler": "[Ss]cheduler",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_broken_folder(kind: str, tmp_path: Path, call: Callable[..., Any]) -> None:
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    FOLDERS[kind](tmp_path / "model")
    before = tree(tmp_path)
    code, out, err = call("train", "--concept", "cat", "--model", "model", *SHORT)
    assert code in (1, 2)
    assert out == ""
    assert "\n" not in err
    assert err.startswith("esd-fast: ")
    assert "Error: " not in err
    assert visible(err) == err
    spoken = next(said for first, said in SPOKEN_OF.items() if kind.startswith(first))
    assert re.search(spoken, err)
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("erased*"))
    code, _, err = call("info", "model")  # configurations alone
    assert code in (0, 1, 2)
    assert "\n" not in err
    assert "Error: " not in err


def test_code_of_a_models_own_is_not_run(tmp_path: Path) -> None:
    """diffusers would load unet/evil.py of such a folder, where it is told to trust it."""
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    FOLDERS["index of code"](tmp_path / "model")
    trace = tmp_path / "ran"
    (tmp_path / "model/unet/evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    for read in (load_model, lambda m, c: look_at(str(m), c.loading)):
        with pytest.raises(ValueError, match="a model's own code is not run"):
            read(tmp_path / "model", EraseConfig("cat", device="cpu", allow_pickle=True))
    assert not trace.exists()


def test_shards_lie_beside_their_index(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    index = tmp_path / "model/unet/diffusion_pytorch_model.safetensors.index.json"
    for name in ("../../elsewhere.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(ValueError, match="must name files beside it"):
            look_at(str(tmp_path / "model"), Loading())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    parameters = pipelines.pipeline().unet.named_parameters()
    return {n: p.detach() + 0.01 for n, p in parameters if "attn2.to_k" in n}


def readers(file: str) -> dict[str, list[str]]:
    return {
        "info": ["info", file],
        "verify": ["verify", file, "--model", "model", "--images", "0", *QUICK],
        "generate": ["generate", "--prompt", "cat", "--images", "1", "--erasure", file, "--model", "model", *QUICK],
        "export": ["export", file, "--model", "model", "--format", "lora", "--output", "o.safetensors"],
        "apply": ["apply", file, "--model", "model", "--output", "o"],
        "diff": ["diff", "model", file],
        "model": ["train", "--concept", "cat", "--model", file, *SHORT],
        "resume": ["train", "--resume", file],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ERASURES)
def test_broken_erasure(
    kind: str, tensors: dict[str, torch.Tensor], tmp_path: Path, call: Callable[..., Any]
) -> None:
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    file = kind if "." in kind else f"{kind}.safetensors"
    ERASURES[kind](tmp_path / file, tensors)
    before = tree(tmp_path)
    for name, line in readers(file).items():
        code, out, err = call(*line)
        # tensors that are named and sized well can be shown and compared, whatever they are worth
        shown = name in ("info", "verify", "diff") and code in (0, 1) and not err
        refused = code in (1, 2) and err.startswith("esd-fast: ") and not out
        assert shown or refused, (name, code, out, err)
        assert "\n" not in err, name
        assert "Error: " not in err, (name, err)
        assert visible(out + err) == out + err, name
        assert tree(tmp_path) == before, name
        if name == "verify":
            assert code == 1, out
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.parent.glob("climbed*"))


@pytest.mark.parametrize("kind", SAID)
def test_what_a_stranger_says_stays_text(
    kind: str, tensors: dict[str, torch.Tensor], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """On a terminal it is escaped; as a name it stays in the folder; as an expression it is not run."""
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    manifest(**SAID[kind])(tmp_path / "d.safetensors", tensors)
    lines = readers("d.safetensors")
    for name in ("info", "verify", "generate", "export", "diff"):
        code, out, err = call(*lines[name])
        assert code in (0, 1), (name, err)
        assert visible(out + err) == out + err, name
    code, out, _ = call("info", "d.safetensors", "--json")
    told = json.loads(out)
    said = {k: v for k, v in SAID[kind].items() if k != "losses"}  # which it leaves out
    assert {k: told[k] for k in said} == said
    copy = esd_fast.load("d.safetensors").save(tmp_path / "copies")
    assert copy.parent == tmp_path / "copies"
    assert len(copy.name.encode()) < 255
    allowed = {"model", "d.safetensors", "pictures", "o.safetensors", "copies"}
    assert {p.name for p in tmp_path.iterdir()} == allowed
    assert not list(tmp_path.parent.glob("climbed*"))


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


MARKUP = "\"'></p><script>alert(1)</script><img src=x onerror=alert(1)><!--" + ESCAPES


def test_pages_of_evaluations_and_reports_hold_no_markup_of_strangers(tmp_path: Path) -> None:
    from esd_fast.evaluation.eval_page import render_evaluation

    def told(text: str) -> dict[str, Any]:
        rates = {"UA": {"rate": 0.5, "images": 4}, text: 1.0}
        return {
            "erasures": {text: {"concept": text, "erased": [text], "file": text, text: text}},
            "metrics": {
                "judge": {"detector": text, "version": text, "by_erasure": {text: rates}},
                text: {"detector": text, "by_erasure": {text: {}}},
            },
            "not_measured": {text: text},
            "pictures": {"model": text, "images": text, text: text},
            "versions": {text: text},
        }

    plain, hostile = (
        Tags(render_evaluation(told(text), None, {text: None})) for text in ("cat", MARKUP)
    )
    assert hostile.tags <= plain.tags
    assert hostile.attributes <= plain.attributes
    assert "script" not in hostile.tags
    pages = []
    for name, text in (("plain", "cat"), ("hostile", MARKUP)):
        page = write_report(tmp_path / name, {"concept": text, "more": {text: [text, {text: 1}]}})
        pages.append(Tags(page.read_text()))
    assert pages[1].tags <= pages[0].tags
    assert pages[1].attributes <= pages[0].attributes


def test_terminal_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("猫 é\u200d\t\n") == "猫 é\u200d\t\n"
    assert visible("\x1b[2J\x07\u202e\ud800\x9b") == r"\x1b[2J\x07\u202e\ud800\x9b"
    assert one_line(" a\n\n b\r\tc ") == "a b c"
    assert len(one_line("x" * 10**6)) < LONGEST
    assert quoted("x") == "'x'"
    assert len(quoted(["y" * 10**6])) < 300
    assert quoted(10**5000) == "a int that is too long to show"
    tell("caf\u00e9 \x1b[0m")
    assert capsys.readouterr().out == "caf\u00e9 \\x1b[0m\n"


def test_a_terminal_that_knows_ascii_alone() -> None:
    import io

    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tell("caf\u00e9 猫", file)
    file.flush()
    assert file.buffer.getvalue() == b"caf\\xe9 \\u732b\n"  # type: ignore[attr-defined]


def test_commands_speak_through_tell() -> None:
    """`print` would send what a file says to the terminal as it is."""
    for file in (Path(esd_fast.__file__).parent / "commands").glob("*.py"):
        assert not re.search(r"(?<!\w)print\(", file.read_text()), file


def test_nan_weights_are_not_put_anywhere(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ERASURES["NaN"](tmp_path / "nan.safetensors", tensors)
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    with pytest.raises(ValueError, match=f"holds NaN or infinity \\({re.escape(FIRST)}\\)"):
        esd_fast.load(tmp_path / "nan.safetensors").apply(pipe)
    pipelines.assert_same_weights(pipe, before)
    assert [p.name for p in tmp_path.iterdir()] == ["nan.safetensors"]
