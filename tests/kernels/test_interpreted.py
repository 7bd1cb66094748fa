"""The Triton kernels, run on the CPU by Triton's interpreter.

TRITON_INTERPRET counts when triton is first imported, by whatever imports it. So these tests are those of
tests/test_ops.py and its neighbours in a process of their own, with every operator forced through Triton.
"""

import importlib.metadata
import importlib.util

import pytest


def why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton not installed"
    triton, numpy = (
        tuple(int(n) for n in importlib.metadata.version(p).split(".")[:2])
        for p in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 fails on NumPy 2.4 (loops over a kernel's argument)"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


FILES = ["test_group_norm_silu.py", "test_ops.py test_guided_step.py test_geglu.py"]
# the same here: how an operator is registered, traced and chosen, and torch's own erf at each of 65,536 numbers
LEFT_OUT = "opcheck or every_gate or traced or dispatcher or forced_way or not_imported"


@pytest.mark.parametrize("files", FILES)
def test_operators_through_the_interpreter(files, run_python):
    chosen = [f"tests/{file}" for file in files.split()]
    output = run_python(
        *("-m", "pytest", "-q", *chosen, "-k", f"not ({LEFT_OUT})"),
        ESD_OPS="triton",
        TRITON_INTERPRET="1",
    )
    assert " passed" in output


def test_what_runs_is_triton(run_python):
    code = "from esd_fast import ops; print(set(ops.paths().values()))"
    assert run_python("-c", code, ESD_OPS="triton", TRITON_INTERPRET="1").strip() == "{'triton'}"
