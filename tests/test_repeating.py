"""`esd-fast train --manifest`: a finished run again, bit for bit, from whatever file holds its manifest."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import esd_fast
from esd_fast.cli import main
from esd_fast.erasure import fingerprint
from esd_fast.repeating import Recorded, recorded

from . import pipelines
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
# all that a manifest has to hold: several concepts, each from another prompt, weights, no default
SETTINGS = [
    *("--concept", "a cat, sitting", "--concept", "red apple"),
    *("--erase-from", "an animal", "--erase-from", "", "--concept-weights", "1", "0.5"),
    *("--preset", "fast", "--method", "esd-x-strict", "--iterations", "4", "--batch-size", "2"),
    *("--learning-rate", "1e-3", "--num-inference-steps", "5", "--guidance-scale", "2.5"),
    *("--keep-vocabulary", "0.5", "--seed", "7", "--optimizer", "adamw", "--weight-decay", "0.02"),
    *("--max-grad-norm", "0.5"),
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in another process."""
    folder = tmp_path_factory.mktemp("first")
    code = "import sys, torch; torch.set_num_threads(1); from esd_fast.cli import main; sys.exit(main())"
    model = ["--model", str(GOLDEN / "sd-ddim"), "--output", str(folder)]
    subprocess.run(
        [sys.executable, "-P", "-c", code, "train", *SETTINGS, *model],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    return folder


@pytest.fixture
def manifest(first: Path, tmp_path: Path) -> Iterator[Any]:
    """manifest(**changes): a file with that run's manifest, changed."""

    def write(**changes: Any) -> Path:
        told = json.loads((first / "manifest.json").read_text()) | changes
        file = tmp_path / "run.json"
        file.write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))
        return file

    return write


def again(manifest: Path, folder: Path, *arguments: str) -> int:
    return main(["train", "--manifest", str(manifest), "--output", str(folder), *arguments])


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    (delta,) = folder.glob("esd-*.safetensors")
    return load_file(delta)


@pytest.mark.parametrize("kind", ["manifest.json", "report.json", "delta", "folder"])
def test_the_same_bits(kind: str, first: Path, tmp_path: Path, capsys: Any) -> None:
    files = {"folder": first, "delta": next(first.glob("esd-*.safetensors"))}
    assert again(files.get(kind, first / kind), tmp_path) == 0
    assert fingerprint(tensors_in(tmp_path)) == fingerprint(tensors_in(first))
    was, now = (json.loads((f / "manifest.json").read_text()) for f in (first, tmp_path))
    assert was["losses"] == now["losses"]
    assert was["result_fingerprint"] == now["result_fingerprint"] == fingerprint(tensors_in(first))
    auto = {"given", "dtype", "device"}  # what they came to is said now
    assert {k: v for k, v in was["config"].items() if k not in auto} == {
        k: v for k, v in now["config"].items() if k not in auto
    }
    said = capsys.readouterr()
    assert "the same bits as " in said.out
    assert "note:" not in said.err


def test_the_same_threads_and_pictures(manifest: Any, tmp_path: Path) -> None:
    drawn = {"columns": 1, "keep_prompts": ["a dog"]}
    file = manifest(threads=2, pictures=drawn)
    assert again(file, tmp_path / "out", "--iterations", "1") == 0
    assert torch.get_num_threads() == 2
    now = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (now["threads"], now["pictures"]) == (2, drawn)
    assert (tmp_path / "out" / "before_after.png").is_file()


