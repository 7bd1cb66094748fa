"""Files that are no checkpoint, no list of prompts and no picture, each with one thing broken; beside broken_models,
which has folders and erasures."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save, save_file

from .broken_models import DEEP, ESCAPES, RunsCode, Tensors, entry, raw, with_header

WriteFile = Callable[[Path, Tensors], Any]


def header(*entries: Any, data: int = 64) -> WriteFile:
    """Tensors a, b, .. of those entries, over so many bytes."""
    return raw(with_header(json.dumps(dict(zip("abc", entries, strict=False))), data=bytes(data)))


def changed(change: Callable[[Tensors], Any]) -> WriteFile:
    """A whole checkpoint of other tensors."""
    return lambda file, tensors: save_file(change(dict(tensors)), file)


def without(part: str) -> WriteFile:
    return changed(lambda tensors: {n: t for n, t in tensors.items() if part not in n})


def with_first(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> WriteFile:
    """Another value of the first tensor whose name has `part`."""

    def change(tensors: Tensors) -> Tensors:
        name = min(n for n in tensors if part in n)
        return tensors | {name: value(tensors[name])}

    return changed(change)


def cut_to(kept: Callable[[bytes], int]) -> WriteFile:
    """The beginning of a whole checkpoint."""

    def make(file: Path, tensors: Tensors) -> None:
        whole = save(tensors)
        file.write_bytes(whole[: kept(whole)])

    return make


def header_end(whole: bytes) -> int:
    return 8 + int(struct.unpack("<Q", whole[:8])[0])


def pickled(content: Callable[[Tensors], Any], kept: float = 1.0, zipped: bool = True) -> WriteFile:
    def make(file: Path, tensors: Tensors) -> None:
        torch.save(content(tensors), file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * kept)])

    return make


def archive(**members: bytes) -> WriteFile:
    def make(file: Path, _: Tensors) -> None:
        with zipfile.ZipFile(file, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)

    return make


UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
# a model in one file -> how it is broken; the suffix is .safetensors if none is said
CHECKPOINTS: dict[str, WriteFile] = {
    "empty": raw(b""),
    "a byte": raw(b"\0"),
    "shorter than a length": raw(bytes(7)),
    "a length of nothing": raw(bytes(8)),
    "text": raw(b"<!DOCTYPE html><title>404</title> this is what a failed download leaves"),
    "pointer": raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "cut in the header": cut_to(lambda whole: header_end(whole) // 2),
    "cut at the data": cut_to(header_end),
    "cut in the data": cut_to(lambda whole: (header_end(whole) + len(whole)) // 2),
    "cut by a byte": cut_to(lambda whole: len(whole) - 1),
    "longer than it says": lambda file, tensors: file.write_bytes(save(tensors) + b"x"),
    "length huge": raw(with_header("{}", 2**62)),
    "length negative": raw(with_header("{}", 2**64 - 8)),
    "length beyond the file": raw(with_header("{}", 4096)),
    "header no JSON": raw(with_header("tensors: yes")),
    "header no text": raw(with_header(b"\xff\xfe\x00")),
    "header a list": raw(with_header("[]")),
    "header deep": raw(with_header('{"a":' + DEEP + "}")),
    "header of numbers": raw(with_header('{"a": 1}')),
    "metadata of numbers": raw(with_header('{"__metadata__": {"a": 1}}', data=b"")),
    "no tensors": raw(with_header("{}", data=b"")),
    "overlap": header(entry([8], 0, 32), entry([8], 16, 48), entry([4], 48, 64)),
    "gap": header(entry([4], 0, 16), entry([8], 32, 64)),
    "offsets beyond": header(entry([1024], 0, 4096)),
    "offsets reversed": header(entry([16], 64, 0)),
    "offsets negative": header(entry([16], -64, 0)),
    "offsets of fractions": raw(
        with_header('{"a":{"dtype":"F32","shape":[16],"data_offsets":[0.0,64.5]}}')
    ),
    "shape of another size": header(entry([15], 0, 64)),
    "shape negative": header(entry([-16], 0, 64)),
    "shape endless": header(entry([2**63, 2], 0, 64)),
    "dtype unknown": header(entry([16], 0, 64, "FLOAT")),
    "dtype a number": raw(with_header('{"a":{"dtype":32,"shape":[16],"data_offsets":[0,64]}}')),
    "no UNet": without("model.diffusion_model."),
    "no VAE": without("first_stage_model."),
    "no text encoder": without("cond_stage_model."),
    "a tensor lost": without(UNET_IN),
    "a bias lost": without("op.bias"),
    "a tensor bent": with_first(UNET_IN, lambda t: t[:1].clone()),
    "a tensor of no shape": with_first(UNET_IN, lambda t: t.flatten()[0].clone()),
    "a tensor more": changed(lambda t: t | {f"{UNET_IN}.{ESCAPES}": torch.ones(2)}),
    "names that climb": changed(lambda t: t | {"../../climbed": torch.ones(2)}),
    "NaN": with_first(UNET_IN, lambda t: t * float("nan")),
    "another family": changed(
        lambda t: {n.replace("cond_stage_model.transformer", "conditioner.embedders.0.transformer"): v for n, v in t.items()}
    ),
    "a LoRA": changed(lambda _: {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}),
    "a VAE": changed(lambda _: {"decoder.conv_in.weight": torch.ones(2, 2, 3, 3)}),
    "code.ckpt": pickled(lambda t: {"state_dict": t, "x": RunsCode()}),
    "old code.ckpt": pickled(lambda t: {"state_dict": t, "x": RunsCode()}, zipped=False),
    "cut.ckpt": pickled(lambda t: t, kept=0.7),
    "old cut.ckpt": pickled(lambda t: t, kept=0.7, zipped=False),
    "list.ckpt": pickled(lambda t: [*t.values()]),
    "empty.ckpt": raw(b""),
    "text.ckpt": raw(b"<!DOCTYPE html>"),
    "archive of no tensors.ckpt": archive(**{"../../climbed": b"x", "readme": b"y"}),
    "climbing.ckpt": archive(**{"../../climbed": b"x", "archive/data.pkl": b"\x80\x02}q\x00."}),
    "model.gguf": raw(b"GGUF" + bytes(60)),
    # no files
    "folder": lambda file, _: file.mkdir(),
    "loop": lambda file, _: file.symlink_to(file.name),
    "link to nothing": lambda file, _: file.symlink_to("nowhere"),
    "pipe": lambda file, _: os.mkfifo(file),
}  # fmt: skip


CSV = b"case_number,prompt,evaluation_seed\n"
# a list of prompts that must not be taken -> (its content, what has to be said of it)
LISTS: dict[str, tuple[bytes, str]] = {
    "empty.csv": (b"", "one column 'prompt'.*nothing"),
    "no header.csv": (b"a cat,1\na dog,2\n", "one column 'prompt'.*'a cat'"),
    "other columns.csv": (b"text,seed\na cat,1\n", "one column 'prompt'.*'text', 'seed'"),
    "two prompts.csv": (b"prompt,prompt\na,b\n", "one column 'prompt'"),
    "two seeds.csv": (b"prompt,evaluation_seed,evaluation_seed\na,1,2\n", "evaluation_seed.*twice"),
    "two numbers.csv": (b"case_number,prompt,case_number\n1,a,2\n", "case_number.*twice"),
    "semicolons.csv": (b"case_number;prompt\n0;a cat\n", "separated by commas"),
    "header alone.csv": (CSV, "holds no prompt"),
    "blank lines.csv": (CSV + b"\n\n,,\n", "holds no prompt"),
    "blank prompt.csv": (CSV + b"0,a cat,1\n1,  ,2\n", "line 3: prompt is ' '"),
    "no prompt.csv": (CSV + b"0\n", "line 2: prompt is ''"),
    "too many cells.csv": (CSV + b"0,a cat, asleep,1\n", "line 2 has 4 cells.*double quotes"),
    "open quote.csv": (CSV + b'0,"a cat,1\n1,a dog,2\n', "line 3: unexpected end"),
    "odd quote.csv": (CSV + b'0,"a "cat,1\n', "line 2: ',' expected"),
    "huge cell.csv": (CSV + b"0," + b"x" * 200_000 + b",1\n", "line 2: field larger than"),
    "binary.csv": (bytes(range(256)), "no UTF-8 text"),
    "a PNG.csv": (b"\x89PNG\r\n\x1a\n" + bytes(64), "no UTF-8 text"),
    "NUL.csv": (CSV + b"0,a\0cat,1\n", "no UTF-8 text.*line [12] holds NUL"),
    "UTF-16.csv": ("prompt\na cat\n".encode("utf-16"), "no UTF-8 text"),
    "UTF-16 unmarked.csv": ("prompt\na cat\n".encode("utf-16-le"), "no UTF-8 text.*line [12] holds NUL"),
    "UTF-32.csv": ("prompt\na cat\n".encode("utf-32"), "no UTF-8 text"),
    "Latin 1.csv": ("prompt\nein Bär\n".encode("latin-1"), "no UTF-8 text.*byte 12"),
    "surrogate.csv": (b"prompt\na \xed\xa0\x80 cat\n", "no UTF-8 text"),
    "seed a word.csv": (CSV + b"0,a cat,one\n", "line 2: evaluation_seed is 'one'"),
    "seed negative.csv": (CSV + b"0,a cat,-1\n", "line 2: evaluation_seed is '-1'"),
    "seed a fraction.csv": (CSV + b"0,a cat,1.5\n", "evaluation_seed is '1.5'.*whole number"),
    "seed endless.csv": (CSV + b"0,a cat," + b"9" * 5000 + b"\n", "evaluation_seed is '9999"),
    "seed NaN.csv": (CSV + b"0,a cat,nan\n", "evaluation_seed is 'nan'"),
    "seed a formula.csv": (CSV + b"0,a cat,=1+1\n", "evaluation_seed is '=1\\+1'"),
    "number a word.csv": (CSV + b"first,a cat,1\n", "line 2: case_number is 'first'"),
    "number that climbs.csv": (CSV + b"../../7,a cat,1\n", "case_number is '../../7'"),
    "number of other digits.csv": (CSV + "٣,a cat,1\n".encode(), "case_number is '٣'"),
    "empty.txt": (b"", "holds no prompt"),
    "blank.txt": (b" \n\t\n\xe3\x80\x80\n", "holds no prompt"),
    "binary.txt": (b"\xff\0\xfe", "no UTF-8 text"),
    "UTF-16 unmarked.txt": ("a cat\n".encode("utf-16-le"), "no UTF-8 text.*line [12] holds NUL"),
    "invisible.txt": ("a cat\n\u200b\n".encode(), "line 2: the prompt is '\\\\u200b'"),
}  # fmt: skip
# one that is fine, however it looks: every cell is the prompt as it stands
FORMULAS = ["=cmd|'/C calc'!A0", "+1", "-rf", "@SUM(A1)", "../../climbed", "/etc/passwd", "CON",
            "<script>alert(1)</script>", "two\nlines", "a\x1b[2Jb", "\u202egnp.exe", "x" * 300]  # fmt: skip


def png(side: int = 8, **text: str) -> bytes:
    """A whole one, with text chunks."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    data = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(data, "PNG", pnginfo=chunks)
    return data.getvalue()


