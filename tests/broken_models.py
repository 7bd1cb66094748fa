"""Copies of a small pipeline's folder with one thing broken in each, and files that are no model."""

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esd_fast.cli import main

UNET = Path("unet/diffusion_pytorch_model.safetensors")
DEEP = "[" * 100_000 + "]" * 100_000
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\x00\n\r"  # clears a terminal, names it, turns text round
Break = Callable[[Path], None]


def tree(place: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(place)): p.lstat().st_size for p in place.rglob("*") if not p.is_dir()
    }


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in `tmp_path`; progress bars are left out of what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*line: str) -> tuple[int, str, str]:
        code = main([*line])
        said = capsys.readouterr()
        # a pattern for a whole line takes squares of a long one
        lines = re.split(r"([\n\r])", said.err)
        return code, said.out, "".join(x for x in lines if "%|" not in x).strip("\r\n")

    return run


def set_json(name: str, **values: Any) -> Break:
    """Values in a JSON file of the folder; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / name
        made = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in made.items() if v is not None}))

    return change


def write(name: str, content: str | bytes) -> Break:
    def change(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Break:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            for inner in path.iterdir():
                inner.unlink()
            path.rmdir()
        else:
            path.unlink()

    return change


def link(name: str, target: str) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def folder_at(name: str) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def cut(name: str, kept: float) -> Break:
    def change(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * kept)])

    return change


def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file(change(tensors) or tensors, folder / name)

    return apply


def with_header(header: str | bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], first: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def poison(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """NaN in the first tensor whose name has `part`, once a row."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if part in n)
        tensors[name].flatten(1)[:, 0] = float("nan")

    return change


def first_cut(tensors: dict[str, torch.Tensor]) -> None:
    name = min(n for n in tensors if n.endswith("weight"))
    tensors[name] = tensors[name][:1].clone()


