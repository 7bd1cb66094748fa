"""The command line as a person uses it: in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from esd_fast.demo import model_path

GOLDEN = Path(__file__).parent / "golden"


def esd_fast(*arguments, cwd=None, check=True):
    code = "import sys; from esd_fast.cli import main; sys.exit(main())"
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
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
    names = ("train", "generate", "export", "apply", "diff", "info", "plan")
    for command in ([], *([name] for name in names)):
        arguments = [*command, "--help"]
        done = subprocess.run(  # noqa: PLW1510
            [sys.executable, "-c", code, *arguments],
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


def test_generate_draws_both_sides_with_metadata(tmp_path):
    esd_fast("train", "--concept", "cat", "--iterations", 1, "--num-inference-steps", 2,
             "--pictures", 0, "--method", "esd-x-strict", "--model", GOLDEN / "sd-ddim",
             "--output", tmp_path / "run")  # fmt: skip
    esd_fast("generate", "--prompt", "a cat", "--prompt", "a dog", "--images", 2,
             "--num-inference-steps", 3, "--erasure", tmp_path / "run", "--output",
             tmp_path / "pictures", "--model", GOLDEN / "sd-ddim")  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert len(names) == 9
    with Image.open(tmp_path / "pictures" / "a-cat-1-erased.png") as picture:
        assert picture.text["prompt"] == "a cat"
        assert picture.text["seed"] == "1"


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