def test_options_come_first(first: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--iterations", "2", "--concept", "red apple", "--concept", "dog", "--seed", "7"]
    assert again(first, tmp_path, *options) == 0
    said = capsys.readouterr()
    over = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert len(over) == 1
    assert "concept ('red apple', 'dog')" in over[0]
    assert "iterations 2" in over[0]
    assert "seed" not in over[0]  # is what it was
    assert "the same bits" not in said.out
    now = json.loads((tmp_path / "manifest.json").read_text())
    assert now["config"]["iterations"] == 2
    assert now["concepts"] == ["red apple", "dog"]
    assert now["config"]["learning_rate"] == 1e-3


def test_another_model_is_refused(first: Path, manifest: Any, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "model"
    shutil.copytree(GOLDEN / "sd-ddim", other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1  # which no method of attn2 trains
    save_file(weights, file)
    out = tmp_path / "out"
    assert again(first, out, "--model", str(other)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    digest = json.loads((first / "manifest.json").read_text())["base_digest"]
    assert f"{other} is another model" in said
    assert f"had {digest}" in said
    assert again(first, out, "--model", str(other), "--allow-other-base") == 0
    assert "the same bits" not in capsys.readouterr().out
    # a copy elsewhere is the same model; one that is gone is asked for
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN / "sd-ddim", copy)
    assert again(first, tmp_path / "copied", "--model", str(copy)) == 0
    assert "the same bits" in capsys.readouterr().out
    assert again(manifest(model="./gone"), tmp_path / "gone") == 2
    assert "'./gone' does not exist" in capsys.readouterr().err


def test_what_is_made_anew_with_other_versions(manifest: Any, tmp_path: Path, capsys: Any) -> None:
    now = json.loads(manifest().read_text())["versions"]
    other = manifest(versions=now | {"torch": "2.0.0"}, result_fingerprint="0" * 16)
    assert again(other, tmp_path / "out") == 0
    said = capsys.readouterr()
    told = f"torch 2.0.0, now {now['torch']}"
    assert f"note: made with other versions: {told}" in said.err
    assert f"not the bits of {other}: {told}" in said.out


def test_another_dtype_is_not_compared(first: Path, tmp_path: Path, capsys: Any) -> None:
    assert again(first, tmp_path / "out", "--dtype", "bfloat16") == 0
    said = capsys.readouterr()
    assert "note: another dtype was asked for: the model is not compared" in said.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "paper"], "--preset is 'paper'; it must be left out with --manifest"),
        (["--prompt", "cat"], "--prompt is 'cat'; it must be left out with --manifest"),
        (["--resume", "x"], "--resume is 'x'; it must be left out with --manifest"),
        (["--iterations", "0"], "iterations is 0"),
    ],
)
def test_options_that_do_not_go_with_it(
    options: list[str], said: str, first: Path, tmp_path: Path, capsys: Any
) -> None:
    assert again(first, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": ...}, "holds no settings of a run"),
        ({"config": []}, "holds no settings of a run"),
        ({"config": {"concept": "cat", "colour": 1}}, "config is of another version"),
        ({"config": {"concept": "cat", "iterations": "many"}}, "iterations is 'many'"),
        ({"config": {"concept": "cat", "preset": []}}, "preset is []"),
        ({"given": ["words"]}, "was given words in Python"),
        ({"extra_concepts": 2}, "was given extra in Python"),
        ({"hardening": {"rounds": "two"}}, "rounds is 'two'"),
        ({"threads": 0}, "threads is 0"),
        ({"model": "pipeline"}, "--model names what it was loaded from"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"collect_batch_size": -1}, "collect_batch_size is -1"),
    ],
)
def test_manifests_of_other_kinds(
    changes: dict[str, Any], said: str, manifest: Any, tmp_path: Path, capsys: Any
) -> None:
    assert again(manifest(**changes), tmp_path / "out") == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "run.json is damaged"),
        (b"{", "run.json is damaged"),
        (b"\xff\xfe", "run.json is damaged"),
        (b"[1]", "is no manifest"),
        (b"[" * 100_000, "run.json is damaged: nested too deeply"),
        (b"1" * 5000, "run.json is damaged"),
        (b" " * (2**24 + 1), "too many for a manifest"),
    ],
)
def test_files_that_are_no_manifest(content: bytes, said: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    assert again(file, tmp_path / "out") == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1


def test_places_without_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.json' does not exist"):
        recorded(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"holds 0 files"):
        recorded(tmp_path)
    # the reference's files have no settings
    file = tmp_path / "esd-cat-from-cat-esdx.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"erase_concept": "cat"})
    with pytest.raises(ValueError, match="holds no settings of a run"):
        _ = recorded(file).config


def test_what_auto_came_to(manifest: Any) -> None:
    """A probe of the processor, which may answer otherwise next time, chose the dtype."""
    config = recorded(manifest(dtype="bfloat16", collect_batch_size=2)).config
    assert (config.dtype, config.device, config.collect_batch_size) == ("bfloat16", "cpu", 2)


def test_consent_to_pickles_is_asked_anew(manifest: Any) -> None:
    told = json.loads(manifest().read_text())["config"]
    assert recorded(manifest(config=told | {"allow_pickle": True})).config.allow_pickle is False


def test_hardening_began_with_fewer_steps() -> None:
    """Each round takes them once more; harden's own manifest, as test_hardening.py makes it."""
    erasure = esd_fast.erase(pipelines.pipeline(), "cat", **pipelines.SHORT)
    longer = erasure.manifest["config"] | {"iterations": 3 * 4}
    told = erasure.manifest | {"config": longer, "hardening": {"rounds": 2}, "extra_concepts": 2}
    found = Recorded(Path("run.json"), told)
    assert (found.rounds, found.config.iterations) == (2, 4)
