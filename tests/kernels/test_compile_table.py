"""benchmarks/compile_kernels.py finds what it is there to find."""

import importlib.util

import pytest


@pytest.fixture
def compile_kernels(pytestconfig):
    path = pytestconfig.rootpath / "benchmarks" / "compile_kernels.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_limits(compile_kernels):
    usage = compile_kernels.Usage
    assert usage("k", 86, 255, 101376, 0).violations() == []
    assert usage("k", 86, 32, 101377, 0).violations() == [
        "101377 bytes of shared memory, limit 101376"
    ]
    assert usage("k", 120, 255, 0, 8).violations() == ["8 bytes of local memory (spills)"]


def test_assembler_report_is_read(compile_kernels):
    report = """
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""
    first, second = compile_kernels.read_ptxas(report)
    assert (first.arch, first.registers, first.shared, first.local) == (80, 255, 2048, 16)
    assert (second.arch, second.registers, second.shared, second.local) == (90, 32, 0, 0)
    assert "plain" in compile_kernels.table([first, second])
