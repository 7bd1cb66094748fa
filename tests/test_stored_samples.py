"""Samples that were collected once: runs on them end with the bits of runs that collect themselves."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import esd_fast
from esd_fast import EraseInterrupted
from esd_fast.cli import main
from esd_fast.collect import TeacherSamples
from esd_fast.erasure import Erasure
from esd_fast.run_state import checkpoints_in
from esd_fast.stored_samples import SAMPLES_KEY, StoredSamples, read_samples

from . import pipelines
from .pipelines import GOLDEN, same_bits

one_thread = pipelines.one_thread
SHORT: dict[str, Any] = {
    "concept": "cat",
    "iterations": 6,
    "num_inference_steps": 4,
    "learning_rate": 1e-3,
    "train_method": "esd-x",
}
COLLECTED: dict[str, dict[str, Any]] = {
    "one": {},
    "erase-from": {"erase_from": "animal", "batch_size": 2},
    "several": {"concept": ["cat", "red apple"]},
    "preserve": {"preserve": ["a fish", "bicycle"], "iterations": 9},
    "reference": {"preset": "reference", "concept": ["cat", "red apple"], "batch_size": 2},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy 2 in diffusers' schedulers


def erase(pipe: Any = None, **settings: Any) -> Erasure:
    return esd_fast.erase(pipe or pipelines.pipeline(), **settings)


def collected(path: Path, pipe: Any = None, **settings: Any) -> Path:
    pipe = pipe or pipelines.pipeline()
    return esd_fast.collect_samples(pipe, **SHORT | settings).save(path)


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collected(tmp_path_factory.mktemp("samples"))


def assert_same(ours: Erasure, truth: Erasure) -> None:
    assert ours.tensors.keys() == truth.tensors.keys()
    assert all(same_bits(t, truth.tensors[n]) for n, t in ours.tensors.items())
    assert ours.manifest["losses"] == truth.manifest["losses"]


# ------------------------------------------------------------------------------------- the bits of a whole run


@pytest.mark.parametrize("name", COLLECTED)
def test_a_run_on_stored_samples_is_one_that_collects(name: str, tmp_path: Path) -> None:
    settings = COLLECTED[name]
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    file = collected(tmp_path, pipe, **settings)
    pipelines.assert_same_weights(pipe, before)
    assert all(not p.is_inference() and p.requires_grad for p in pipe.unet.parameters())
    for free in (
        {"train_method": "esd-x"},
        {"train_method": "esd-u", "learning_rate": 3e-4, "negative_guidance": 5.0},
    ):
        ours = erase(samples=file, **{"learning_rate": 1e-3} | free)
        truth = erase(**SHORT | settings | free)
        assert_same(ours, truth)
        assert ours.manifest["unet_passes"]["collect"] == 0
        told = ours.manifest["samples_file"]
        assert told["unet_passes_spared"] == truth.manifest["unet_passes"]["collect"]
        assert told["checksum"] == read_samples(file).checksum
        assert "samples_file" not in truth.manifest


@pytest.mark.parametrize(("iterations", "lacking"), [(3, 0), (6, 0), (10, 8), (20, 24)])
@pytest.mark.parametrize("preserve", [(), ("a fish",)])
def test_iterations_are_free(
    iterations: int, lacking: int, preserve: tuple[str, ...], tmp_path: Path
) -> None:
    """6 steps take 2 trajectories of 4 states; what more steps take is collected. Two preserved
    ones go side by side where there are as many: the same but for rounding."""
    alone = {"collect_batch_size": 1, "preserve": preserve}
    file = collected(tmp_path, **alone)
    free = {"iterations": iterations, "learning_rate": 1e-3}
    ours = erase(samples=file, **free, **alone)
    truth = erase(**SHORT | free | alone)
    if preserve:
        assert ours.manifest["losses"] == pytest.approx(truth.manifest["losses"], rel=1e-4)
    else:
        assert_same(ours, truth)
    assert ours.manifest["unet_passes"]["collect"] == lacking + (lacking // 2 if preserve else 0)


def test_what_is_not_said_is_as_it_was_there(tmp_path: Path) -> None:
    settings = {"concept": ["cat", "dog"], "seed": 5, "guidance_scale": 2.0, "batch_size": 2}
    file = collected(tmp_path, **settings)
    config = erase(samples=file).manifest["config"]
    assert config["concept"] == ("cat", "dog")
    assert [config[n] for n in ("seed", "guidance_scale", "batch_size", "iterations")] == [
        *(5, 2.0, 2, 6)
    ]
    assert config["learning_rate"] == 5e-5  # the recipe's: it is no matter of samples
    assert read_samples(tmp_path).decisive["resolution"] == config["resolution"] == 64


def test_samples_need_no_file() -> None:
    stored = esd_fast.collect_samples(pipelines.pipeline(), **SHORT)
    ours = erase(samples=stored, learning_rate=1e-3)
    assert_same(ours, erase(**SHORT))
    assert ours.manifest["samples_file"]["path"] is None


def test_the_setting_of_that_name_still_works() -> None:
    assert erase(**SHORT, samples="last").manifest["config"]["samples"] == "last"


def test_a_stopped_run_goes_on_without_the_file(tmp_path: Path) -> None:
    file = collected(tmp_path / "s.safetensors", collect_batch_size=1)

    def stop(step: Any) -> None:
        if step.iteration == 2:
            raise KeyboardInterrupt

    free = {"learning_rate": 1e-3, "iterations": 10, "collect_batch_size": 1, "resolution": 64}
    with pytest.raises(EraseInterrupted):
        erase(samples=file, checkpoints=tmp_path / "run", on_step=stop, **free)
    with safe_open(checkpoints_in(tmp_path / "run")[0], "pt") as checkpoint:
        names = {n for n in checkpoint.keys() if n.startswith("samples.")}  # noqa: SIM118
    assert names == load_file(file).keys()  # one format
    file.unlink()
    ours = erase(resume=tmp_path / "run", **SHORT | free | {"dtype": "float32"})
    assert_same(ours, erase(**SHORT | free))
    assert ours.manifest["unet_passes"]["collect"] == 8  # the third trajectory
    assert ours.manifest["samples_file"]["samples"] == 8


# -------------------------------------------------------------------------------------------- what contradicts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concept": "dog"}, "was collected with concept 'cat', now 'dog'"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"guidance_scale": 7.5}, r"guidance_scale 3.0, now 7.5"),
        ({"num_inference_steps": 5}, "num_inference_steps 4, now 5"),
        ({"resolution": 128}, "resolution 64, now 128"),
        ({"erase_from": "animal"}, "erase_from None, now 'animal'"),
        ({"preserve": ["dog"]}, r"preserve \[\], now \['dog'\]"),
        ({"preset": "paper"}, "rollout 'frozen', now 'student'"),
        ({"preset": "reference"}, "samples 'all', now 'last'"),
    ],
)
def test_other_settings_are_refused_before_anything_is_loaded(
    plain_file: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        esd_fast.erase("./no-such-model", samples=plain_file, **settings)
    assert str(plain_file) in str(refused.value)


def other_scheduler(kind: Any, **changed: Any) -> Any:
    pipe = pipelines.pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changed)
    return pipe


def other_weights(part: str) -> Any:
    pipe = pipelines.pipeline()
    with torch.no_grad():
        next(getattr(pipe, part).parameters())[0] += 1e-3
    return pipe


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: other_scheduler(PNDMScheduler), "scheduler class 'DDIMScheduler', now 'PNDM"),
        (lambda: other_scheduler(DDIMScheduler, beta_end=0.02), "scheduler beta_end 0.012, now"),
        (lambda: other_weights("unet"), "is of another model"),
        (lambda: other_weights("text_encoder"), "is of another model"),
        (lambda: pipelines.pipeline("sd-v-ddim"), "scheduler prediction_type 'epsilon', now 'v_"),
    ],
)
def test_another_model_is_refused(plain_file: Path, make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        erase(make(), samples=plain_file)


def test_another_dtype_is_refused(plain_file: Path) -> None:
    pipe = pipelines.pipeline(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is 'float32', the pipeline is bfloat16"):
        erase(pipe, samples=plain_file)
    with pytest.raises(ValueError, match="collected with dtype 'float32', now 'bfloat16'"):
        erase(pipe, samples=plain_file, dtype="bfloat16")


def test_a_students_samples_are_nobody_elses() -> None:
    with pytest.raises(ValueError, match="preset is 'paper', in which the UNet in training draws"):
        esd_fast.collect_samples("./no-such-model", "cat", preset="paper")


def test_files_that_hold_none(plain_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="do not exist"):
        read_samples(tmp_path / "none.safetensors")
    file = tmp_path / "x.safetensors"
    tensors = load_file(plain_file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds no samples; `esd-fast collect` writes them"):
        read_samples(file)
    content = bytearray(plain_file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        read_samples(file)
    file.write_bytes(plain_file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_samples(file)


def test_a_newer_format_is_refused(
    plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_samples(plain_file)
    monkeypatch.setattr("esd_fast.stored_samples.FORMAT", 2)
    newer = stored.save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2 of the format; this esd-fast reads 1"):
        read_samples(newer)


def test_the_file_is_plain_safetensors(plain_file: Path) -> None:
    """As another program would read it."""
    with safe_open(plain_file, "pt") as opened:
        assert SAMPLES_KEY in opened.metadata()
    tensors = load_file(plain_file)
    assert {n.removeprefix("samples.") for n in tensors} <= {f.name for f in fields(TeacherSamples)}
    assert tensors["samples.latents"].shape == (8, 4, 8, 8)
    stored = read_samples(plain_file)
    assert (len(stored), stored.erased, stored.unet_passes) == (8, 8, 16)
    assert isinstance(stored, StoredSamples)
    assert stored.versions["torch"] == torch.__version__


# -------------------------------------------------------------------------------------------- command line


def test_collect_and_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(GOLDEN / "sd-ddim")
    how = ["--iterations", "6", "--num-inference-steps", "4", "--device", "cpu"]
    (tmp_path / "kept.txt").write_text("a fish\nbicycle\n")
    kept = ["--preserve", "red apple", "--preserve-file", "kept.txt"]
    assert main(["collect", "--model", model, "--concept", "AC/DC", *kept, *how]) == 0
    (file,) = tmp_path.glob("samples-AC-DC-*.safetensors")
    assert read_samples(file).config["preserve"] == ["red apple", "a fish", "bicycle"]
    said = capsys.readouterr().out
    assert f"esd-fast train --samples {file.name} takes them" in said
    assert "20 samples, 12 of them of what is preserved: 28 UNet passes" in said
    assert main(["info", file.name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["preserved"], told["unet_passes"]) == (20, 12, 28)
    assert main(["collect", "--model", model, "--concept", "AC/DC", *kept, *how]) == 2
    assert "exists; --overwrite" in capsys.readouterr().err

    tuned = ["--method", "esd-u", "--learning-rate", "1e-3", "--pictures", "0", "--device", "cpu"]
    taken = ["--samples", file.name]
    assert main(["train", *taken, *tuned, "--output", "ours"]) == 0
    own = ["--model", model, "--concept", "AC/DC", *kept, *how]
    assert main(["train", *own, *tuned, "--output", "truth"]) == 0
    assert_same(esd_fast.load("ours"), esd_fast.load("truth"))
    for wrong, told in (
        (["--concept", "dog"], "was collected with concept 'AC/DC', now 'dog'"),
        (["--resume", "ours"], "--samples and --resume do not go together"),
        (["--harden", "1"], "--samples and --harden do not go together"),
    ):
        capsys.readouterr()
        assert main(["train", *taken, *wrong]) == 2
        assert told in capsys.readouterr().err
