"""Erasure: files that the reference loads, files of the reference, apply and revert to the bit."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import esd_fast
from esd_fast.erasure import Erasure

from . import pipelines
from .pipelines import SHORT, assert_same_weights, same_bits, weights

one_thread = pipelines.one_thread
THEIR_METADATA = {
    "format": "erasing-esd-v2",
    "component": "unet",
    "base_model_id": "CompVis/stable-diffusion-v1-4",
    "train_method": "esd-x",
    "erase_concept": "Van Gogh",
    "erase_from": "Van Gogh",
    "negative_guidance": "2.0",
}


@pytest.fixture(scope="module")
def erased() -> tuple[Any, Erasure, dict[str, Tensor]]:
    """A pipeline left erased, its erasure, and the weights before; copy before changing."""
    pipe = pipelines.pipeline()
    before = weights(pipe)
    return pipe, esd_fast.erase(pipe, "red apple", preset="fast", **SHORT), before


@pytest.fixture
def erasure(erased: tuple[Any, Erasure, dict[str, Tensor]]) -> Erasure:
    return Erasure(erased[1].tensors, erased[1].manifest)


def other_tensors(unet: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    parameters = dict(unet.named_parameters())
    return {n: (parameters[n].detach() + 0.5).to(dtype) for n in parameters if "attn2" in n}


def is_applied(pipe: Any, erasure: Erasure) -> bool:
    now = weights(pipe)
    return all(same_bits(now[n], t.to(now[n].dtype)) for n, t in erasure.tensors.items())


# ------------------------------------------------------------------------------------------------------------ files


def test_saved_and_loaded(erasure: Erasure, tmp_path: Path) -> None:
    file = erasure.save(tmp_path)
    assert file.name == "esd-red-apple-from-red-apple-esd-x.safetensors"
    loaded = esd_fast.load(file)
    assert loaded.manifest == json.loads(json.dumps(erasure.manifest))
    assert loaded.tensors.keys() == erasure.tensors.keys()
    assert all(same_bits(loaded.tensors[n], t) for n, t in erasure.tensors.items())
    assert repr(loaded) == "Erasure('red apple', esd-x, 20 tensors, 7,504 weights)"
    assert esd_fast.load(tmp_path).tensors.keys() == loaded.tensors.keys()  # a run's folder
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_file_is_the_references(erasure: Erasure, tmp_path: Path) -> None:
    file = erasure.save(tmp_path / "deep" / "er.safetensors")
    pipe = pipelines.pipeline()
    result = pipe.unet.load_state_dict(load_file(file), strict=False)
    assert not result.unexpected_keys
    assert is_applied(pipe, erasure)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata.keys() >= THEIR_METADATA.keys() - {"negative_guidance"}
    assert metadata["format"] == "erasing-esd-v2"
    assert metadata["component"] == "unet"
    assert metadata["erase_concept"] == metadata["erase_from"] == "red apple"
    assert metadata["train_method"] == "esd-x"
    assert metadata["base_model_id"].endswith("sd-ddim")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "metadata", [THEIR_METADATA, THEIR_METADATA | {"erase_from": "painting"}, None]
)
def test_theirs_loads_with_ours(
    metadata: dict[str, str] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = pipelines.pipeline()
    before = weights(pipe)
    theirs = other_tensors(pipe.unet, dtype)
    name = "esd-VanGogh-from-VanGogh-esdx.safetensors"
    save_file(theirs, tmp_path / name, metadata=metadata)
    loaded = esd_fast.load(tmp_path / name)
    if metadata:
        source = metadata["erase_from"]
        assert loaded.manifest["concept"] == "Van Gogh"
        assert loaded.manifest["erase_from"] == (None if source == "Van Gogh" else source)
        assert loaded.manifest["method"] == "esd-x"
        assert loaded.manifest["model"] == "CompVis/stable-diffusion-v1-4"
    else:
        assert loaded.manifest["concept"] == "esd-VanGogh-from-VanGogh-esdx"
    loaded.apply(pipe)
    assert is_applied(pipe, loaded)
    loaded.revert(pipe)
    assert_same_weights(pipe, before)
    assert esd_fast.load(loaded.save(tmp_path / "again")).manifest == loaded.manifest


def test_raw_concept_is_in_the_metadata(erasure: Erasure, tmp_path: Path) -> None:
    for concept in ("AC/DC", 'the "cat"\nand\0dog', "x" * 300, "猫" * 100):
        manifest = erasure.manifest | {"concept": concept}
        file = Erasure(erasure.tensors, manifest).save(tmp_path)
        assert file.parent == tmp_path
        assert esd_fast.load(file).manifest["concept"] == concept
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["erase_concept"] == concept


def test_several_concepts_in_the_file_name_and_metadata(erasure: Erasure, tmp_path: Path) -> None:
    several = {"concept": "cat, Van Gogh", "concepts": ["cat", "Van Gogh"], "erase_from": None}
    made = Erasure(erasure.tensors, erasure.manifest | several)
    file = made.save(tmp_path)
    assert file.name == "esd-cat+Van-Gogh-from-cat+Van-Gogh-esd-x.safetensors"
    loaded = esd_fast.load(file)
    assert loaded.concepts == ("cat", "Van Gogh")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["erase_concept"] == "cat, Van Gogh"
    many = Erasure({}, {"concepts": [f"concept {i}" for i in range(300)]})
    assert len(many.file_name.encode()) < 255
    assert erasure.concepts == (erasure.manifest["concept"],)
    assert Erasure({}, {}).concepts == ()


def test_saved_from_channels_last_and_other_layouts(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    shifted = torch.randn(5, 4).t()
    file = Erasure({"a": weight, "b": shifted}, {}).save(tmp_path / "d.safetensors")
    loaded = esd_fast.load(file).tensors
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], shifted)


def test_never_half_a_file(
    erasure: Erasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = erasure.save(tmp_path / "a.safetensors")
    whole = file.read_bytes()

    def broken(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(whole[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    for target in (file, tmp_path / "b.safetensors"):
        with pytest.raises(OSError, match="No space"):
            erasure.save(target)
    assert file.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


class RunsCode:
    """What a pickle can do to whoever reads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("layout", ["modules", "flat", "state_dict"])
