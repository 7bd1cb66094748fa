"""Which model is it, is it there, and may it be used: all said before a weight is read."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esd_fast.config import EraseConfig, Loading
from esd_fast.generate import Shot, pictures
from esd_fast.models import load_model, look_at, resolve_device
from esd_fast.models.base import Conditioning, Described, PromptSet
from esd_fast.models.families import family_of
from esd_fast.models.folder import Folder, described_at
from esd_fast.models.sd1 import StableDiffusion1

from . import pipelines
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
CAT = EraseConfig(concept="cat")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "load", lambda *_: pytest.fail("weights were read"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "sd-ddim", tmp_path / "model")
    return tmp_path / "model"


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --------------------------------------------------------------------------------------------- where from


def test_live_pipeline_stays_itself() -> None:
    pipe = pipelines.pipeline()
    model = load_model(pipe, CAT)
    assert model.pipeline is pipe
    assert model.live
    assert model.family.name == "sd1"
    assert model.source.endswith("sd-ddim")


def test_folder_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    for path in (GOLDEN / "sd-ddim", str(GOLDEN / "sd-ddim")):
        model = load_model(path, CAT)
        assert not model.live
        assert model.dtype == torch.float32
        assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_folder_in_another_dtype() -> None:
    model = load_model(
        GOLDEN / "sd-ddim", EraseConfig(concept="cat", dtype="bfloat16", device="cpu")
    )
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}


def test_safety_checker_is_never_needed(folder: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change_json(folder / "model_index.json", safety_checker=checker, requires_safety_checker=True)
    assert load_model(folder, CAT).pipeline.safety_checker is None


class Loud:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


def as_bin(file: Path, **more: Any) -> None:
    """The older form of a component's weights."""
    name = file.name.replace("model.safetensors", "pytorch_model.bin")
    other = file.with_name(file.name.replace("safetensors", "bin") if "diff" in name else name)
    torch.save(load_file(file) | more, other)
    file.unlink()


