"""csrc/ on the CPU: every instruction-set level, the conversions bit by bit, and the refusals."""

import re

import pytest
import torch

pytestmark = pytest.mark.usefixtures("needs_native")


@pytest.fixture
def native():
    return pytest.importorskip("esd_fast._native")


LEVELS = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=LEVELS)
def isa(request, run_python):
    """A level that this processor and build have."""
    said = run_python("-c", REPORT_ISA, ESD_CPU_ISA=request.param).strip()
    if "not supported" in said:
        pytest.skip(said)
    assert said == request.param
    return request.param


REPORT_ISA = """
import torch, esd_fast._native as native
try:
    print(native.cpu_isa())
except RuntimeError as error:
    print(error)
"""


def test_operators_at_each_level(isa, run_python):
    arguments = ("-m", "pytest", "-q", "tests/test_ops.py", "-k", "float64 or layouts or opcheck")
    assert " passed" in run_python(*arguments, ESD_CPU_ISA=isa, ESD_OPS="native")


# Every float16 and bfloat16 there is goes in as a teacher prediction and comes out as a float32 gradient,
# and awkward float32 values go in as one and come out rounded, in a gradient of each dtype.
CONVERSIONS = """
import torch
from esd_fast import ops

def gradient(student_dtype, anchor):
    # weight and scale chosen so that the gradient is exactly -anchor
    zero = torch.zeros(1, anchor.numel())
    return ops.path_of("guidance_loss").run(
        zero.to(student_dtype), anchor[None], zero, zero, torch.zeros(1), torch.ones(1), anchor.numel() / 2
    )[2][0]

def same(x, y):  # bit for bit, but any NaN for a NaN
    assert torch.equal(x.isnan(), y.isnan())
    x, y = (torch.where(v.isnan(), 0, v) for v in (x, y))
    assert torch.equal(x, y), (x - y).abs().max()
    assert torch.equal(x.signbit(), y.signbit())

everything = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    values = everything.view(dtype)
    values = torch.where(values == 0, values.abs(), values)  # 0 - (-0) is +0: no sign to compare
    same(gradient(torch.float32, values), 0 - values.float())

# both sides of every rounding step: float16's subnormals, its largest values, ties
halves = everything.view(torch.float16)
halves = halves[halves.isfinite()].float()
steps = torch.cat([halves, halves * (1 + 2**-11), halves * (1 + 2**-11 + 2**-23), halves * (1 - 2**-12)])
noise = torch.randn(65536, generator=torch.Generator().manual_seed(0))
special = torch.tensor([65504.0, 65519.99, 65520.0, 1e38, 3.4e38, float("inf"), float("nan"), 2**-25, 2**-24, 3e-8])
values = torch.cat([steps, noise, noise * 1e-6, noise * 1e5, special])
values = torch.cat([values, -values, torch.zeros(-2 * len(values) % 128)])
for dtype in (torch.float16, torch.bfloat16):
    for part in values.split(128):  # a power of two, so that dividing by it is exact
        same(gradient(dtype, part), (0 - part).to(dtype))
"""


def test_conversions_are_torchs(isa, run_python):
    run_python("-c", CONVERSIONS, ESD_CPU_ISA=isa, ESD_OPS="native")


def test_unknown_level_is_refused(run_python):
    said = run_python("-c", REPORT_ISA, ESD_CPU_ISA="sse9")
    assert said.strip() == "ESD_CPU_ISA=sse9: use baseline, avx2 or avx512"


def test_memory_that_is_not_there(native):
    fake = (0, 0)
    with pytest.raises(ValueError, match="without memory"):
        native.guidance_loss_cpu(fake, fake, fake, fake, 0, 0, 0, 0, 0, 1, 1, 1.0, 1)


def test_unknown_dtype(native):
    x = torch.zeros(1)
    p = x.data_ptr()
    with pytest.raises(ValueError, match=re.escape("unknown dtype code")):
        native.guidance_loss_cpu((p, 3), (p, 0), (p, 0), (p, 0), p, p, p, p, p, 1, 1, 1.0, 1)


def test_cuda_part_without_a_device(native):
    if not hasattr(native, "cuda_unavailable"):
        pytest.skip("native module built without CUDA")
    if torch.cuda.is_available():
        assert native.cuda_unavailable() == ""
    else:
        assert native.cuda_unavailable() == "no CUDA driver"