def test_the_references_older_files(layout: str, tmp_path: Path) -> None:
    """esd_diffusers.py pickles {"unet.<module>": its state dict}; others a UNet's own state dict."""
    pipe = pipelines.pipeline()
    trained = other_tensors(pipe.unet)
    content: Any = trained
    if layout == "modules":
        content = {
            f"unet.{name}": module.state_dict()
            for name, module in pipe.unet.named_modules()
            if isinstance(module, torch.nn.Linear) and "attn2" in name
        }
        trained = {n: p.detach() for n, p in pipe.unet.named_parameters() if n in trained}
        trained = {n: p for n, p in trained.items() if ".norm" not in n}
    elif layout == "state_dict":
        content = {"state_dict": trained, "global_step": 3}
    torch.save(content, tmp_path / "esd-cat_from_cat-xattn_1.0-epochs_200.pt")
    loaded = esd_fast.load(tmp_path / "esd-cat_from_cat-xattn_1.0-epochs_200.pt")
    assert loaded.tensors.keys() == trained.keys()
    assert all(same_bits(loaded.tensors[n], t) for n, t in trained.items())
    loaded.apply(pipe)
    assert is_applied(pipe, loaded)


def test_pickled_objects_run_only_with_consent(tmp_path: Path) -> None:
    """diffusers#8874."""
    file, trace = tmp_path / "old.pt", tmp_path / "trace"
    torch.save({"conv_in.weight": torch.zeros(2), "extra": RunsCode(trace)}, file)
    with pytest.raises(ValueError, match="--allow-pickle"):
        esd_fast.load(file)
    assert not trace.exists()
    assert esd_fast.load(file, allow_pickle=True).tensors.keys() == {"conv_in.weight"}
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{"])
def test_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.safetensors is no whole safetensors file"):
        esd_fast.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("manifest", ["{", "[1]", '"text"'])
def test_damaged_manifest(manifest: str, tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"esd_fast_manifest": manifest})
    with pytest.raises(ValueError, match="its manifest is damaged"):
        esd_fast.load(file)