def test_bin_weights_of_a_folder(folder: Path) -> None:
    expected = pipelines.weights(load_model(folder, CAT).pipeline)
    for component in ("unet", "vae", "text_encoder"):
        (file,) = (folder / component).glob("*.safetensors")
        as_bin(file)
    model = load_model(folder, CAT)
    pipelines.assert_same_weights(model.pipeline, expected)
    text = load_model(GOLDEN / "sd-ddim", CAT).pipeline.text_encoder.state_dict()
    assert all(torch.equal(v, text[n]) for n, v in model.pipeline.text_encoder.state_dict().items())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickled_objects_of_a_folder_do_not_run(
    component: str, folder: Path, tmp_path: Path
) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    as_bin(file, extra=Loud(tmp_path / "ran"))
    with pytest.raises(ValueError, match=rf"{component}/.*\.bin holds a pickled object .*mkdir"):
        load_model(folder, EraseConfig(concept="cat", allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def test_variants_of_a_folder(folder: Path) -> None:
    expected = pipelines.weights(load_model(folder, CAT).pipeline)
    for component in ("unet", "vae", "text_encoder"):
        (file,) = (folder / component).glob("*.safetensors")
        save_file({n: t.half() for n, t in load_file(file).items()}, file.with_name(f"{file.stem}.fp16.safetensors"))  # fmt: skip
    plain = load_model(folder, CAT).pipeline
    pipelines.assert_same_weights(plain, expected)
    half = load_model(folder, EraseConfig(concept="cat", variant="fp16"))
    pipelines.assert_same_weights(half.pipeline, {n: t.half().float() for n, t in expected.items()})
    with pytest.raises(ValueError, match=r"variant is 'bf16'; .* has fp16, the plain weights"):
        load_model(folder, EraseConfig(concept="cat", variant="bf16"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"variant is None; .* has fp16"):
        load_model(folder, CAT)


def test_lost_vocabulary_is_said(folder: Path) -> None:
    """transformers makes a tokenizer of two tokens of what is left."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer lacks its vocabulary"):
        load_model(folder, CAT)
    shutil.copy(GOLDEN.parent.parent / "esd_fast" / "models" / "clip_tokenizer" / "vocab.json", folder / "tokenizer")  # fmt: skip
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="tokenizer knows 49408 tokens, the text_encoder 906"):
        load_model(folder, CAT)


def test_hub_ids_come_from_the_cache_alone_when_offline(
    folder: Path, tmp_path: Path, run_python: Any
) -> None:
    """A hub cache as huggingface_hub lays it out; HF_HUB_OFFLINE, and no way out."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    code = (
        "import socket, sys; sys.path[:0] = sys.argv[1:]\n"
        "socket.socket.connect = None\n"
        "from esd_fast import EraseConfig; from esd_fast.models import load_model\n"
        "model = load_model('someone/tiny', EraseConfig('cat'))\n"
        "print(model.source, model.family.name)\n"
        "try: load_model('someone/other', EraseConfig('cat'))\n"
        "except OSError: print('absent')\n"
    )
    said = run_python("-c", code, *sys.path, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert said.splitlines() == ["someone/tiny sd1", "absent"]


@pytest.mark.parametrize(
    "source",
    ["./nowhere", "/no/such/folder", "a/b/c", "..\\model", "~/model", "v1-5.ckpt", "x.safetensors"],
)
@pytest.mark.usefixtures("no_weights")
def test_a_path_that_leads_nowhere_is_no_hub_id(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(source, CAT)


@pytest.mark.usefixtures("no_weights")
def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        load_model(tmp_path, CAT)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path, CAT)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("model", [3, b"sd", torch.nn.Linear(1, 1), [GOLDEN]])
def test_what_is_no_model(model: object) -> None:
    with pytest.raises(ValueError, match="must be a diffusers pipeline, a folder"):
        load_model(model, CAT)


# ---------------------------------------------------------------------------------------- what family it is


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("unet", "why"),
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4: an inpainting model"),
        ({"in_channels": 8}, "takes 8 channels .* edits a picture by instruction"),
        ({"time_cond_proj_dim": 256}, "turbo or LCM distillation"),
        ({"class_embed_type": "projection"}, r"more than text \(projection\), as unCLIP"),
        ({"num_class_embeds": 1000}, "noise level"),
        ({"addition_embed_type": "text_time"}, "of no family known"),
    ],
)
def test_unfit_folders_by_their_config(unet: dict[str, Any], why: str, folder: Path) -> None:
    change_json(folder / "unet" / "config.json", **unet)
    with pytest.raises(ValueError, match=why):
        load_model(folder, CAT)


@pytest.mark.usefixtures("no_weights")
def test_pipeline_without_a_unet(folder: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="FluxPipeline is a diffusion transformer"):
        load_model(folder, CAT)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(ValueError, match="OtherPipeline has no UNet"):
        load_model(folder, CAT)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22Pipeline", "unet": ["diffusers", "UNet2DConditionModel"]}))  # fmt: skip
    with pytest.raises(ValueError, match="KandinskyV22Pipeline is of no family known here"):
        load_model(folder, CAT)


def test_family_comes_from_the_config_not_the_name(folder: Path) -> None:
    def seen(pipeline: str, **unet: Any) -> Described:
        parts = frozenset({"unet", "text_encoder", "text_encoder_2"})
        return Described(pipeline, parts, {"in_channels": 4, "out_channels": 4} | unet, {}, {})

    xl = {"addition_embed_type": "text_time"}
    assert family_of(seen("StableDiffusionPipeline")).name == "sd1"
    assert family_of(seen("StableDiffusionPipeline", use_linear_projection=True)).name == "sd2"
    assert family_of(seen("StableDiffusionXLPipeline", **xl)).name == "sdxl"
    for neither in (seen("StableDiffusionPipeline", **xl), seen("StableDiffusionXLPipeline")):
        with pytest.raises(ValueError, match="no family known"):
            family_of(neither)
    shutil.copytree(GOLDEN / "sdxl-ddim", folder.parent / "sd-v1-5")
    assert look_at(str(folder.parent / "sd-v1-5"), Loading()).family.name == "sdxl"


@pytest.mark.usefixtures("no_weights")
def test_refiner_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sdxl-ddim", tmp_path / "model")
    change_json(
        tmp_path / "model" / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )
    with pytest.raises(ValueError, match="is the SDXL refiner"):
        load_model(tmp_path / "model", CAT)


def test_prediction_type_is_read_and_can_be_said(folder: Path) -> None:
    assert described_at(str(folder)).prediction_type == "epsilon"
    assert described_at(str(GOLDEN / "sd-v-ddim")).prediction_type == "v_prediction"
    config = EraseConfig(concept="cat", prediction_type="v_prediction")
    assert load_model(folder, config).pipeline.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction', the pipeline's"):
        load_model(pipelines.pipeline(), config)


@pytest.mark.parametrize(
    "setting", [{"ema": "yes"}, {"model_config": "x"}, {"variant": "fp16"}, {"allow_pickle": True}]
)
def test_settings_that_a_live_pipeline_has_no_use_for(setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"{name} is .*the pipeline is loaded already"):
        load_model(pipelines.pipeline(), EraseConfig(concept="cat", **setting))


# ---------------------------------------------------------------------------------------- device and dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.usefixtures("no_weights")
def test_absent_cuda_is_refused_before_loading(device: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}'; there are 0 CUDA devices here"):
        load_model(GOLDEN / "sd-ddim", EraseConfig(concept="cat", device=device))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "cuda0"])
