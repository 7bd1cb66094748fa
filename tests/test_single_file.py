"""A whole model in one file: real files, made here, against what diffusers itself loads of them."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

import esd_fast
from esd_fast.config import EraseConfig, Loading
from esd_fast.models import load_model, look_at
from esd_fast.models.checkpoint import Checkpoint
from esd_fast.models.families import family_of_file
from esd_fast.models.folder import described_at
from esd_fast.models.prediction import asked
from esd_fast.models.single_file import CONFIGS, SingleFile, blank, check_fits

from . import pipelines
from .pipelines import GOLDEN, SHORT, worst_move
from .single_files import original, with_averages

one_thread = pipelines.one_thread
FAMILIES = {"sd1": "sd-ddim", "sd2": "sd2", "sdxl": "sdxl-ddim"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family the folder of a small pipeline; of 2.x one is made of 1.x's parts."""
    folder = tmp_path_factory.mktemp("configs") / "sd2"
    pipe = pipelines.pipeline("sd-v-ddim")
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config(
        dict(pipe.unet.config) | {"use_linear_projection": True}
    ).eval()
    pipe.save_pretrained(folder)
    return {"sd1": GOLDEN / "sd-ddim", "sd2": folder, "sdxl": GOLDEN / "sdxl-ddim"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> Path:
    return folders[family]


@pytest.fixture
def pipe(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleFile, "load", lambda *_: pytest.fail("weights were read"))


def write(tensors: Tensors, file: Path, **metadata: str) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata=metadata or None)
    return file


def config(folder: Path | None, **settings: Any) -> EraseConfig:
    return EraseConfig(
        "cat", device="cpu", model_config=None if folder is None else str(folder), **settings
    )


def assert_same_parts(ours: Any, theirs: Any) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            pipelines.assert_same_weights(a, b.state_dict())


# ----------------------------------------------------------------------------------------- what is loaded


