"""Without a fuzzer: each reader on its real files, on those cut and changed, and on what fuzzers found."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from .readers import READERS, read, seeds, state_text, torch_file, whole_checkpoint

MUTANTS = 30


@pytest.mark.parametrize("name", READERS)
def test_real_files_cut_and_changed(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    for content in seeds(name, tmp_path):
        for _ in range(MUTANTS):
            changed = bytearray(content[: draw.randrange(len(content) + 1)])
            if draw.random() < 0.5:
                changed = bytearray(content)
            for _ in range(draw.randrange(1, 4)):
                if changed:
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
            read(name, bytes(changed), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "state", "delta", "prompts", "prompt-lines", "jobs", "job-lines", "manifest"],
)
def test_real_files_are_read(name: str, tmp_path: Path) -> None:
    assert [read(name, content, tmp_path) for content in seeds(name, tmp_path)] == [""] * len(
        seeds(name, tmp_path)
    )


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


FOUND: dict[str, bytes] = {
    "terabytes": safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "a header of terabytes": (2**42).to_bytes(8, "little") + b"{}",
    "nothing, but wide": safetensors(
        {"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}
    ),
    "nothing, but deep": safetensors(
        {"a": {"dtype": "F32", "shape": [0] * 70, "data_offsets": [0, 0]}}
    ),
    "nested": safetensors(b'{"a":' + b"[" * 100_000),
    "no tensors": safetensors({}),
    "a scalar": safetensors({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"\0" * 4),
    "an odd name": safetensors(
        {"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "half bytes": safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"),
    "complex": safetensors({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
    "one of the original layout": safetensors(
        {"model.diffusion_model.x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    ),
    "a block without a number": safetensors(
        {
            "model.diffusion_model.input_blocks.op.x.op.": {
                "dtype": "U8", "shape": [1], "data_offsets": [0, 1],
            }
        },
        b"\0",
    ),
    "a manifest of brackets": safetensors(
        {"__metadata__": {"esd_fast_manifest": "[" * 100_000}}
    ),
    "a manifest of digits": safetensors({"__metadata__": {"esd_fast_manifest": "1" * 5000}}),
    "a concept that is a table": safetensors(
        {"__metadata__": {"esd_fast_manifest": '{"concept": {"a": 1}, "method": [], "erase_from": 3}'}}
    ),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("name", [n for n, (suffix, _) in READERS.items() if suffix != ".txt"])
def test_what_fuzzers_found(name: str, what: str, tmp_path: Path) -> None:
    read(name, FOUND[what], tmp_path)


@pytest.mark.parametrize("name", ["pickled-delta", "pickled-single-file"])
def test_tables_that_hold_themselves(name: str, tmp_path: Path) -> None:
    table: dict[str, Any] = {"a": 1}
    table["state_dict"] = table
    assert read(name, torch_file(table, tmp_path, zipped=True), tmp_path)


@pytest.mark.parametrize("name", ["pickled-delta", "pickled-single-file"])
def test_an_archive_of_several_disks(name: str, tmp_path: Path) -> None:
    locator = b"PK\x06\x07" + (1).to_bytes(4, "little") + bytes(8) + (2).to_bytes(4, "little")
    assert read(name, bytes(64) + locator + b"PK\x05\x06" + bytes(18), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": 3},
        {"losses": ["a"]},
        {"resumed_at": None},
        {"seconds": []},
        {"identity": []},
        {"identity": {"config": [], "model": 1, "base": 2, "arguments": 3}},
        {"skipped": "many"},
        {"optimizer": [1]},
        {"scaler": 1},
        {"versions": 1},
        {"format": []},
        {"every": "x"},
    ],
)
def test_a_state_of_other_types_is_damaged(changes: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(json.loads(state_text()) | changes)
    assert read("state", text.encode(), tmp_path)
    assert read("checkpoint", whole_checkpoint(text), tmp_path)