@pytest.mark.usefixtures("no_weights")
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(ValueError, match="must be cpu, cuda, cuda:N or mps"):
        load_model(GOLDEN / "sd-ddim", EraseConfig(concept="cat", device=device))


def test_auto_without_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'mps'; there is none"):
        resolve_device("mps")


def test_live_pipeline_is_not_converted_or_moved() -> None:
    pipe = pipelines.pipeline()
    with pytest.raises(ValueError, match="dtype is 'bfloat16', the pipeline is float32"):
        load_model(pipe, EraseConfig(concept="cat", dtype="bfloat16"))
    with pytest.raises(ValueError, match="device is 'cuda', the pipeline is on cpu"):
        load_model(pipe, EraseConfig(concept="cat", device="cuda"))
    assert load_model(pipe, EraseConfig(concept="cat", dtype="float32", device="cpu")).live


# ---------------------------------------------------------------------------------------------- resolution


def test_resolution_is_the_models_own_by_default() -> None:
    model = load_model(pipelines.pipeline(), CAT)
    assert model.native_resolution == 64
    assert model.latent_shape(None) == (4, 8, 8)
    assert model.latent_shape(128) == (4, 16, 16)
    with pytest.raises(
        ValueError, match=r"resolution is 72; this model needs a multiple of 16.*64"
    ):
        model.latent_shape(72)


# ------------------------------------------------------------------------------------------------- prompts


def test_conditioning_rows() -> None:
    null, concept = (
        Conditioning(torch.full((1, 2, 3), v), {"t": torch.full((1, 1), v)}) for v in (0.0, 1.0)
    )
    both = PromptSet({"null": null, "concept": concept}).stacked(("null", "concept"), (0, 0))
    assert both.encoder_hidden_states[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert both.added_cond_kwargs is not None
    assert both.added_cond_kwargs["t"].flatten().tolist() == [0, 0, 1, 1]
    assert concept.repeated(3).encoder_hidden_states.shape == (3, 2, 3)


def test_too_long_prompt_is_encoded_and_says_what_was_lost() -> None:
    pipe = pipelines.pipeline()
    encode = StableDiffusion1().encode
    long = "cat " * 150 + "zebra"
    with pytest.warns(UserWarning, match=r"too long for the model; lost: .*zebra"):
        encoded = encode(pipe, long, 64).encoder_hidden_states
    assert encoded.shape == (1, pipe.tokenizer.model_max_length, 24)
    assert not encoded.requires_grad


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_do_not_depend_on_the_batch() -> None:
    pipe = pipelines.pipeline()
    pipe.set_progress_bar_config(disable=True)
    shots = [Shot("cat", 1), Shot("a fish", 2), Shot("cat", 2)]
    told: list[tuple[int, int]] = []

    def draw(batch: int) -> list[Any]:
        return list(
            pictures(
                pipe,
                shots,
                num_inference_steps=3,
                batch_size=batch,
                on_progress=lambda *a: told.append(a),
            )
        )

    one, two = draw(1), draw(2)
    assert told == [(1, 3), (2, 3), (3, 3), (2, 3), (3, 3)]
    for a, b in zip(one, two, strict=True):
        assert a.shape == (64, 64, 3)
        assert abs(a.astype(int) - b.astype(int)).max() <= 1
    assert (one[1] != one[2]).any()