# what is broken in a diffusers folder -> how
FOLDERS: dict[str, Break] = {
    "no index": remove("model_index.json"),
    "index cut": cut("model_index.json", 0.5),
    "index empty": write("model_index.json", ""),
    "index a list": write("model_index.json", "[]"),
    "index deep": write("model_index.json", '{"a": ' + DEEP + "}"),
    "index no text": write("model_index.json", b"\xff\xfe{}"),
    "index a folder": folder_at("model_index.json"),
    "index in a loop": link("model_index.json", "model_index.json"),
    "index of code": set_json("model_index.json", unet=["evil", "UNet2DConditionModel"]),
    "index of short pairs": set_json("model_index.json", unet=["diffusers"]),
    "index of no pairs": set_json("model_index.json", unet="diffusers"),
    "index of numbers": set_json("model_index.json", unet=[1, 2]),
    "index of unknown class": set_json("model_index.json", unet=["diffusers", "NoSuchModel"]),
    "index of escapes": set_json("model_index.json", unet=["diffusers", ESCAPES]),
    "index out of the folder": set_json(
        "model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]}
    ),
    "pipeline class a list": set_json("model_index.json", _class_name=["a", "b"]),
    "pipeline class of escapes": set_json("model_index.json", _class_name=ESCAPES),
    "no unet": remove("unet"),
    "no vae": remove("vae"),
    "no text encoder": remove("text_encoder"),
    "no tokenizer": remove("tokenizer"),
    "no scheduler": remove("scheduler"),
    "unet config lost": remove("unet/config.json"),
    "unet config cut": cut("unet/config.json", 0.5),
    "unet config a list": write("unet/config.json", "[1]"),
    "unet config empty": write("unet/config.json", "{}"),
    "unet config deep": write("unet/config.json", '{"a": ' + DEEP + "}"),
    "unet of no size": set_json("unet/config.json", sample_size=None),
    "unet of size text": set_json("unet/config.json", sample_size="big"),
    "unet of size zero": set_json("unet/config.json", sample_size=0),
    "unet without blocks": set_json("unet/config.json", block_out_channels=[]),
    "unet of huge blocks": set_json("unet/config.json", block_out_channels=[2**40, 2**40]),
    "unet of text channels": set_json("unet/config.json", in_channels="4", out_channels="4"),
    "unet of other shapes": set_json("unet/config.json", cross_attention_dim=40),
    "unet of unknown blocks": set_json("unet/config.json", down_block_types=["No", "Such"]),
    "weights lost": remove(str(UNET)),
    "weights empty": write(str(UNET), b""),
    "weights cut in the header": cut(str(UNET), 0.01),
    "weights cut": cut(str(UNET), 0.7),
    "weights a folder": folder_at(str(UNET)),
    "weights in a loop": link(str(UNET), UNET.name),
    "weights linked to nothing": link(str(UNET), "nowhere"),
    "weights of a huge header": write(str(UNET), with_header("{}", 2**63)),
    "weights of a header beyond the file": write(str(UNET), with_header("{}", 10_000)),
    "weights of no JSON": write(str(UNET), with_header("not json")),
    "weights of a list": write(str(UNET), with_header("[1, 2]")),
    "weights of deep JSON": write(str(UNET), with_header('{"a":' + DEEP + "}")),
    "weights of another shape": change_tensors(str(UNET), first_cut),
    "weights not all there": change_tensors(str(UNET), lambda t: dict(list(t.items())[5:])),
    "weights NaN": change_tensors(str(UNET), poison("attn2.to_k")),
    "weights NaN elsewhere": change_tensors(str(UNET), poison("conv_in.weight")),
    "weights none of it": write(str(UNET), with_header("{}", data=b"")),
    "text encoder cut": cut("text_encoder/model.safetensors", 0.5),
    "text encoder NaN": change_tensors("text_encoder/model.safetensors", poison("token_embedding")),
    "text encoder of other shapes": change_tensors("text_encoder/model.safetensors", first_cut),
    "text encoder config lost": remove("text_encoder/config.json"),
    "text encoder config a list": write("text_encoder/config.json", "[]"),
    "vae cut": cut("vae/diffusion_pytorch_model.safetensors", 0.5),
    "vae config lost": remove("vae/config.json"),
    "vae without blocks": set_json("vae/config.json", block_out_channels=[]),
    "vae of text blocks": set_json("vae/config.json", block_out_channels="ab"),
    "tokenizer cut": cut("tokenizer/tokenizer.json", 0.5),
    "tokenizer a list": write("tokenizer/tokenizer.json", "[]"),
    "tokenizer config cut": cut("tokenizer/tokenizer_config.json", 0.5),
    "scheduler cut": cut("scheduler/scheduler_config.json", 0.5),
    "scheduler of unknown betas": set_json("scheduler/scheduler_config.json", beta_schedule="no"),
    "scheduler of unknown prediction": set_json(
        "scheduler/scheduler_config.json", prediction_type="nothing"
    ),
    "scheduler of no steps": set_json("scheduler/scheduler_config.json", num_train_timesteps=0),
    "scheduler of text": set_json("scheduler/scheduler_config.json", num_train_timesteps="many"),
    "scheduler that draws": set_json("model_index.json", scheduler=["diffusers", "DDPMScheduler"]),
    "scheduler that is none": set_json(
        "model_index.json", scheduler=["diffusers", "AutoencoderKL"]
    ),
}


class RunsCode:
    """What a pickle can do to whoever reads it: here it makes a folder where the reader is."""

    def __reduce__(self) -> Any:
        return Path.mkdir, (Path("ran"),)


Tensors = dict[str, torch.Tensor]
WriteFile = Callable[[Path, Tensors], None]


def raw(content: bytes) -> WriteFile:
    return lambda file, _: file.write_bytes(content) and None  # type: ignore[func-returns-value]


def header(entries: dict[str, Any] | str) -> WriteFile:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return raw(with_header(text))


def saved(change: Callable[[Tensors], Tensors], **metadata: str) -> WriteFile:
    return lambda file, tensors: save_file(change(dict(tensors)), file, metadata=metadata or None)


def manifest(text: str | None = None, **values: Any) -> WriteFile:
    """The tensors with a manifest of that text, or of those values."""
    told = json.dumps({"concept": "cat", "method": "esd-x"} | values) if text is None else text
    return saved(lambda tensors: tensors, esd_fast_manifest=told)


def pickled(content: Any) -> WriteFile:
    return lambda file, _: torch.save(content, file)


def shortened(share: float) -> WriteFile:
    def make(file: Path, tensors: Tensors) -> None:
        save_file(tensors, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])

    return make


