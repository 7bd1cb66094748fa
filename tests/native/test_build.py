"""The CMake build: CUDA is optional, demanded only by ESD_CUDA=ON, and the CUDA kernels fit the cards."""

import re
import shutil
import subprocess
import sys

import compile_kernels
import pytest


@pytest.fixture
def configure(tmp_path, pytestconfig):
    """configure(*options): CMake's exit code and output where no CUDA compiler is found."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake not installed")

    def run(*options):
        command = ["cmake", "-S", pytestconfig.rootpath, "-B", tmp_path / "build", *options]
        command += [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        command += ["-DCMAKE_CUDA_COMPILER=NOTFOUND"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_cuda_demanded_but_missing(configure):
    code, output = configure("-DESD_CUDA=ON")
    assert code != 0
    assert "ESD_CUDA=ON, but no CUDA compiler was found" in output


@pytest.mark.parametrize("setting", ["AUTO", "OFF"])
def test_without_nvcc(setting, configure):
    code, output = configure(f"-DESD_CUDA={setting}")
    assert code == 0, output


def test_unknown_setting(configure):
    code, output = configure("-DESD_CUDA=YES")
    assert code != 0
    assert "ESD_CUDA=YES: use AUTO, ON or OFF" in output


@pytest.fixture(scope="module")
def cuda_module():
    """The native module's file, where it has the CUDA kernels for every architecture, as .ci/run sees to."""
    pytest.importorskip("triton")  # brings cuobjdump
    module = compile_kernels.cuda_module()
    if module is None:
        pytest.skip("no CUDA kernels in the native module")
    if compile_kernels.missing(compile_kernels.cuda_usages()):
        pytest.skip("a native module for some architectures only")
    return module


def test_cuda_kernels_do_not_spill(cuda_module):  # noqa: ARG001
    usages = compile_kernels.cuda_usages()
    assert [f"{u} {u.violations()}" for u in usages if u.violations()] == []
    assert {
        "guidance_loss<float, float, 8>",
        "group_norm_moments<bfloat16, 8>",
        "group_norm_silu<bfloat16, 8, true>",
        "group_norm_silu_gradient<float, 4, false>",
    } <= {u.kernel for u in usages}


def test_cuda_kernels_access_16_bytes_at_once(cuda_module):
    ptx = compile_kernels.cuobjdump("-ptx", cuda_module)  # for later cards; the same for all
    _, *kernels = ptx.split(".entry ")
    wide = [
        k for k in kernels if re.match(r"\w+Li[48]E", k)
    ]  # by their last number: elements at once
    assert len(wide) >= 27
    for kernel in wide:
        assert re.search(r"ld\.global\S*\.v4\.\w32", kernel), kernel[:200]
        only_sums = re.match(r"\w+(moments|sums)_kernel", kernel)
        assert only_sums or re.search(r"st\.global\S*\.v4\.\w32", kernel), kernel[:200]
        assert ".local" not in kernel
