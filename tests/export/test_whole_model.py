"""Whole checkpoints, read by diffusers alone: the weights that `Erasure.apply` gives, bit for bit."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import esd_fast
from esd_fast.erasure import Erasure, fingerprint
from esd_fast.export import export
from esd_fast.export.base import weight_files

from . import tiny
from .tiny import (
    applied,
    assert_same,
    erasure_of,
    images,
    original,
    pipeline_class,
    read_single_file,
    state,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning"
)


# ---------------------------------------------------------------------------- single files


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folder_to_single_file(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    erasure = erasure_of(original(family))
    file = tmp_path / "out.safetensors"
    exported = erasure.export(file, "single-file", model=folders[family])
    assert exported.path == file
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    back = read_single_file(file, family, folders[family], torch.float32)
    expected = applied(family, erasure)
    assert_same(state(back), state(expected))
    assert torch.equal(images(back), images(expected))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_single_file_to_single_file(
    family: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Keys, shapes, dtypes, metadata and every other byte are the base file's."""
    pipe = original(family, dtype)
    nothing = Erasure(
        {n: p.detach().float() for n, p in pipe.unet.named_parameters() if "attn2" in n}, {}
    )
    made = tmp_path / "made.safetensors"
    nothing.export(made, "single-file", model=pipe)
    extra = {"alphas_cumprod": torch.rand(10).double(), "global_step": torch.tensor(7)}
    told = {"modelspec.title": "ours", "sshs_model_hash": "0x00", "format": "pt"}
    base = tmp_path / "base.safetensors"
    save_file(load_file(made) | extra, base, metadata=told)

    erasure = erasure_of(pipe, "attn")
    file = tmp_path / "out.safetensors"
    erasure.export(file, "single-file", model=base)
    before, after = load_file(base), load_file(file)
    assert before.keys() == after.keys()
    changed = {n for n, t in before.items() if not t.equal(after[n])}
    assert len(changed) == len(erasure.tensors)
    assert all(n.startswith("model.diffusion_model.") for n in changed)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("esd_fast_erased"))[0]["concept"] == "cat"
    assert metadata == {"modelspec.title": "ours", "format": "pt"}  # a hash of other content goes
    back = read_single_file(file, family, folders[family], dtype)
    assert_same(state(back), state(applied(family, erasure, dtype)))


def test_safetensors_itself_lays_files_out_as_we_do(tmp_path: Path) -> None:
    """Zero steps, nothing changed: the same bytes as safetensors' own writer makes."""
    from esd_fast.tensor_files import open_tensors, write_tensors

    tensors = {
        "b": torch.randn(3, 5).half(),
        "a": torch.randn(7),
        "scalar": torch.tensor(3),
        "none": torch.empty(0),
        "mask": torch.tensor([True, False, True]),
        "ä": torch.randn(2, 2).bfloat16(),
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = open_tensors(tmp_path / "theirs.safetensors")
    for raw in (theirs.raw, lambda name: None):  # noqa: ARG005
        write_tensors(tmp_path / "ours.safetensors", theirs.tensors, {}, raw)
        found = load_file(tmp_path / "ours.safetensors")
        assert found.keys() == tensors.keys()
        assert all(found[n].equal(t) and found[n].dtype == t.dtype for n, t in tensors.items())
    ours = (tmp_path / "ours.safetensors").stat().st_size
    assert ours == (tmp_path / "theirs.safetensors").stat().st_size


@pytest.mark.parametrize("side", ["weights", "averages"])
def test_running_averages_are_erased_too(side: str, tmp_path: Path) -> None:
    """A file with EMA weights: a program that prefers them must not find the concept again."""
    pipe = original("sd1")
    nothing = Erasure({n: p.detach() for n, p in pipe.unet.named_parameters() if "attn2" in n}, {})
    nothing.export(tmp_path / "plain.safetensors", "single-file", model=pipe)
    plain = load_file(tmp_path / "plain.safetensors")
    head = "model.diffusion_model."
    averages = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): t + 0.125
        for n, t in plain.items()
        if n.startswith(head)
    }
    base, file = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(plain | averages | {"model_ema.decay": torch.tensor(0.9999)}, base)
    trained = copy.deepcopy(pipe)
    for parameter in trained.unet.parameters():
        parameter.data += 0.125 if side == "averages" else 0
    erasure = erasure_of(trained)
    erasure.export(file, "single-file", model=base)
    out = load_file(file)
    assert out.keys() == load_file(base).keys()
    changed = [n for n in plain if not out[n].equal(plain[n])]
    assert changed
    for name in changed:
        key = "model_ema." + name.removeprefix("model.").replace(".", "")
        torch.testing.assert_close(
            out[key] - averages[key], out[name] - plain[name], atol=1e-6, rtol=0
        )
    exact = [
        out[n if side == "weights" else "model_ema." + n.removeprefix("model.").replace(".", "")]
        for n in changed
    ]
    assert all(any(t.equal(e) for t in erasure.tensors.values()) for e in exact)