def test_what_load_refuses(erasure: Erasure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        esd_fast.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 0 files"):
        esd_fast.load(tmp_path)
    (tmp_path / "delta.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        esd_fast.load(tmp_path / "delta.pt")
    (tmp_path / "delta.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a file \.safetensors"):
        esd_fast.load(tmp_path / "delta.txt")
    erasure.save(tmp_path)
    erasure.save(tmp_path / "esd-other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds 2 files.*name one"):
        esd_fast.load(tmp_path)


# -------------------------------------------------------------------------------------------------- apply and revert


def test_apply_is_idempotent_and_revert_exact(erasure: Erasure) -> None:
    pipe = pipelines.pipeline()
    before = weights(pipe)
    erasure.apply(pipe)
    once = weights(pipe)
    assert is_applied(pipe, erasure)
    erasure.apply(pipe)
    erasure.apply(pipe.unet)  # the same model
    assert_same_weights(pipe, once)
    erasure.revert(pipe)
    assert_same_weights(pipe, before)
    with pytest.raises(ValueError, match="was not applied to this model: nothing to revert"):
        erasure.revert(pipe)


def test_erase_then_apply_changes_nothing(erased: tuple[Any, Erasure, dict[str, Tensor]]) -> None:
    pipe, erasure, before = erased
    after = weights(pipe)
    erasure.apply(pipe)
    assert_same_weights(pipe, after)
    erasure.revert(pipe)
    assert_same_weights(pipe, before)
    erasure.apply(pipe)
    assert_same_weights(pipe, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength(erasure: Erasure, dtype: torch.dtype) -> None:
    pipe = pipelines.pipeline(dtype=dtype)
    before = weights(pipe)
    erasure.apply(pipe, strength=0)
    assert_same_weights(pipe, before)
    erasure.apply(pipe, strength=1)
    assert is_applied(pipe, erasure)
    for strength in (0.5, -1.0, 2.0, 0.5):  # from the original each time, not from the last one
        erasure.apply(pipe, strength=strength)
        now = weights(pipe)
        for name, tensor in erasure.tensors.items():
            expected = before[name].float() + strength * (tensor - before[name].float())
            torch.testing.assert_close(now[name].float(), expected.to(dtype).float())
    erasure.apply(pipe)
    assert is_applied(pipe, erasure)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            erasure.apply(pipe, strength=strength)
    assert is_applied(pipe, erasure)
    erasure.revert(pipe)
    assert_same_weights(pipe, before)


def test_a_file_that_does_not_match_is_refused_whole(erasure: Erasure) -> None:
    pipe = pipelines.pipeline()
    before = weights(pipe)
    tensors = dict(erasure.tensors)
    first, second, *_ = tensors
    wrong = {
        "17 of 20 tensors match, 2 names unknown, 1 shapes differ": (
            {n: t for n, t in tensors.items() if n not in (first, second)}
            | {"unet." + first: tensors[first], "lora.up": torch.zeros(2)}
            | {n: t[:1] for n, t in list(tensors.items())[2:3]}
        ),
        "0 of 20 tensors match, 20 names unknown": {f"model.{n}": t for n, t in tensors.items()},
        "19 of 20 tensors match, 0 names unknown, 1 shapes": tensors | {first: tensors[first].T},
        "0 of 0 tensors match": {},
    }
    for message, these in wrong.items():
        if message.startswith("19") and tensors[first].shape == tensors[first].T.shape:
            these = tensors | {first: tensors[first][:-1]}
        with pytest.raises(ValueError, match=f"does not fit the model: {message}"):
            Erasure(these, {}).apply(pipe)
        assert_same_weights(pipe, before)
        with pytest.raises(ValueError, match="nothing to revert"):
            Erasure(these, {}).revert(pipe)


def test_what_is_no_model(erasure: Erasure) -> None:
    with pytest.raises(ValueError, match="model is a str; it must be a pipeline or a UNet"):
        erasure.apply("sd-ddim")


def test_two_erasures_come_off_in_turn() -> None:
    pipe = pipelines.pipeline()
    before = weights(pipe)
    first = esd_fast.erase(pipe, "cat", preset="fast", **SHORT)
    one = weights(pipe)
    second = esd_fast.erase(pipe, "a fish", preset="fast", **SHORT)
    second.revert(pipe)
    assert_same_weights(pipe, one)
    first.revert(pipe)
    assert_same_weights(pipe, before)


def test_copies_of_a_pipeline_are_models_of_their_own(erasure: Erasure) -> None:
    one = pipelines.pipeline()
    before = weights(one)
    two = copy.deepcopy(one)
    erasure.apply(one)
    assert_same_weights(two, before)
    with pytest.raises(ValueError, match="nothing to revert"):
        erasure.revert(two)
    erasure.apply(two)
    erasure.revert(one)
    assert is_applied(two, erasure)
    assert_same_weights(one, before)


def test_moves(erased: tuple[Any, Erasure, dict[str, Tensor]]) -> None:
    pipe, erasure, before = erased
    moves = erasure.moves(pipe)
    assert {row["name"] for row in moves} == set(erasure.tensors)
    sizes = [row["relative_move"] for row in moves]
    assert sizes == sorted(sizes, reverse=True)
    name = moves[0]["name"]
    expected = (erasure.tensors[name] - before[name]).norm() / before[name].norm()
    assert sizes[0] == pytest.approx(expected.item(), rel=1e-5)


def test_models_are_not_kept_alive(erasure: Erasure) -> None:
    pipe = pipelines.pipeline()
    erasure.apply(pipe)
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None
    assert len(erasure._originals) == 0
