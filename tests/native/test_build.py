"""The CMake build: CUDA is optional, demanded only by ESD_CUDA=ON, and the CUDA kernels fit the cards."""

import re
import shutil
import subprocess
import sys

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


@pytest.mark.slow  # .ci/run runs compile_kernels.py itself
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not installed")
def test_cuda_kernels_do_not_spill(run_python):
    output = run_python("benchmarks/compile_kernels.py", "cuda")
    assert "sm_120" in output
    for kernel in (
        "guidance_loss<float, float, 8>",
        "group_norm_moments<bfloat16, 8>",
        "group_norm_silu<bfloat16, 8, true>",
        "group_norm_silu_gradient<float, 4, false>",
    ):
        assert kernel in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not installed")
@pytest.mark.parametrize("name", ["group_norm_silu", "guidance_loss"])
def test_cuda_kernels_access_16_bytes_at_once(name, tmp_path, pytestconfig):
    csrc = pytestconfig.rootpath / "csrc"
    command = ["nvcc", "-ptx", "-arch=compute_75", "-std=c++17", "-O3", "-I", csrc]
    command += ["-o", tmp_path / "kernels.ptx", csrc / "cuda" / f"{name}.cu"]
    subprocess.run(command, check=True, capture_output=True)
    _, *kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")
    wide = [
        k for k in kernels if re.match(r"\w+Li[48]E", k)
    ]  # by their last number: elements at once
    assert len(wide) >= 9
    for kernel in wide:
        assert re.search(r"ld\.global\S*\.v4\.\w32", kernel), kernel[:200]
        only_sums = re.match(r"\w+(moments|sums)_kernel", kernel)
        assert only_sums or re.search(r"st\.global\S*\.v4\.\w32", kernel), kernel[:200]
        assert ".local" not in kernel
