"""The CUDA kernels run without a GPU: compiled as plain C++ under the sanitizers, against float64.

What CUDA brings (blocks, threads, barriers, shuffles, launches) is stood in for by tests/native/cuda_on_cpu, whose
kernels.py has the tests. What it cannot show is how a GPU rounds (fused products), caches and orders accesses.
"""

import shutil
import subprocess
import sysconfig

import pytest


def library(name):
    """The full path of one of g++'s libraries; its bare name where it has none."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def module(tmp_path, pytestconfig):
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None or "/" not in library("libasan.so"):
        pytest.skip("no g++ with sanitizers")
    csrc = pytestconfig.rootpath / "csrc"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-DESD_WITH_CUDA", "-DESD_ISA=baseline", "-I", csrc]
    command += ["-I", pytestconfig.rootpath / "tests" / "native" / "cuda_on_cpu"]
    command += ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    sources = [csrc / "bindings.cpp", *csrc.glob("cpu/*.cpp"), "-x", "c++", *csrc.glob("cuda/*.cu")]
    path = tmp_path / "_native.so"
    command += ["-o", path, *sources]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_cuda_kernels_on_the_cpu(module, run_python):
    output = run_python(
        *("-m", "pytest", "-q", "tests/native/cuda_on_cpu/kernels.py"),
        ESD_CUDA_ON_CPU=str(module),
        # the second so that the first finds the exceptions it is to watch
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python keeps memory to the end; fresh memory is 0xffff..., a NaN in every dtype
        ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255",
        OMP_NUM_THREADS="1",
    )
    assert " passed" in output
    assert "skipped" not in output
