"""The reference's command lines, each as its documentation has it, and what its notebooks do with the result."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import esd_fast
from esd_fast.cli import main, parser
from esd_fast.commands.reference_flags import reference_file, translated
from esd_fast.commands.train import config_of
from esd_fast.prompts import safe_name

from .pipelines import GOLDEN, pipeline

SD, SDXL, ALT, LDM = "esd_sd.py", "esd_sdxl.py", "esd_diffusers.py", "train-esd.py"
EVERY_SD = (
    "--basemodel_id CompVis/stable-diffusion-v1-4 --erase_concept 'Van Gogh' --erase_from painting "
    "--num_inference_steps 50 --guidance_scale 3 --train_method esd-x --iterations 200 --lr 5e-5 "
    "--batchsize 1 --resolution 512 --negative_guidance 2 --save_path esd-models/sd/ --device cuda:0"
)
EVERY_LDM = (
    "--prompt 'Van Gogh' --train_method xattn --start_guidance 3 --negative_guidance 1 "
    "--iterations 1000 --lr 1e-5 --seperator , --image_size 512 --ddim_steps 50 --devices 0,0 "
    "--config_path v1-inference.yaml --ckpt_path sd-v1-4-full-ema.ckpt "
    "--diffusers_config_path unet.json --regularize 0.0"
)


def config(line: str) -> tuple[Any, Any]:
    """What a command line asks for, after the script's name."""
    arguments = parser().parse_args(["train", *shlex.split(line)])
    translated(arguments)
    return arguments, config_of(arguments)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--erase_concept 'Van Gogh' --train_method 'esd-x'",
            {"concept": "Van Gogh", "train_method": "esd-x", "preset": "fast"},
        ),
        (
            EVERY_SD,
            {
                "concept": "Van Gogh",
                "erase_from": "painting",
                "num_inference_steps": 50,
                "guidance_scale": 3.0,
                "train_method": "esd-x",
                "iterations": 200,
                "learning_rate": 5e-5,
                "batch_size": 1,
                "resolution": 512,
                "negative_guidance": 2.0,
                "device": "cuda:0",
            },
        ),
        ("--erase_concept 'nudity' --train_method 'esd-u'", {"train_method": "esd-u"}),
        ("--erase_concept red --erase_from rose --train_method esd-a", {"erase_from": "rose"}),
        (
            "--erase_concept 'Van Gogh' --train_method xattn --preset paper-diffusers",
            {"train_method": "xattn", "rollout": "student"},
        ),
        ("--erase_concept 'car' --train_method noxattn --negative_guidance 1", {"concept": "car"}),
        (
            "--prompt 'Van Gogh' --train_method 'xattn'",
            {
                "concept": "Van Gogh",
                "preset": "paper",
                "train_method": "ldm-xattn",
                "iterations": 1000,
                "learning_rate": 1e-5,
                "negative_guidance": 1.0,
                "anchor": "null",
                "guidance_scale": 3.0,
            },
        ),
        (
            EVERY_LDM,
            {
                "train_method": "ldm-xattn",
                "guidance_scale": 3.0,
                "resolution": 512,
                "num_inference_steps": 50,
                "device": "cuda:0",
                "schedule": "paper",
            },
        ),
        ("--prompt 'i2p' --train_method full", {"train_method": "ldm-full"}),
        ("--prompt allartist --train_method selflayer", {"train_method": "ldm-selflayer"}),
        ("--prompt artifact --train_method notime", {"train_method": "ldm-notime"}),
        ("--prompt 'cat, dog' --train_method noxattn", {"concept": "cat, dog"}),
        (
            "--prompt 'cat, Van Gogh,' --seperator , --train_method xattn",
            {"concept": ("cat", "Van Gogh"), "preset": "paper", "iterations": 1000},
        ),
        ("--prompt 'cat dog' --seperator ' ' --train_method xattn", {"concept": ("cat", "dog")}),
        ("--prompt 'cat' --seperator , --train_method xattn", {"concept": "cat"}),
        (
            "--concept cat --concept dog --erase-from animal",
            {"concepts": ("cat", "dog"), "sources": ("animal", "animal"), "iterations": 400},
        ),
        (
            "--concept cat --concept dog --erase-from animal --erase-from '' --concept-weights 1 2.5",
            {"sources": ("animal", None), "concept_weights": (1.0, 2.5)},
        ),
    ],
)  # fmt: skip
def test_command_lines(line: str, expected: dict[str, Any]) -> None:
    _, asked = config(line)
    assert {name: getattr(asked, name) for name in expected} == expected


