"""keep_pages: freed memory is used again without page faults; elsewhere nothing happens."""

import ctypes

import pytest

import esd_fast
from esd_fast import pages

# 34 MiB, touched, freed and taken again, in a process of its own: the setting is for life. It takes a few
# rounds until small blocks have found their places between large ones.
SCRIPT = """
import resource, torch, esd_fast
{call}
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(2 ** 23 + 2 ** 19)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(24)
print(faults(8))
"""


@pytest.mark.skipif(pages.c_function("mallopt") is None, reason="no glibc")
@pytest.mark.parametrize("call", ["", "assert esd_fast.keep_pages()"])
def test_pages_stay(run_python, call: str) -> None:
    import resource

    again = int(run_python("-c", SCRIPT.format(call=call)))
    whole = 8 * 34 * 2**20 // resource.getpagesize()
    assert again < whole / 8 if call else again > whole / 2


@pytest.mark.skipif(pages.c_function("malloc_trim") is None, reason="no glibc")
def test_pages_go_back(run_python) -> None:
    script = """
import torch, esd_fast
from esd_fast.commands.console import resident_bytes
esd_fast.keep_pages()
torch.ones(2 ** 24)
held = resident_bytes("VmRSS")
assert esd_fast.give_back_pages()
print(held - resident_bytes("VmRSS"))
"""
    assert int(run_python("-c", script)) > 2**25


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not esd_fast.keep_pages()
    assert not esd_fast.give_back_pages()


@pytest.mark.skipif(pages.c_function("madvise") is None, reason="not Linux")
def test_tensors_in_files_leave_memory_and_come_back(tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from esd_fast.commands.console import resident_bytes

    numbers = torch.randn(2**24)
    save_file({"weight": numbers}, tmp_path / "weights.safetensors")
    (mapped,) = load_file(tmp_path / "weights.safetensors").values()
    elsewhere = numbers.clone()
    assert torch.equal(mapped, numbers)
    held = resident_bytes("RssFile")
    assert pages.page_out_files([mapped, elsewhere, torch.empty(0)]) == mapped.nbytes
    assert held - resident_bytes("RssFile") > 0.9 * mapped.nbytes
    assert torch.equal(mapped, numbers)
    assert torch.equal(elsewhere, numbers)
