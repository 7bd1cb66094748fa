"""The Triton kernels, run on the CPU by Triton's interpreter.

TRITON_INTERPRET counts when triton is first imported, by whatever imports it. So these tests are those of
tests/test_ops.py in a process of their own, with every operator forced through Triton.
"""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton not installed"
)


def test_operators_through_the_interpreter(run_python):
    output = run_python(
        *("-m", "pytest", "-q", "tests/test_ops.py"), ESD_OPS="triton", TRITON_INTERPRET="1"
    )
    assert " passed" in output


def test_what_runs_is_triton(run_python):
    code = "from esd_fast import ops; print(ops.path_of('guidance_loss'))"
    assert run_python("-c", code, ESD_OPS="triton", TRITON_INTERPRET="1").strip() == "triton"
