"""The CMake build: CUDA is optional, demanded only by ESD_CUDA=ON, and the CUDA kernels fit the cards."""

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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not installed")
def test_cuda_kernels_do_not_spill(run_python):
    output = run_python("benchmarks/compile_kernels.py", "cuda")
    assert "sm_120" in output
    assert "guidance_loss<float, float, 8>" in output