@pytest.mark.usefixtures("no_network")
def test_is_what_diffusers_loads(family: str, folder: Path, pipe: Any, tmp_path: Path) -> None:
    """Every weight of every component, the tokenizer, the scheduler and the latents drawn."""
    file = write(original(pipe), tmp_path / "model.safetensors")
    model = load_model(file, config(folder))
    assert (model.family.name, model.source, model.live) == (family, str(file), False)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_single_file(str(file), config=str(folder), dtype=torch.float32)
    assert_same_parts(model.pipeline, theirs)
    assert_same_parts(model.pipeline, pipe)
    assert type(model.pipeline) is type(theirs)
    assert dict(model.pipeline.scheduler.config) == dict(pipe.scheduler.config)
    assert model.pipeline.tokenizer("a red cat").input_ids == pipe.tokenizer("a red cat").input_ids
    for each in (pipe, model.pipeline):
        each.set_progress_bar_config(disable=True)
    drawn = [
        p("cat", num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
        for p in (pipe, model.pipeline)
    ]
    # not in every bit: sums depend on how memory is aligned, and a file's tensors are mapped
    assert abs(drawn[0] - drawn[1]).max() <= 1e-5


def test_is_erased_like_its_folder(folder: Path, pipe: Any, tmp_path: Path) -> None:
    file = write(original(pipe), tmp_path / "model.safetensors")
    settings = SHORT | {"device": "cpu", "dtype": "float32"}
    ours = esd_fast.erase(file, "cat", model_config=str(folder), **settings)
    truth = esd_fast.erase(pipe, "cat", **SHORT)
    assert ours.tensors.keys() == truth.tensors.keys()
    start = pipelines.weights(load_model(folder, EraseConfig("cat", device="cpu")).pipeline)
    assert worst_move(start, ours.tensors, truth.tensors) <= 1e-3
    assert ours.manifest["model"] == str(file)
    assert ours.manifest["config"]["model_config"] == str(folder)


def test_half_precision_file(folders: dict[str, Path], tmp_path: Path) -> None:
    halves = {
        n: t.half() for n, t in original(pipelines.pipeline()).items() if t.is_floating_point()
    }
    file = write(halves, tmp_path / "model.safetensors")
    model = load_model(file, config(folders["sd1"]))
    assert model.dtype == torch.float32  # of the CPU
    assert torch.equal(model.unet.conv_in.weight, pipelines.pipeline().unet.conv_in.weight.half().float())  # type: ignore[union-attr, operator]  # fmt: skip


def test_names_of_older_text_encoders(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = pipelines.pipeline()
    tensors = {n.replace("transformer.text_model.", "transformer."): t for n, t in original(pipe).items()}  # fmt: skip
    model = load_model(write(tensors, tmp_path / "old.safetensors"), config(folders["sd1"]))
    assert_same_parts(model.pipeline, pipe)


# ------------------------------------------------------------------------------------------- the averages


def test_averages_are_chosen_explicitly(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe, folder = pipelines.pipeline(), folders["sd1"]
    both = write(with_averages(original(pipe)), tmp_path / "both.safetensors")
    plain = pipelines.weights(pipe)
    for ema in ("auto", "no"):
        pipelines.assert_same_weights(load_model(both, config(folder, ema=ema)).pipeline, plain)
    averaged = load_model(both, config(folder, ema="yes")).pipeline
    pipelines.assert_same_weights(averaged, {n: t * 0.5 for n, t in plain.items()})
    # diffusers' own choice, which it makes where there are more than a hundred of them
    theirs = StableDiffusionPipeline.from_single_file(
        str(both), config=str(folder), extract_ema=True, dtype=torch.float32
    )
    pipelines.assert_same_weights(theirs, pipelines.weights(averaged))
    alone = write(original(pipe), tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"ema is 'yes'; this file has EMA weights for 0 of"):
        load_model(alone, config(folder, ema="yes"))


# ---------------------------------------------------------------------------------------------- ckpt files


class Loud:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt(zipped: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = pipelines.pipeline()
    content = {"state_dict": original(pipe), "global_step": 3, "epoch": 1}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same_parts(load_model(tmp_path / "model.ckpt", config(folders["sd1"])).pipeline, pipe)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_run_with_consent_alone(
    zipped: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """diffusers#8874"""
    pipe, file = pipelines.pipeline(), tmp_path / "model.ckpt"
    content = {"state_dict": original(pipe), "callback": Loud(tmp_path / "ran")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds a pickled object .*\.mkdir\).*--allow-pickle"):
        load_model(file, config(folders["sd1"]))
    assert not (tmp_path / "ran").exists()
    model = load_model(file, config(folders["sd1"], allow_pickle=True))
    assert (tmp_path / "ran").exists()
    assert_same_parts(model.pipeline, pipe)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, 0.999])
@pytest.mark.usefixtures("no_weights")
def test_truncated(name: str, kept: float, folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / name
    tensors = {n: t.contiguous() for n, t in original(pipelines.pipeline()).items()}
    torch.save(tensors, file) if name.endswith("ckpt") else write(tensors, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ValueError, match="is no whole") as error:
        load_model(file, config(folders["sd1"]))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_weights")
def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a model")
    with pytest.raises(ValueError, match=r"is no checkpoint; it must be one of \.safetensors"):
        load_model(tmp_path / "notes.txt", config(None))
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list, no table of tensors"):
        load_model(tmp_path / "list.ckpt", config(None))


# ---------------------------------------------------------------------------------------- wrong for us


@pytest.mark.usefixtures("no_weights")
def test_tensors_that_do_not_fit(folder: Path, pipe: Any, tmp_path: Path) -> None:
    """Lost, bent or unknown ones in each component are found in the header: diffusers fills none
    in without a word, nor leaves any on the meta device."""
    whole = original(pipe)
    for beginning in ("model.diffusion_model.", "first_stage_model.", "cond"):
        name = next(n for n in whole if n.startswith(beginning) and n.endswith("weight"))
        lost = {n: t for n, t in whole.items() if n != name}
        bent = whole | {name: torch.zeros(5, *whole[name].shape[1:])}
        for tensors, said in ((lost, "1 tensors missing|3 tensors"), (bent, "of another shape")):
            with pytest.raises(ValueError, match=said):
                load_model(write(tensors, tmp_path / "x.safetensors"), config(folder))
    unknown = whole | {"model.diffusion_model.input_blocks.1.0.extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 unknown"):
        load_model(write(unknown, tmp_path / "x.safetensors"), config(folder))
    # of the full-size configuration, which is the default
    with pytest.raises(ValueError, match=r"does not fit the unet .*--config FOLDER"):
        load_model(write(whole, tmp_path / "x.safetensors"), config(None))


@pytest.mark.usefixtures("no_weights")
def test_configuration_of_another_family(folders: dict[str, Path], tmp_path: Path) -> None:
    file = write(original(pipelines.pipeline()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model_config is .*XL base; .* is Stable Diffusion 1\.x"):
        load_model(file, config(folders["sdxl"]))


IN = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "inpainting": ({IN: (8, 9, 3, 3)}, "takes 9 channels and gives 4: an inpainting model"),
    "instruct": ({IN: (8, 8, 3, 3)}, "edits a picture by instruction"),
    "guidance embedding": (
        {IN: (8, 4, 3, 3), "model.diffusion_model.time_embed.cond_proj.weight": (8, 8)},
        "turbo or LCM distillation",
    ),
    "refiner": (
        {IN: (8, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (8,)},
        "the SDXL refiner",
    ),
    "no text encoder": ({IN: (8, 4, 3, 3)}, "the text encoder of none of Stable Diffusion 1"),
    "flux": (
        {"double_blocks.0.img_attn.norm.key_norm.scale": (8,)},
        "Flux or a kin of it, a diffusion transformer",
    ),
    "sd3": (
        {"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (8,)},
        "Stable Diffusion 3, a diffusion transformer",
    ),
    "z-image": (
        {"model.diffusion_model.layers.0.adaLN_modulation.0.weight": (8, 8)},
        r"z-image-turbo \(as diffusers calls it\), a diffusion transformer",
    ),
    "playground": ({"edm_mean": (1,), IN: (8, 4, 3, 3)}, "Playground v2.5"),
    "lora": ({"lora_unet_down_blocks_0.lora_up.weight": (8, 8)}, "a LoRA"),
    "controlnet": ({"control_model.time_embed.0.weight": (8, 8)}, "a ControlNet"),
    "erasure": ({"up_blocks.1.attentions.0.to_k.weight": (8, 8)}, "under diffusers' names"),
    "vae": ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "a VAE"),
    "nothing of it": ({"weight": (1,)}, "no UNet in the original layout"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("no_weights")
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    shapes, said = REFUSED[kind]
    file = write({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "sd15.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        load_model(file, config(None))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_weights")
def test_settings_of_the_other_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    file = write(original(pipelines.pipeline()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="variant is 'fp16', which only a model in diffusers' lay"):
        load_model(file, config(folders["sd1"], variant="fp16"))
    for setting in ({"ema": "no"}, {"model_config": str(file)}):
        with pytest.raises(ValueError, match="which only a single file has a use for"):
            load_model(folders["sd1"], EraseConfig("cat", **setting))


# ---------------------------------------------------------------------------------------- full size


SIZES = {  # of the published models
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("name", SIZES)
def test_packaged_configurations_are_the_published_models(name: str) -> None:
    """Their weights, counted; and a full-size file's names and shapes (no weights) fit them."""
    from types import SimpleNamespace

    configs = str(CONFIGS / name)
    made = blank(configs, described_at(configs))
    for component, size in (SIZES[name] | {"vae": 83_653_863}).items():
        assert sum(p.numel() for p in made.models[component].parameters()) == size
    tensors = original(SimpleNamespace(**made.models))
    if name == "sd2":  # its last layer and projection, which the model does not use
        more = {"resblocks.23.ln_1.weight": (1024,), "resblocks.23.attn.in_proj_bias": (3072,)}
        first = "cond_stage_model.model."
        tensors |= {f"{first}transformer.{n}": torch.empty(s) for n, s in more.items()}
        tensors[f"{first}text_projection"] = torch.empty(1024, 1024)
    file = Checkpoint(Path("x"), {n: t.to("meta") for n, t in tensors.items()}, {})
    assert family_of_file(file).name == name
    check_fits(file, made, "auto")
    assert described_at(configs).native_resolution == {"sd1": 512, "sd2": 768, "sdxl": 1024}[name]


# --------------------------------------------------------------------------------------- noise or velocity


def test_prediction_type_of_files(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe, plain = pipelines.pipeline(), Loading(model_config=str(folders["sd1"]))

    def told(file: Path, loading: Loading = plain) -> str | None:
        return look_at(str(file), loading).described.prediction_type

    tensors = original(pipe)
    file = write(tensors, tmp_path / "plain.safetensors")
    assert told(file) == "epsilon"
    said = Loading(model_config=str(folders["sd1"]), prediction_type="v_prediction")
    assert told(file, said) == "v_prediction"
    file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert told(file) == "v_prediction"
    file.with_suffix(".yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert told(file) == "epsilon"
    marked = write(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "m.safetensors")  # fmt: skip
    assert told(marked) == "v_prediction"
    scheduler = load_model(marked, config(folders["sd1"])).pipeline.scheduler
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.alphas_cumprod[-1] == 0  # nothing but noise at the last timestep
    for number, (metadata, expected) in enumerate(
        [
            ({"modelspec.prediction_type": "v"}, "v_prediction"),
            ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
            ({"ss_v_parameterization": "True"}, "v_prediction"),
            ({"ss_v_parameterization": "False"}, "epsilon"),
        ]
    ):
        assert told(write(tensors, tmp_path / f"{number}.safetensors", **metadata)) == expected


def test_a_trained_noise_predictor_shows_what_it_is() -> None:
    model = load_model(None, EraseConfig("cat", device="cpu"))
    null = model.family.encode(model.pipeline, "", 64)
    assert asked(model.unet, null) == "epsilon"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_2x_file_that_does_not_say_is_asked(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the family's own configuration, made small; the published resolution comes with it."""
    small = tmp_path / "configs" / "sd2"
    shutil.copytree(folders["sd2"], small)
    monkeypatch.setattr("esd_fast.models.single_file.CONFIGS", small.parent)
    monkeypatch.setattr("esd_fast.models.prediction.asked", lambda *_: kind)
    pipe = DiffusionPipeline.from_pretrained(small, dtype=torch.float32)
    file = write(original(pipe), tmp_path / "model.safetensors")
    assert look_at(str(file), Loading()).described.prediction_type is None
    model = load_model(file, config(None))
    assert model.pipeline.scheduler.config.prediction_type == kind
    assert model.native_resolution == {"epsilon": 512, "v_prediction": 768}[kind]
    said = load_model(file, config(None, prediction_type=kind))
    assert said.native_resolution == model.native_resolution


def test_velocity_is_told_from_noise() -> None:
    """The question itself, on UNets that answer as the two kinds do."""

    class Answers(torch.nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.share = share
            self.config = type("Config", (), {"sample_size": 32, "in_channels": 4})

        def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
            picture = torch.linspace(-1, 1, 32).expand_as(x)
            return (self.share * x - (1 - self.share**2) ** 0.5 * picture,)

    from esd_fast.models.base import Conditioning

    null = Conditioning(torch.zeros(1, 77, 8))
    assert asked(Answers(1.0), null) == "epsilon"
    assert asked(Answers(0.068), null) == "v_prediction"  # alpha of the last timestep
    with pytest.raises(ValueError, match=r"not finite in float32.*prediction_type"):
        asked(Answers(float("nan")), null)


# ------------------------------------------------------------------------------------------- command line


def test_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    from esd_fast.cli import main

    file = write(original(pipelines.pipeline()), tmp_path / "model.safetensors")
    source = ["--model", str(file), "--config", str(folders["sd1"])]
    out = tmp_path / "out"
    few = ["--iterations", "1", "--num-inference-steps", "2", "--pictures", "0"]
    assert main(["train", "--concept", "cat", *source, *few, "--output", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["family"], manifest["model"]) == ("sd1", str(file))
    assert main(["info", *source]) == 0
    assert main(["info", str(file), *source[2:]]) == 0
    assert main(["plan", *source]) == 0
    assert main(["info", str(out), *source]) == 2  # one at a time
