"""Every Triton kernel compiles for every architecture, without spills and within its shared memory."""

import importlib.util

import pytest


@pytest.mark.slow  # .ci/run runs compile_kernels.py itself
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton not installed")
def test_triton_kernels_compile_ahead_of_time(run_python, tmp_path):
    # A process of its own: where TRITON_INTERPRET was set, the compiler is gone. No cache: really compile.
    output = run_python("benchmarks/compile_kernels.py", "triton", TRITON_CACHE_DIR=str(tmp_path))
    for arch in (75, 80, 86, 89, 90, 100, 120):
        assert f"sm_{arch}" in output
    for kernel in ("guidance_loss", "group_norm_silu", "group_norm_silu gradient"):
        assert f"{kernel} bf16/bf16" in output
    assert "geglu gradient bf16" in output
    assert "guided_step bf16 3 samples" in output