def test_word_lists_and_models() -> None:
    assert config("--prompt i2p --train_method full")[1].concept.startswith("hate, harassment")
    assert config("--prompt allartist --train_method full")[1].concept.endswith("Kilian Eng")
    assert config("--prompt artifact --train_method full")[1].concept.startswith("ugly, tiling")
    assert len(config("--prompt i2p --seperator , --train_method full")[1].concepts) == 11
    assert config(EVERY_SD)[0].model == "CompVis/stable-diffusion-v1-4"
    assert config(EVERY_LDM)[0].model == "sd-v1-4-full-ema.ckpt"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--prompt 'cat, dog,cat' --seperator , --train_method xattn", "'cat' more than once"),
        ("--concept cat --erase-from ''", "erase_from is ''"),
        ("--concept cat --concept dog --erase-from a --erase-from b --erase-from c", "each of 2"),
        ("--concepts-file nowhere.txt", "'nowhere.txt' does not exist"),
        ("--prompt , --seperator , --train_method xattn", "--prompt is ''"),
        ("--prompt cat --train_method xattn --regularize 0.1", "--regularize is 0.1"),
        ("--concept cat --ddim_steps 20", "--ddim_steps is the paper's script's"),
        ("--erase_concept cat --train_method magic", "train_method is 'magic'"),
    ],
)
def test_what_is_refused(line: str, said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        config(line)


def test_concepts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "concepts.txt").write_text("cat\n\n  Van Gogh, late \nflat style\n")
    asked = config(f"--concepts-file '{tmp_path / 'concepts.txt'}' --erase-from picture")[1]
    assert asked.concepts == ("cat", "Van Gogh, late", "flat style")
    (tmp_path / "concepts.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"concepts\.txt holds no prompt"):
        config(f"--concepts-file '{tmp_path / 'concepts.txt'}'")


@pytest.mark.parametrize("line", ["--concept a --prompt b", "--concept a --concepts-file b"])
def test_one_concept_is_named(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["train", *shlex.split(line)])
    said = capsys.readouterr().err
    assert "not allowed with argument --concept/--erase_concept" in said
    assert said.count("\n") == 1


def test_a_concept_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train_method", "esd-x"]) == 2
    assert "what to erase is missing: --concept" in capsys.readouterr().err


def test_file_names() -> None:
    folder = Path("esd-models/sd")
    name = "esd-golden_retriever-from-golden_retriever-esdu.safetensors"  # of its notebook
    assert reference_file(folder, ["golden retriever"], [None], "esd-u") == folder / name
    assert reference_file(folder, ["red"], ["a rose"], "esd-x-strict").name == (
        "esd-red-from-a_rose-esdxstrict.safetensors"
    )
    assert reference_file(folder, ["cat", "Van Gogh"], [None, None], "esd-x").name == (
        "esd-cat+Van_Gogh-from-cat+Van_Gogh-esdx.safetensors"
    )
    assert reference_file(folder, ["cat", "dog", "ink"], ["pet", "pet", None], "esd-x").name == (
        "esd-cat+dog+ink-from-pet+ink-esdx.safetensors"
    )
    odd = reference_file(folder, ["AC/DC\n.."], [None], "up_blocks.*attn2")
    assert odd.parent == folder
    assert odd.name.startswith(f"esd-{safe_name('AC/DC' + chr(10) + '..')}-from-")


def test_a_run_and_the_notebooks_way_of_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """esd_inference_sd.ipynb: load_file, load_state_dict(strict=False), and back again."""
    line = (
        f"--basemodel_id '{GOLDEN / 'sd-ddim'}' --erase_concept 'red apple' --train_method esd-x "
        f"--iterations 2 --num_inference_steps 3 --lr 1e-3 --save_path '{tmp_path / 'esd-models'}/' "
        "--device cpu --pictures 0"
    )
    assert main(["train", *shlex.split(line)]) == 0
    file = tmp_path / "esd-models" / "esd-red_apple-from-red_apple-esdx.safetensors"
    pipe = StableDiffusionPipeline.from_pretrained(
        GOLDEN / "sd-ddim", dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    original = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    weights = load_file(file)
    found = pipe.unet.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    ours = pipeline()
    esd_fast.load(tmp_path / "esd-models" / "erased-red-apple").apply(ours)
    now = pipe.unet.state_dict()
    assert all(t.equal(now[n]) for n, t in ours.unet.state_dict().items())
    assert any(not t.equal(now[n]) for n, t in original.items())
    pipe.unet.load_state_dict(original, strict=False)
    # a second run there: the same concept is not replaced, another one goes beside it
    capsys.readouterr()
    assert main(["train", *shlex.split(line)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", *shlex.split(line.replace("red apple", "fish"))]) == 0
    assert len(list((tmp_path / "esd-models").glob("esd-*.safetensors"))) == 2


def test_a_run_over_several_words(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    line = (
        f"--ckpt_path '{GOLDEN / 'sd-ddim'}' --prompt 'red apple, a fish' --seperator , --lr 1e-3 "
        f"--train_method xattn --iterations 3 --ddim_steps 4 --save_path '{folder}' --pictures 0"
    )
    assert main(["train", *shlex.split(line), "--device", "cpu"]) == 0
    name = "red_apple+a_fish"
    made = esd_fast.load(folder / f"esd-{name}-from-{name}-ldmxattn.safetensors")
    assert made.concepts == ("red apple", "a fish")
    assert made.manifest["concept"] == "red apple, a fish"
    assert made.manifest["config"]["rollout"] == "student"
    assert esd_fast.load(folder / "erased-red-apple+a-fish").concepts == made.concepts
