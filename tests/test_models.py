"""Which model is it, is it there, and may it be used: all said before a weight is read."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from esd_fast.config import EraseConfig
from esd_fast.generate import Shot, pictures
from esd_fast.models import family_of, load_model, resolve_device
from esd_fast.models.base import Conditioning, PromptSet
from esd_fast.models.sd import StableDiffusion

from . import pipelines
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
PLAIN = {"in_channels": 4, "out_channels": 4}
CAT = EraseConfig(concept="cat")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_: pytest.fail("weights were read"))


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
    assert model.family.name == "sd"
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


def test_pickled_weights_in_a_folder_are_not_opened(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder, CAT)


@pytest.mark.parametrize("name", ["sd14.ckpt", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.usefixtures("no_weights")
def test_single_file_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"single file.*from_single_file.*save_pretrained"
    ) as error:
        load_model(tmp_path / name, CAT)
    assert ("pickled code" in str(error.value)) == (not name.endswith("safetensors"))


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
        ({"in_channels": 9}, "takes 9 channels and gives 4"),
        ({"time_cond_proj_dim": 256}, "distill"),
        ({"addition_embed_type": "text_time"}, "of no family known"),
    ],
)
def test_unfit_folders_by_their_config(unet: dict[str, Any], why: str, folder: Path) -> None:
    change_json(folder / "unet" / "config.json", **unet)
    with pytest.raises(ValueError, match=why):
        load_model(folder, CAT)


@pytest.mark.usefixtures("no_weights")
def test_pipeline_without_a_unet(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="FluxPipeline is of no family known here"):
        load_model(folder, CAT)


def test_family_comes_from_the_config_not_the_name() -> None:
    claims = StableDiffusion().claims
    assert claims("StableDiffusionPipeline", PLAIN)
    assert not claims("StableDiffusionPipeline", PLAIN | {"addition_embed_type": "text_time"})
    assert not claims("StableDiffusionXLPipeline", PLAIN)
    assert family_of("StableDiffusionPipeline", PLAIN).name == "sd"


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
    both = PromptSet({"null": null, "concept": concept}).stacked(("null", "concept"), 2)
    assert both.encoder_hidden_states[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert both.added_cond_kwargs is not None
    assert both.added_cond_kwargs["t"].flatten().tolist() == [0, 0, 1, 1]
    assert concept.repeated(3).encoder_hidden_states.shape == (3, 2, 3)


def test_too_long_prompt_is_encoded_and_says_what_was_lost() -> None:
    pipe = pipelines.pipeline()
    encode = StableDiffusion().encode
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