def claiming(width: int, height: int) -> Callable[[bytes], bytes]:
    """The same bytes under the header of a picture of that size."""

    def make(whole: bytes) -> bytes:
        start = whole[:16] + struct.pack(">II", width, height) + whole[24:29]
        return start + struct.pack(">I", zlib.crc32(start[12:])) + whole[33:]

    return make


def as_kind(kind: str) -> Callable[[bytes], bytes]:
    def make(_: bytes) -> bytes:
        data = io.BytesIO()
        Image.new("RGB", (8, 8)).save(data, kind)
        return data.getvalue()

    return make


# a picture that cannot be read -> what a whole one's bytes become
PICTURES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"this is no picture",
    "cut in the signature": lambda whole: whole[:5],
    "cut in the header": lambda whole: whole[:20],
    "cut in the pixels": lambda whole: whole[: whole.index(b"IDAT") + 8],
    "pixels damaged": lambda whole: whole.replace(b"IDATx", b"IDATy"),
    "no pixels": lambda whole: whole[: whole.index(b"IDAT") - 4] + whole[-12:],
    "of no size": claiming(0, 0),
    "larger than its pixels": claiming(4096, 4096),
    "a bomb": claiming(60_000, 60_000),
    "half a bomb": claiming(10_000, 10_000),
    "the largest": claiming(2**31 - 1, 2**31 - 1),
    "a PostScript program": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n showpage\n",
    "another kind": as_kind("TIFF"),
}  # fmt: skip