def zip_that_climbs(file: Path, _: Tensors) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../climbed", "x")
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TWICE = '{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]},"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
# erasures that must not be taken; the suffix is the file's, .safetensors if none is said
ERASURES: dict[str, WriteFile] = {
    "empty": raw(b""),
    "text": raw(b"this is no file of tensors"),
    "cut": shortened(0.8),
    "cut in the header": shortened(0.05),
    "huge header": raw(with_header("{}", 2**63)),
    "header beyond the file": raw(with_header("{}", 10_000)),
    "list": header("[1, 2]"),
    "deep header": header('{"a":' + DEEP + "}"),
    "named twice": header(TWICE % (16, 64)),
    "named twice, of two sizes": header(TWICE % (4, 16)),
    "overlapping": header({"a": entry([4], 0, 16), "b": entry([14], 8, 64)}),
    "negative shape": header({"a": entry([-4], 0, 64)}),
    "shape without end": header({"a": entry([2**62, 2**62], 0, 64)}),
    "unknown dtype": header({"a": entry([16], 0, 64, "F4")}),
    "dtype that torch lacks": header({"a": entry([8], 0, 64, "U64")}),
    "no tensors": saved(lambda _: {}),
    "NaN": saved(lambda t: t | {FIRST: t[FIRST] * float("nan")}),
    "infinity": saved(lambda t: t | {FIRST: t[FIRST] + float("inf")}),
    "whole numbers": saved(lambda t: {n: v.long() for n, v in t.items()}),
    "another shape": saved(lambda t: t | {FIRST: t[FIRST][:1].clone()}),
    "no shape": saved(lambda t: t | {FIRST: torch.ones(())}),
    "names that climb": saved(lambda t: t | {"../../climbed": torch.ones(2), "/abs": torch.ones(2)}),
    "names of escapes": saved(lambda t: t | {ESCAPES: torch.ones(2)}),
    "LoRA": saved(lambda _: {"unet.down_blocks.0.to_k.lora_A.weight": torch.ones(2, 2)}),
    "manifest cut": manifest('{"concept":'),
    "manifest deep": manifest('{"a":' + DEEP + "}"),
    "manifest of a huge number": manifest('{"concept":' + "9" * 5000 + "}"),
    "manifest a list": manifest("[]"),
    "concept a table": manifest(concept={"a": 1}),
    "concepts of numbers": manifest(concepts=[1, {}]),
    "concepts a text": manifest(concepts="cat"),
    "method a number": manifest(method=3),
    "model a table": manifest(model={"a": 1}),
    "fingerprint a list": manifest(base_fingerprint=[1]),
    "erase_from a list": manifest(erase_from=["a"]),
    "code.pt": pickled({FIRST: torch.ones(1), "x": RunsCode()}),
    "code.ckpt": pickled({"state_dict": {FIRST: torch.ones(1)}, "x": RunsCode()}),
    "list.pt": pickled([1, 2]),
    "text.pt": raw(b"hello"),
    "empty.bin": raw(b""),
    "climbing archive.pt": zip_that_climbs,
    "notes.txt": raw(b"hello"),
}  # fmt: skip
# what a stranger may say of an erasure that is whole
SAID = {
    "escapes": dict.fromkeys(("concept", "method", "model", "erase_from", ESCAPES), "cat" + ESCAPES),
    "markup": dict.fromkeys(("concept", "model", "erase_from"), '"><script>alert(1)</script>'),
    "climbing": {"concept": "../../../climbed", "erase_from": "/climbed", "method": "../climbed"},
    "absolute": {"concept": "/climbed/cat", "model": "/etc/passwd"},
    "device": {"concept": "CON", "method": "AUX", "erase_from": "nul.txt"},
    "long": {"concept": "x" * 300 + "/" * 300, "erase_from": "猫" * 300, "method": "y" * 300},
    "very long": {"concept": "x" * 1_000_000},
    "endless expression": {"concept": "cat", "method": "([a-z_.0-9]+)+!"},
    "broken expression": {"concept": "cat", "method": "(("},
    "other kinds": {"concept": "cat", "losses": "x", "config": 3, "unet_passes": None, "seed": {}},
    "nothing": {"concept": "", "method": ""},
}  # fmt: skip