def test_from_a_ckpt(folders: dict[str, Path], tmp_path: Path) -> None:
    """Read as tensors alone; what comes out is a .safetensors with its tensors."""
    pipe = original("sd1")
    erasure = erasure_of(pipe)
    erasure.export(tmp_path / "whole.safetensors", "single-file", model=folders["sd1"])
    torch.save({"state_dict": load_file(tmp_path / "whole.safetensors")}, tmp_path / "base.ckpt")
    zero = Erasure(erasure.tensors, {"concept": "cat"})
    exported = zero.export(
        tmp_path / "out.safetensors", "single-file", model=tmp_path / "base.ckpt"
    )
    assert "does not say what it was trained on" in exported.notes[0]
    assert_same(load_file(exported.path), load_file(tmp_path / "whole.safetensors"))


# --------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folder_to_folder(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = folders[family]
    erasure = erasure_of(original(family), "")
    exported = erasure.export(tmp_path / "out", "diffusers", model=base)
    assert exported.notes == []
    back = pipeline_class(family).from_pretrained(exported.path, local_files_only=True)
    expected = applied(family, erasure)
    assert_same(state(back), state(expected))
    assert torch.equal(images(back), images(expected))
    names = {p.relative_to(base) for p in base.rglob("*")}
    assert names == {p.relative_to(exported.path) for p in exported.path.rglob("*")}
    for name in names:
        if (base / name).is_file() and name.parent.name != "unet":
            assert (base / name).read_bytes() == (exported.path / name).read_bytes()


def test_every_form_of_the_unet_is_erased_or_left_out(tmp_path: Path) -> None:
    """Variants, shards and pickled files; a whole checkpoint beside them is not copied."""
    pipe = original("sd1")
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    pipe.unet.save_pretrained(base / "unet", max_shard_size="40KB")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    half = {n: t.half() for n, t in pipe.unet.state_dict().items()}
    save_file(half, base / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    torch.save(pipe.unet.state_dict(), base / "unet" / "diffusion_pytorch_model.bin")
    torch.save(half, base / "unet" / "diffusion_pytorch_model.non_ema.bin")
    for name in ("unet/diffusion_flax_model.msgpack", "whole.ckpt", "README.md"):
        (base / name).write_text("content")
    erasure = erasure_of(pipe)
    exported = erasure.export(tmp_path / "out", "diffusers", model=base)
    assert "unet/diffusion_flax_model.msgpack" in exported.notes[0]
    assert "whole.ckpt" in exported.notes[0]
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert not {"whole.ckpt", "diffusion_flax_model.msgpack"} & left
    assert "README.md" in left
    assert not [n for n in left if n.endswith(".bin")]
    expected = applied("sd1", erasure).unet.state_dict()
    for variant in (None, "fp16", "non_ema"):
        back = (
            type(pipe.unet)
            .from_pretrained(
                tmp_path / "out", subfolder="unet", variant=variant, dtype=torch.float32
            )
            .state_dict()
        )
        rounded = (
            expected if variant is None else {n: t.half().float() for n, t in expected.items()}
        )
        assert_same(back, rounded)


def test_preferred_weight_files(tmp_path: Path) -> None:
    for name in ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors",
                 "model.bin"):  # fmt: skip
        (tmp_path / name).write_text("")
    assert [f.name for f in weight_files(tmp_path)] == [
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
    ]
    (tmp_path / "model.safetensors").write_text("")
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        weight_files(tmp_path / "nowhere")


