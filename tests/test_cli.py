"""The command line as a person uses it."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from esd_fast.cli import main
from esd_fast.demo import model_path

GOLDEN = Path(__file__).parent / "golden"


def esd_fast(*arguments, cwd=".", check=True):
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as left:
            code = left.code or 0
    done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys, esd_fast.cli\n"
        "try: esd_fast.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    names = (
        "train",
        "fleet",
        "collect",
        "generate",
        "verify",
        "export",
        "apply",
        "diff",
        "info",
        "plan",
    )
    for command in ([], ["app"], *([name] for name in names)):
        arguments = [*command, "--help"]
        done = subprocess.run(  # noqa: PLW1510
            [sys.executable, "-P", "-c", code, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert done.returncode == 0, done.stderr
        assert "usage: esd-fast" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concept", " "], "concept is ' '"),
        (["--concept", "cat", "--method", "magic"], "train_method is 'magic'"),
        (["--concept", "cat", "--iterations", "0"], "iterations is 0"),
        (["--concept", "cat", "--learning-rate", "nan"], "learning_rate is nan"),
        (["--concept", "cat", "--resolution", "63"], "resolution is 63"),
        (["--concept", "cat", "--model", "./nowhere"], "'./nowhere' does not exist"),
        (["--concept", "cat", "--device", "toaster"], "device is 'toaster'"),
        (["--concept", "cat", "--pictures", "-1"], "--pictures is -1"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, said, tmp_path):
    done = esd_fast("train", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_main_job_erases_keeps_and_proves_it(tmp_path):
    """`esd-fast train --concept cat`, as the README's first command runs it."""
    esd_fast("train", "--concept", "cat", cwd=tmp_path)
    folder = tmp_path / "erased-cat"
    report = json.loads((folder / "report.json").read_text())
    assert report["concept"] == "cat"
    assert report["erased"]["images"] >= 32
    assert report["kept"]["images"] >= 64
    assert report["erased"]["before"] >= 0.8
    assert report["erased"]["after"] <= 0.15
    assert report["kept"]["after"] >= 0.85 * report["kept"]["before"]
    for key in ("method", "preset", "seconds", "unet_passes", "paths_taken", "peak_memory_bytes"):
        assert report[key]
    for key in ("attention", "guidance_loss", "cuda_graphs", "dtype"):
        assert report["paths_taken"][key]
    for picture in ("before_after.png", "loss.png"):
        with Image.open(folder / picture) as opened:
            assert opened.size[0] > 300
    assert "<html" in (folder / "report.html").read_text()
    (delta,) = folder.glob("*.safetensors")
    assert (
        delta.stat().st_mode == (folder / "report.json").stat().st_mode
    )  # as any file of a person
    unet = UNet2DConditionModel.from_pretrained(model_path() / "unet", dtype=torch.float32)
    found = unet.load_state_dict(load_file(delta), strict=False)
    assert not found.unexpected_keys


def test_odd_concept_on_a_folder_without_judge(tmp_path):
    """Slashes, quotes and a newline in the concept; another model; grid and report without rates."""
    concept = 'AC/DC "live"\nat <b>home</b>'
    esd_fast(
        "train", "--concept", concept, "--model", GOLDEN / "sd-ddim", "--iterations", 2,
        "--num-inference-steps", 4, "--pictures", 1, "--keep-prompt", "a dog",
        "--output", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["concept"] == concept
    assert "erased" not in report
    assert "<b>home" not in (tmp_path / "out" / "report.html").read_text()
    done = esd_fast("info", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["concept"] == concept


def test_earlier_results_are_not_replaced(tmp_path):
    settings = ["--concept", "cat", "--model", GOLDEN / "sd-ddim", "--iterations", 1,
                "--num-inference-steps", 2, "--pictures", 0]  # fmt: skip
    esd_fast("train", *settings, cwd=tmp_path)
    esd_fast("train", *settings, cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"erased-cat", "erased-cat-2"}
    done = esd_fast("train", *settings, "--output", tmp_path / "erased-cat", check=False)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr


def test_generate_and_verify_what_was_trained(tmp_path):
    esd_fast("train", "--concept", "cat", "--iterations", 1, "--num-inference-steps", 2,
             "--pictures", 0, "--method", "esd-x-strict", "--model", GOLDEN / "sd-ddim",
             "--output", tmp_path / "run")  # fmt: skip
    esd_fast("generate", "--prompt", "a cat", "--prompt", "a dog", "--images", 2,
             "--num-inference-steps", 3, "--erasure", tmp_path / "run", "--output",
             tmp_path / "pictures", "--model", GOLDEN / "sd-ddim")  # fmt: skip
    names = {str(p.relative_to(tmp_path / "pictures")) for p in tmp_path.glob("pictures/**/*.png")}
    pngs = ("a-cat-0.png", "a-cat-1.png", "a-dog-0.png", "a-dog-1.png")
    assert names == {"grid.png", *(f"{folder}/{png}" for folder in ("base", "run") for png in pngs)}
    with Image.open(tmp_path / "pictures" / "run" / "a-cat-1.png") as picture:
        assert picture.text["prompt"] == "a cat"
        assert picture.text["seed"] == "1"
    done = esd_fast("verify", tmp_path / "run", "--model", GOLDEN / "sd-ddim", check=False)
    assert done.returncode == 1
    assert "trained on these very weights" in done.stdout
    assert "nobody sees that" in done.stdout  # of one iteration


def test_generate_goes_on_after_a_kill(tmp_path):
    """Whatever is there is whole, and is not drawn again."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"thing {i}" for i in range(40)))
    arguments = ["generate", "--prompts", tmp_path / "prompts.txt", "--images", 1, "--model",
                 GOLDEN / "sd-ddim", "--num-inference-steps", 12, "--output", tmp_path / "out"]  # fmt: skip
    folder = tmp_path / "out" / "base"
    code = "import sys; from esd_fast.cli import main; sys.exit(main())"
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    while len(list(folder.glob("*.png"))) < 3:
        assert started.poll() is None
        time.sleep(0.02)
    started.kill()
    started.wait()
    there = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(there) < 40
    for name in there:
        with Image.open(folder / name) as picture:
            picture.load()
    done = esd_fast(*arguments, "--batch-size", 8)
    assert f"{40 - len(there)} pictures drawn, {len(there)} were there" in done.stdout
    now = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(now) == 40
    assert {name: now[name] for name in there} == there


def test_info_names_family_and_sizes():
    told = json.loads(esd_fast("info", model_path(), "--json").stdout)
    assert (told["family"], told["prediction_type"]) == ("sd1", "epsilon")
    assert told["native_resolution"] == 64
    assert json.loads(esd_fast("info", "--model", model_path(), "--json").stdout) == told
    assert (
        told["methods"]["esd-x"].endswith("in 35 tensors") or "tensors" in told["methods"]["esd-x"]
    )
    machine = json.loads(esd_fast("info", "--json").stdout)
    assert {"device", "paths", "versions", "presets", "methods"} <= set(machine)
