"""Every reader of files that may come from anybody, as a function of bytes; and files to begin with.

A reader gives what it read, or raises one of the package's own errors: ValueError, FileNotFoundError, or
a class of its own made of them, with a text of some lines at most. Whatever else comes out of it is a
fault. No file is trusted, so none may take memory or time beyond its own size.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import esd_fast
from esd_fast import prompt_list, repeating, run_state
from esd_fast.config import Loading
from esd_fast.export import base, compare
from esd_fast.fleet import jobs as fleet_jobs
from esd_fast.models.single_file import look_at_file
from esd_fast.stored_samples import checksum_of
from esd_fast.tensor_files import Lazy

GOLDEN = Path(__file__).parents[1] / "golden"
LONGEST = 4000  # characters of an error


def read_checkpoint(file: Path) -> None:
    state = run_state.read_state(file)
    run_state.config_in(state)
    state.samples(torch.device("cpu"))


def read_state(file: Path) -> None:
    """A checkpoint whose checksum is right, with whatever its text says."""
    text = file.read_bytes().decode(errors="ignore")
    tensors = {"masters.a": Lazy.of(torch.ones(2))}
    metadata = {
        run_state.STATE_KEY: text,
        run_state.CHECKSUM_KEY: checksum_of(text, tensors),
    }
    whole = file.with_suffix(".safetensors")
    whole.write_bytes(save({n: t.read() for n, t in tensors.items()}, metadata))
    state = run_state.read_state(whole)
    assert state.step >= 0
    assert len(state.stops) == len(state.resumed_at) + 1
    run_state.config_in(state)
    state.check(state.identity)


def read_delta(file: Path) -> None:
    erasure = esd_fast.load(file)
    assert erasure.file_name.endswith(".safetensors")
    assert len(erasure.concepts) >= 0
    repr(erasure)


def read_weights(file: Path) -> None:
    """LoRAs and other files of tensors, as `diff`, `export` and `apply` open them."""
    compare.opened(str(file), allow_pickle=False)
    base.open_base(file)


def read_single_file(file: Path) -> None:
    # a small model's configurations: those of Stable Diffusion take a second to be made into one
    look_at_file(file, Loading(model_config=str(GOLDEN / "sd-ddim")))


def read_manifest(file: Path) -> None:
    _ = repeating.recorded(file).config


def read_fleet(file: Path) -> None:
    try:
        fleet_jobs.read_jobs(file, None, {})
    except fleet_jobs.BadJobs as error:
        if any("\n" in problem or len(problem) > LONGEST for problem in error.problems):
            raise AssertionError(error.problems) from error
        raise


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": (".safetensors", read_checkpoint),
    "state": (".json", read_state),
    "delta": (".safetensors", read_delta),
    "pickled-delta": (".pt", read_delta),
    "weights": (".safetensors", read_weights),
    "single-file": (".safetensors", read_single_file),
    "pickled-single-file": (".ckpt", read_single_file),
    "prompts": (".csv", prompt_list.read_prompts),
    "prompt-lines": (".txt", prompt_list.read_prompts),
    "jobs": (".csv", read_fleet),
    "job-lines": (".jsonl", read_fleet),
    "manifest": (".json", read_manifest),
    "manifest-in-delta": (".safetensors", read_manifest),
}


def read(name: str, content: bytes, folder: Path) -> str:
    """What reader `name` says of a file of `content`: the error's text, or nothing. Raises what is
    a fault."""
    suffix, reader = READERS[name]
    file = folder / f"input{suffix}"
    file.write_bytes(content)
    try:
        reader(file)
    except (ValueError, FileNotFoundError) as error:
        package = type(error).__module__.startswith("esd_fast")
        if not package and type(error) not in (ValueError, FileNotFoundError):
            raise
        if len(str(error)) > LONGEST or not str(error):
            raise
        return str(error)
    return ""


# --- files to begin with ---------------------------------------------------------------------------


def seeds(name: str, folder: Path) -> list[bytes]:
    """Small real files of the kind that reader `name` takes."""
    pipe = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    delta = {f"{pipe}.to_k.weight": torch.ones(4, 3), f"{pipe}.to_v.weight": torch.zeros(2, 3)}
    reference = {"erase_concept": "cat", "train_method": "esd-x", "base_model_id": "CompVis/sd"}
    config = {"concept": "cat", "iterations": 3, "seed": 1}
    manifest = {"concept": "cat", "method": "esd-x", "config": config, "threads": 1}
    ours = {"esd_fast_manifest": json.dumps(manifest)}
    half = {n: t.to(torch.bfloat16) for n, t in delta.items()}
    lora = {
        f"unet.{pipe}.to_k.lora_A.weight": torch.ones(2, 3),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(3, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(2.0),
    }
    original = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": torch.ones(4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(3)[None],
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
    }
    text = state_text()
    pickles = [torch_file(delta, folder), torch_file({"state_dict": original}, folder, zipped=True)]
    pickles.append(pickle.dumps({"a": [1, 2.0, "b", None]}, protocol=2))
    given = {
        "checkpoint": [whole_checkpoint(text)],
        "state": [text.encode()],
        "delta": [save(delta, ours), save(half, reference), save(lora), save(original)],
        "weights": [save(lora), save(delta), save(original)],
        "single-file": [save(original), save(delta), save(lora)],
        "prompts": [
            b'case_number,prompt,evaluation_seed,artist\n0,"a cat, sitting",42,x\n1,dog,3.0,\n',
            b"\xef\xbb\xbfprompt\r\na cat\r\n",
        ],
        "prompt-lines": [b"a cat\na dog\r\n\n", "ein B\u00e4r\n".encode()],
        "jobs": [
            b'concept,erase_from,method,lr,concept_weights,name\n"a cat|dog",pet,esd-u,1e-3,1|2,x\n',
        ],
        "job-lines": [b'{"concept": ["cat", "dog"], "erase_from": [null, "pet"], "seed": 3}\n'],
        "manifest": [json.dumps(manifest).encode()],
        "manifest-in-delta": [save(delta, ours)],
    }
    return given.get(name, pickles)


def state_text() -> str:
    said = {
        "format": run_state.FORMAT,
        "identity": {
            "config": {"concept": "cat", "iterations": 3},
            "model": "embedded",
            "base": "0",
            "arguments": "0",
        },
        "losses": [0.5],
        "skipped": 0,
        "skipped_in_a_row": 0,
        "scaler": {},
        "optimizer": {},
        "seconds": {"total": 1.0, "collect": 0.5, "fit": 0.5},
        "every": None,
        "resumed_at": [],
        "versions": {},
    }
    return json.dumps(said)


def whole_checkpoint(text: str) -> bytes:
    tensors = {"masters.a": torch.ones(2), "samples.latents": torch.ones(1, 4, 2, 2)}
    lazy = {n: Lazy.of(t) for n, t in tensors.items()}
    check = checksum_of(text, lazy)
    return save(tensors, {run_state.STATE_KEY: text, run_state.CHECKSUM_KEY: check})


def torch_file(content: Any, folder: Path, zipped: bool = False) -> bytes:
    file = folder / "pickled.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.read_bytes()