def test_live_pipeline_erased_or_not(folders: dict[str, Path], tmp_path: Path) -> None:
    """The base's weights are taken, and the pipeline is left as it is, erased or not."""
    pipe = copy.deepcopy(original("sd1"))
    erasure = erasure_of(pipe)
    expected = state(applied("sd1", erasure))
    for place in ("plain", "erased"):
        before = state(pipe)
        erasure.export(tmp_path / f"{place}.safetensors", "single-file", model=pipe)
        erasure.export(tmp_path / place, "diffusers", model=pipe)
        assert_same(state(pipe), before)
        back = StableDiffusionPipeline.from_pretrained(tmp_path / place)
        assert_same(state(back), expected)
        file = read_single_file(
            tmp_path / f"{place}.safetensors", "sd1", folders["sd1"], torch.float32
        )
        assert_same(state(file), expected)
        erasure.apply(pipe)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength(strength: float, folders: dict[str, Path], tmp_path: Path) -> None:
    erasure = erasure_of(original("sd1"))
    pipe = copy.deepcopy(original("sd1"))
    erasure.apply(pipe, strength)
    erasure.export(tmp_path / "out", "diffusers", model=folders["sd1"], strength=strength)
    assert_same(state(StableDiffusionPipeline.from_pretrained(tmp_path / "out")), state(pipe))


def test_velocity_sdxl_is_marked_for_other_programs(tmp_path: Path) -> None:
    pipe = copy.deepcopy(original("sdxl"))
    pipe.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    erasure_of(pipe).export(tmp_path / "out.safetensors", "single-file", model=pipe)
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "out.safetensors").keys()


# ----------------------------------------------------------------------------------- merging


