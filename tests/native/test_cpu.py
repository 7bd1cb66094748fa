"""csrc/ on the CPU: every instruction-set level, the conversions bit by bit, and the refusals."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esd_fast import ops
from esd_fast.operators import common

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
import esd_fast._native as native
try:
    print(native.cpu_isa())
except RuntimeError as error:
    print(error)
"""


FILES = {"guidance_loss": "ops"}  # of an operator, where it is not called like it
# not what torch adds, which is the same at every level
LEVEL_BY_LEVEL = "(float64 or layout or every) and not (the_operator or opcheck)"


def test_operators_at_each_level(isa, run_python):
    # where the whole operator runs at this level anyway, its file has shown the same by itself
    left = [op for op, path in ops.paths("cpu").items() if path != f"native-cpu-{isa}"]
    files = [f"tests/test_{FILES.get(op, op)}.py" for op in left]
    arguments = ("-m", "pytest", "-q", *files, "-k", LEVEL_BY_LEVEL)
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


# --- what is refused before an address is used ---------------------------------------------------------

SIZE = 24
MEMORY = torch.zeros(16 * SIZE)


def place(number):
    """The address of the number-th of sixteen pieces of memory that do not overlap."""
    return MEMORY[number * SIZE :].data_ptr()


def tensors(*numbers):
    return [(place(number), 0) for number in numbers]


# name: (arguments that are right, the places of results and of arguments among them)
CALLS = {
    "guidance_loss_cpu": (
        [*tensors(0, 1, 2, 3), *map(place, (4, 5, 6, 7, 8)), 2, 3, 1.0, 1],
        (6, 7, 8),
        (0, 1, 2, 3, 4, 5),
    ),
    "geglu_cpu": ([*tensors(0, 1), 2, 3, 1], (1,), (0,)),
    "geglu_backward_cpu": ([*tensors(0, 1, 2), 2, 3, 1], (2,), (0, 1)),
    "group_norm_silu_cpu": (
        [*tensors(0, 1, 2, 3), place(4), place(5), (1, 4, 3, 2), 1e-5, True, False, 1],
        (3, 4, 5),
        (0, 1, 2),
    ),
    "group_norm_silu_backward_cpu": (
        [
            *tensors(0, 1),
            place(2),
            place(3),
            *tensors(4, 5, 6, 7, 8),
            (1, 4, 3, 2),
            True,
            False,
            1,
        ],
        (6,),
        (0, 1, 2, 3, 4, 5),
    ),
    "guided_step_cpu": (
        [
            *tensors(0),
            *map(place, (1, 2)),
            3,
            place(3),
            1,
            3.0,
            place(4),
            *tensors(5, 6, 7),
            (2, 1, 3, 2),
            1,
        ],
        (7, 8),
        (0, 1, 2, 4),
    ),
}


@pytest.fixture(params=CALLS)
def call(request, native):
    """(function, arguments, places of results, places of arguments)"""
    arguments, results, given = CALLS[request.param]
    return getattr(native, request.param), list(arguments), results, given


def at(value, address):
    return (address, value[1]) if isinstance(value, tuple) else address


def test_right_arguments_are_taken(call):
    function, arguments, *_ = call
    function(*arguments)


def test_memory_that_is_not_there(call):
    function, arguments, results, given = call
    for position in (*results, *given):
        wrong = list(arguments)
        wrong[position] = at(wrong[position], 0)
        with pytest.raises(ValueError, match="without memory"):
            function(*wrong)


def test_results_that_overlap(call):
    function, arguments, results, given = call
    for result in results:
        for other in (*results, *given):
            if other == result or (function.__name__, other) == ("guided_step_cpu", 1):
                continue  # the index is read before anything is written
            wrong = list(arguments)
            address = wrong[other][0] if isinstance(wrong[other], tuple) else wrong[other]
            wrong[result] = at(wrong[result], address)
            with pytest.raises(ValueError, match="overlap"):
                function(*wrong)


def test_unknown_dtype(call):
    function, arguments, _, _ = call
    for code in (-1, 3):
        wrong = [(x[0], code) if isinstance(x, tuple) and len(x) == 2 else x for x in arguments]
        with pytest.raises(ValueError, match=re.escape("unknown dtype code")):
            function(*wrong)


def test_sizes_without_sense(native):
    arguments = list(CALLS["group_norm_silu_cpu"][0])
    for sizes, why in (((0, 4, 3, 2), "empty"), ((1, 4, 3, 3), "groups"), ((1, 4, -3, 2), "empty")):
        arguments[6] = sizes
        with pytest.raises(ValueError, match=why):
            native.group_norm_silu_cpu(*arguments)
    arguments = list(CALLS["geglu_cpu"][0])
    arguments[2] = 0
    with pytest.raises(ValueError, match="empty"):
        native.geglu_cpu(*arguments)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(2, 3, device="meta"), "x: on meta"),
        (lambda: FakeTensorMode().from_tensor(torch.zeros(2, 3)), "x: on cpu, FakeTensor"),
        (lambda: torch.zeros(3, 2).T, r"x: strides \(1, 2\): use a torch.contiguous_format"),
    ],
)
def test_tensors_without_an_address(make, why):
    with pytest.raises(ValueError, match=why):
        common.address("x", make())


def native_calls():
    """Every wrapper of a native kernel, with arguments that it takes (on the CPU)."""
    for op, entry in ops._OPS.items():
        example = entry.example(torch.device("cpu"))
        for way, run in (("cpu", entry.native_cpu), ("cuda", entry.native_cuda)):
            if isinstance(run, common.Pair):
                arguments, grad = example
                results = entry.plain.forward(*arguments)
                backward = run.gradient_arguments(grad, arguments, results)
                yield pytest.param(way, run.forward, arguments, id=f"{op}-{way}")
                yield pytest.param(way, run.backward, backward, id=f"{op}-backward-{way}")
            elif run is not None:
                yield pytest.param(way, run, example, id=f"{op}-{way}")


@pytest.mark.parametrize(("way", "run", "arguments"), list(native_calls()))
def test_no_kernel_gets_a_tensor_without_memory_or_of_another_device(way, run, arguments):
    for number, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            given = [*arguments]
            given[number] = value.to("meta")
            with pytest.raises(ValueError, match="use a real tensor on " + way):
                run(*given)
    if way == "cuda":
        with pytest.raises(ValueError, match=": on cpu, Tensor: use a real tensor on cuda"):
            run(*arguments)


def test_cuda_part_without_a_device(native):
    if not hasattr(native, "cuda_unavailable"):
        pytest.skip("native module built without CUDA")
    if torch.cuda.is_available():
        assert native.cuda_unavailable() == ""
    else:
        assert native.cuda_unavailable() == "no CUDA driver"
