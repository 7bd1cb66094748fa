"""What `verify` says of a right file, and of every kind of wrong one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import esd_fast
from esd_fast.cli import main
from esd_fast.commands import verify as command
from esd_fast.config import EraseConfig
from esd_fast.erasure import Erasure
from esd_fast.evaluation.key_kinds import known_unets, what_it_is_for
from esd_fast.evaluation.verification import Look, Verification, verify
from esd_fast.generate import Shot
from esd_fast.models import load_model
from esd_fast.parameters import trainable_names

from . import pipelines
from .pipelines import GOLDEN, SHORT, assert_same_weights, weights

one_thread = pipelines.one_thread
LOOK = Look(
    (Shot("red apple", 0), Shot("red apple", 1)),
    (),
    {"num_inference_steps": 3, "guidance_scale": 7.5, "batch_size": 2},
)


@pytest.fixture(scope="module")
def trained() -> Erasure:
    """Strong enough to be seen in random pictures."""
    settings = SHORT | {"learning_rate": 3e-2}
    return esd_fast.erase(pipelines.pipeline(), "red apple", preset="fast", **settings)


def changed(erasure: Erasure, change: Callable[[torch.Tensor], torch.Tensor]) -> Erasure:
    return Erasure({n: change(t) for n, t in erasure.tensors.items()}, erasure.manifest)


def verified(
    erasure: Erasure, pipe: Any = None, look: Look | None = None, **settings: Any
) -> Verification:
    """Of a fresh golden pipeline, which must be as before."""
    pipe = pipe or pipelines.pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = weights(pipe)
    found = verify(erasure, load_model(pipe, EraseConfig(concept="x")), look, **settings)
    assert_same_weights(pipe, before)
    return found


def problems(found: Verification) -> dict[str, str]:
    told = {f.what: f.text for f in found.findings if f.level == "problem"}
    assert all(f.advice for f in found.findings if f.level == "problem")
    assert found.fine == (not told)
    return told


def test_a_right_file(trained: Erasure) -> None:
    found = verified(trained, look=LOOK)
    assert problems(found) == {}
    assert [f.what for f in found.findings] == ["keys", "values", "moves", "base", "pictures"]
    assert found.numbers["base"]["same"] is True
    # by the definition, in float64
    start = weights(pipelines.pipeline())
    truth = {
        n: ((t.double() - start[n].double()).norm() / start[n].double().norm()).item()
        for n, t in trained.tensors.items()
    }
    rows = found.numbers["moves"]["by_layer"]
    assert {r["name"]: r["relative_move"] for r in rows} == pytest.approx(truth, rel=1e-4)
    assert [r["relative_move"] for r in rows] == sorted(
        (r["relative_move"] for r in rows), reverse=True
    )
    told = found.numbers["pictures"]
    assert told["images"] == 2
    assert told["share_changed"] == 1.0
    assert 1 < told["mean_absolute_difference"] < 255


def test_a_right_file_from_disk_whatever_its_order(trained: Erasure, tmp_path: Path) -> None:
    assert verified(esd_fast.load(trained.save(tmp_path))).numbers["base"]["same"] is True
    backwards = Erasure(dict(reversed(trained.tensors.items())), trained.manifest)
    assert verified(backwards).numbers["base"]["same"] is True


def test_trained_in_bfloat16_on_a_float32_folder() -> None:
    erasure = esd_fast.erase(
        pipelines.pipeline(dtype=torch.bfloat16), "red apple", preset="fast", **SHORT
    )
    assert verified(erasure).numbers["base"]["same"] is True


def test_another_fine_tune(trained: Erasure) -> None:
    pipe = pipelines.pipeline()
    with torch.no_grad():
        pipe.unet.get_parameter(next(iter(trained.tensors))).mul_(1.01)
    told = problems(verified(trained, pipe))
    assert told.keys() == {"base"}
    assert "the file fits, but belongs to another fine-tune" in told["base"]
    assert problems(verified(trained, pipe, allow_other_base=True)) == {}


def test_a_file_that_does_not_say_its_base(trained: Erasure) -> None:
    theirs = Erasure(trained.tensors, {"concept": "x", "model": "CompVis/sd", "method": "esd-x"})
    found = verified(theirs)
    assert problems(found) == {}
    assert "it names CompVis/sd" in found.findings[-1].text
    g = torch.Generator().manual_seed(0)
    other = changed(theirs, lambda t: torch.randn(t.shape, generator=g) * t.std() + t.mean())
    assert "unrelated model's" in problems(verified(other))["base"]


def test_applied_already(trained: Erasure) -> None:
    pipe = pipelines.pipeline()
    trained.apply(pipe)
    told = problems(verified(trained, pipe, LOOK))
    trained.revert(pipe)
    assert told.keys() == {"moves"}
    assert "exactly the weights that the model has" in told["moves"]


def test_moves_that_the_dtype_rounds_away() -> None:
    pipe = pipelines.pipeline(dtype=torch.bfloat16)
    tiny = {
        n: p.detach().float() * (1 + 1e-5)
        for n, p in pipe.unet.named_parameters()
        if "attn2.to_k" in n
    }
    told = problems(verified(Erasure(tiny, {}), pipe))
    assert "rounded back to what they were in bfloat16" in told["moves"]


def test_values_that_are_no_weights(trained: Erasure) -> None:
    start = weights(pipelines.pipeline())
    nan = changed(trained, lambda t: torch.where(t == t.max(), torch.nan, t))
    assert "NaN or infinity" in problems(verified(nan, look=LOOK))["values"]
    zero = changed(trained, torch.zeros_like)
    assert "all zero" in problems(verified(zero))["values"]
    large = changed(trained, lambda t: torch.where(t == t.max(), 1e6, t))
    half = pipelines.pipeline(dtype=torch.float16)
    assert "do not fit into float16" in problems(verified(large, half))["values"]
    moves = {n: (t - start[n]) * 0.1 for n, t in trained.tensors.items()}
    told = problems(verified(Erasure(moves, trained.manifest)))
    assert "look like differences" in told["moves"]


def test_too_weak_to_be_seen(trained: Erasure) -> None:
    start = weights(pipelines.pipeline())
    weak = {n: torch.lerp(start[n], t, 1e-3) for n, t in trained.tensors.items()}
    told = problems(verified(Erasure(weak, trained.manifest), look=LOOK))
    assert told.keys() == {"pictures"}


def test_a_pipeline_that_draws_with_a_copy_of_the_weights(trained: Erasure) -> None:
    """As a UNet does that was frozen into a compiled graph or an engine before."""
    pipe = pipelines.pipeline()
    pipe.unet.forward = pipelines.pipeline().unet.forward
    told = problems(verified(trained, pipe, LOOK))
    assert "the weights in the UNet change, but none of 2 pictures does" in told["pictures"]


def test_a_compiled_unet_is_looked_into(trained: Erasure) -> None:
    pipe = pipelines.pipeline()
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    found = verify(trained, load_model(pipe, EraseConfig(concept="x")))
    assert problems(found) == {}


# --- files that are for something else


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_down_blocks_0_attn2_to_k.lora_up.weight", "it is a LoRA"),
        ("unet.down_blocks.0.attn2.to_k.lora_A.weight", "it is a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole model in the original layout"),
        ("output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight", "original code base"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
        ("emb_params", "textual inversion"),
        ("transformer.single_transformer_blocks.0.attn.to_k.weight", "without a UNet"),
        ("transformer_blocks.0.attn.to_k.weight", "without a UNet"),
        ("controlnet_down_blocks.0.weight", "ControlNet"),
        ("_orig_mod.down_blocks.0.resnets.0.conv1.weight", "prefix"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", "another shape"),
        ("something.weight", "no kind known here"),
    ],
)
def test_kinds_of_wrong_files(name: str, said: str) -> None:
    found = verified(Erasure({name: torch.ones(3, 3)}, {}))
    assert "0 of the file's 1 tensors fit this UNet" in problems(found)["keys"]
    assert said in problems(found)["keys"]


@pytest.mark.parametrize("part", ["attn2.", "attn1.", "resnets."])
def test_the_published_families_are_told_apart(part: str) -> None:
    """From names and shapes alone, whatever the method trained."""
    titles = {"sd1": "Diffusion 1.x", "sd2": "Diffusion 2.x", "sdxl": "Diffusion XL"}
    known = dict(known_unets())
    assert known.keys() == titles.keys()
    for name, shapes in known.items():
        file = {n: torch.empty(s, device="meta") for n, s in shapes.items() if part in n}
        assert titles[name] in what_it_is_for(file)[0]


def test_a_file_without_tensors() -> None:
    assert "holds no tensor" in problems(verified(Erasure({}, {})))["keys"]


@pytest.mark.parametrize(
    ("manifest", "drawn"),
    [
        ({"concept": "a cat", "erase_from": "an animal"}, ["a cat", "an animal"]),
        ({"concept": "esd-Van_Gogh-from-Van_Gogh-esdx"}, ["Van Gogh"]),  # a file's bare name
        ({"concept": "kelly"}, ["kelly"]),
        ({"concept": "cat, dog", "concepts": ["cat", "dog"]}, ["cat", "dog"]),
    ],
)
def test_what_is_drawn(manifest: dict[str, Any], drawn: list[str]) -> None:
    model = load_model(pipelines.pipeline(), EraseConfig(concept="x"))
    shots = Look.of(model, Erasure({}, manifest), 2, 5, {}).shots
    assert shots == tuple(Shot(text, seed) for text in drawn for seed in (5, 6))
    asked = Look.of(model, Erasure({}, manifest), 1, 0, {}, ["a dog"]).shots
    assert asked == (Shot("a dog", 0),)


def test_a_file_that_was_cut(trained: Erasure) -> None:
    some = dict(list(trained.tensors.items())[:3])
    found = verified(Erasure(some, trained.manifest))
    expected = trainable_names(pipelines.pipeline().unet, "esd-x")
    notes = [f.text for f in found.findings if f.level == "note"]
    assert f"{len(expected) - 3} of them are not in the file" in notes[0]


# --- the command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(command, "keep_pages", lambda: None)

    def call(file: Path, *arguments: object) -> int:
        fixed = ["verify", file, "--model", GOLDEN / "sd-ddim", "--num-inference-steps", 2]
        return main([str(a) for a in (*fixed, "--device", "cpu", *arguments)])

    return call


def test_command(
    run: Any, trained: Erasure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained.save(tmp_path)
    assert run(file) == 0
    told = capsys.readouterr().out
    assert "fine     base: it was trained on these very weights" in told
    assert "if your own pictures do not change" in told
    assert run(tmp_path, "--json", "--images", 0) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fine"] is True
    assert report["concept"] == "red apple"
    assert len(report["moves"]["by_layer"]) == len(trained.tensors)
    assert "pictures" not in report


def test_command_on_wrong_files(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, lora)
    assert run(lora) == 1
    assert "it is a LoRA" in capsys.readouterr().out
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora.read_bytes()[:-3])
    assert run(cut, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fine"] is False
    assert "no whole safetensors file" in report["findings"][0]["text"]
    assert run(tmp_path / "none.safetensors") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(lora, "--images", -1) == 2
    assert "--images is -1" in capsys.readouterr().err