def test_several_erasures_add_up(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = original("sd1")
    one, two = erasure_of(pipe, "attn2", 1), erasure_of(pipe, "to_k", 2, concept="dog")
    three = erasure_of(pipe, "conv_out", 3)
    exported = export(
        [one, two, three], tmp_path / "out.safetensors", "delta", model=folders["sd1"]
    )
    assert "are moved by more than one erasure" in exported.notes[0]
    merged = esd_fast.load(exported.path)
    assert merged.manifest["concept"] == "cat, dog, cat"
    assert merged.concepts == ("cat", "dog")
    before = dict(pipe.unet.named_parameters())
    for name, tensor in merged.tensors.items():
        moves = [
            e.tensors[name].double() - before[name].double()
            for e in (one, two, three)
            if name in e.tensors
        ]
        torch.testing.assert_close(
            tensor.double(), before[name].double() + sum(moves), atol=1e-6, rtol=0
        )
    assert all(merged.tensors[n].equal(t) for n, t in three.tensors.items())
    merged.export(tmp_path / "again.safetensors", "single-file", model=folders["sd1"])


def test_an_erasure_of_an_erased_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its move counts from what the first one left: the result is the second's weights."""
    first = erasure_of(original("sd1"), "attn2", 1)
    second = erasure_of(applied("sd1", first), "attn2", 2, concept="dog")
    file = tmp_path / "out.safetensors"
    export([first, second], file, "delta", model=folders["sd1"])
    for name, tensor in load_file(file).items():
        torch.testing.assert_close(tensor, second.tensors[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="was trained on other weights"):
        second.export(tmp_path / "no.safetensors", "delta", model=folders["sd1"])


def test_other_bases_and_doubles_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = original("sd1")
    one = erasure_of(pipe)
    other = erasure_of(tiny.pipeline("sd1", seed=5), model="another/model")
    settings = {
        "target": tmp_path / "out.safetensors",
        "format": "single-file",
        "model": folders["sd1"],
    }
    with pytest.raises(ValueError, match=r"other weights \(another/model\).*--allow-other-base"):
        export([one, other], **settings)
    with pytest.raises(ValueError, match="given twice"):
        export([one, one], **settings)
    with pytest.raises(ValueError, match="does not fit the model"):
        erasure_of(original("sdxl")).export(**settings)
    with pytest.raises(ValueError, match="erasures is empty"):
        export([], **settings)
    assert list(tmp_path.iterdir()) == []
    notes = export(other, **settings, allow_other_base=True).notes
    assert "own training in these layers is lost" in notes[0]


def test_rounded_base_is_known(folders: dict[str, Path], tmp_path: Path) -> None:
    """Trained in bfloat16 from a float32 folder: the fingerprint is of the rounded weights."""
    erasure = erasure_of(original("sd1", torch.bfloat16))
    rounded = {
        n: p.bfloat16() for n, p in original("sd1").unet.named_parameters() if n in erasure.tensors
    }
    assert fingerprint(rounded) == erasure.manifest["base_fingerprint"]
    assert erasure.export(tmp_path / "out", "diffusers", model=folders["sd1"]).notes == []


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "gguf"}, "format is 'gguf'; it must be one of delta"),
        ({"target": "out.ckpt"}, "must be the name of a .safetensors file"),
        ({"rank": 4}, "rank and energy are a LoRA's"),
        ({"format": "lora", "rank": 4, "energy": 0.9}, "give one"),
        ({"format": "lora", "rank": 0}, "rank is 0"),
        ({"format": "lora", "energy": 1.5}, "energy is 1.5"),
        ({"format": "lora", "dtype": "int8"}, "dtype is 'int8'"),
        ({"strength": math.nan}, "strength is nan"),
        ({"model": "./nowhere"}, "'./nowhere' does not exist"),
        ({"model": None}, "model is not given"),
    ],
)
def test_bad_arguments(
    settings: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = {"target": "out.safetensors", "format": "single-file", "model": folders["sd1"]}
    given = plain | settings
    target = tmp_path / given.pop("target")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        erasure_of(original("sd1")).export(target, given.pop("format"), **given)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(folders: dict[str, Path], tmp_path: Path) -> None:
    erasure = erasure_of(original("sd1"))
    file, folder, own = tmp_path / "f.safetensors", tmp_path / "model", tmp_path / "own"
    for _ in range(2):
        erasure.export(file, "single-file", model=folders["sd1"], overwrite=True)
        erasure.export(folder, "diffusers", model=folders["sd1"], overwrite=True)
    for target, format in ((file, "lora"), (folder, "diffusers")):
        with pytest.raises(FileExistsError, match="--overwrite"):
            erasure.export(target, format, model=folders["sd1"])
    own.mkdir()
    (own / "thesis.txt").write_text("dear")
    for format in ("diffusers", "single-file"):
        with pytest.raises((FileExistsError, ValueError)):
            erasure.export(own, format, model=folders["sd1"], overwrite=True)
    assert (own / "thesis.txt").read_text() == "dear"
    with pytest.raises(ValueError, match="is in place there already"):
        erasure.export(tmp_path / "again", "diffusers", model=folder)
    with pytest.raises(ValueError, match="own folder"):
        erasure.export(folder / "inside", "diffusers", model=folder)
    # onto itself: read before it is replaced
    Erasure(erasure.tensors, {}).export(folder, "diffusers", model=folder, overwrite=True)
    assert_same(
        state(StableDiffusionPipeline.from_pretrained(folder)), state(applied("sd1", erasure))
    )


@pytest.mark.parametrize("format", ["single-file", "diffusers"])
def test_never_half_a_result(
    format: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erasure = Erasure(erasure_of(original("sd1")).tensors, {})
    calls = []

    def full_disk(tensor: torch.Tensor) -> Any:
        calls.append(tensor)
        if len(calls) > 5:
            raise OSError("No space left on device")
        return b"x"

    monkeypatch.setattr("esd_fast.tensor_files.bytes_of", full_disk)
    with pytest.raises(OSError, match="No space"):
        erasure.export(
            tmp_path / "out.safetensors" if format == "single-file" else tmp_path / "out",
            format,
            model=folders["sd1"],
        )
    assert list(tmp_path.iterdir()) == []


def test_not_a_checkpoint(tmp_path: Path) -> None:
    save_file({"lora_unet_x.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no Stable Diffusion checkpoint in the original layout"):
        erasure_of(original("sd1")).export(
            tmp_path / "o.safetensors", "single-file", model=tmp_path / "lora.safetensors"
        )
