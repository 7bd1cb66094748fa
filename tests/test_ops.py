"""esd_fast.ops on the CPU. tests/native and tests/kernels run this file again for each implementation."""

import os
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from esd_fast import ops
from esd_fast.operators import common

guidance_loss = ops.guidance_loss


# --- results -----------------------------------------------------------------------------------------


def test_matches_float64(guidance_case):
    guidance_case.check(guidance_loss)


def test_two_runs_agree_in_every_bit(guidance_arguments, guidance_results):
    arguments = guidance_arguments((3, 4, 61, 67))
    first, second = (guidance_results(guidance_loss, arguments) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_thread_count_does_not_matter(guidance_arguments, guidance_results):
    if not ops.path_of("guidance_loss").name.startswith("native"):
        pytest.skip("torch and the interpreter promise nothing here")
    arguments = guidance_arguments((3, 4, 61, 67))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = guidance_results(guidance_loss, arguments)
        torch.set_num_threads(3)
        three = guidance_results(guidance_loss, arguments)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(one, three, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("same", ["concept", "null", "both"])
def test_anchor_may_be_another_argument(same, guidance_arguments, guidance_results):
    student, _, concept, null, *vectors = guidance_arguments()
    null = concept if same == "both" else null
    anchor = null if same == "null" else concept
    alias = guidance_results(guidance_loss, [student, anchor, concept, null, *vectors])
    copy = guidance_results(
        guidance_loss, [student, anchor.clone(), concept, null.clone(), *vectors]
    )
    for x, y in zip(alias, copy, strict=True):
        assert torch.equal(x, y)


def test_anchor_choice_only_moves_negative_guidance(guidance_arguments):
    # ep - (n + 1)(ep - e0) = e0 - n (ep - e0)
    student, _, concept, null, n, weight = guidance_arguments()
    with_null, _ = guidance_loss(student, null, concept, null, n, weight)
    with_concept, _ = guidance_loss(student, concept, concept, null, n + 1, weight)
    torch.testing.assert_close(with_null, with_concept)


def test_kept_row_ignores_concept_and_null(guidance_arguments):
    student, anchor, concept, null, n, weight = guidance_arguments()
    _, per_sample = guidance_loss(student, anchor, concept, null, n, weight)
    _, other = guidance_loss(student, anchor, concept * 100, null - 7, n, weight)
    assert per_sample[-1] == other[-1]
    assert per_sample[0] != other[0]


def strided(x):  # every second column of a wider tensor: gaps
    return torch.stack((x, x), -1).flatten(-2)[..., ::2]


def expanded(x):  # one column for all of them
    return x[..., :1].expand_as(x)


def offset(x):  # not aligned to more than one element
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def transposed(x):  # dense, the batch innermost
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = [channels_last, transposed, strided, expanded, offset]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_teachers", [None, *LAYOUTS])
@pytest.mark.parametrize("of_student", [None, *LAYOUTS])
def test_memory_layouts(of_student, of_teachers, dtype, guidance_arguments):
    student, *teachers, n, weight = guidance_arguments((2, 4, 6, 10), dtype, dtype)
    student = of_student(student) if of_student else student
    teachers = [of_teachers(x) for x in teachers] if of_teachers else teachers
    arguments = (student, *teachers, n, weight, 1.0)
    loss, per_sample, gradient = torch.ops.esd_fast.guidance_loss(*arguments)
    plain = [x.contiguous() for x in (student, *teachers)]
    expected = torch.ops.esd_fast.guidance_loss(*plain, n, weight, 1.0)
    torch.testing.assert_close((loss, per_sample, gradient), expected)
    if of_student in (None, channels_last, offset):
        assert gradient.stride() == student.stride()
    with torch.device("meta"):
        shapes = torch.ops.esd_fast.guidance_loss(*(x.to("meta") for x in arguments[:6]), 1.0)
    assert [x.stride() for x in shapes] == [x.stride() for x in (loss, per_sample, gradient)]


def test_numbers_for_all_samples(guidance_arguments):
    *predictions, _, _ = guidance_arguments()
    ones = torch.ones(2)
    expected = guidance_loss(*predictions, 1.5 * ones, 0.25 * ones)
    assert torch.equal(guidance_loss(*predictions, 1.5, 0.25)[1], expected[1])
    assert torch.equal(
        guidance_loss(*predictions, torch.tensor(1.5), torch.tensor(0.25))[1], expected[1]
    )
    assert torch.equal(guidance_loss(*predictions, 1.5)[1], guidance_loss(*predictions, 1.5, 1)[1])


def test_not_a_number_shows(guidance_arguments):
    student, anchor, *others = guidance_arguments()
    anchor[0, 0, 0, 0] = float("nan")
    loss, per_sample = guidance_loss(student, anchor, *others)
    assert loss.isnan()
    assert per_sample.isnan().tolist() == [True, False]


# --- gradients ---------------------------------------------------------------------------------------


def test_gradients_accumulate_and_repeat(guidance_arguments, guidance_results):
    arguments = guidance_arguments()
    gradient = guidance_results(guidance_loss, arguments)[2]
    student = arguments[0].requires_grad_()
    loss, _ = guidance_loss(*arguments)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * gradient)


def test_float16_gradient_survives_until_the_loss_scale(guidance_arguments):
    student, *_, n, weight = guidance_arguments((8, 4, 64, 64), torch.float16, torch.float16)
    teacher = student - 0.001 * student.sign()
    student = student.requires_grad_()
    loss, _ = guidance_loss(student, teacher, teacher, teacher, n, weight)
    (gradient,) = torch.autograd.grad(loss * 65536, student)
    error = student.detach().double() - teacher.double()
    expected = error * weight.double().view(-1, 1, 1, 1) * (2 * 65536 / student.numel())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=0)


def test_only_the_loss_has_a_gradient(guidance_arguments):
    student, *others = guidance_arguments()
    loss, per_sample = guidance_loss(student.requires_grad_(), *others)
    assert loss.requires_grad
    assert not per_sample.requires_grad
    assert not guidance_loss(student.detach(), *others)[0].requires_grad


def test_second_derivative_is_refused(guidance_arguments):
    student, *others = guidance_arguments()
    loss, _ = guidance_loss(student.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


# --- refusals ----------------------------------------------------------------------------------------


def changed(arguments, position, value):
    return [*arguments[:position], value, *arguments[position + 1 :]]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(0, 4), r"student: shape \(0, 4\): give at least one sample"),
        (0, torch.tensor(1.0), r"student: shape \(\): give at least one sample"),
        (
            0,
            torch.zeros(2, 4, 6, 10, dtype=torch.float64),
            "student: dtype torch.float64: use float32",
        ),
        (
            1,
            torch.zeros(1, 4, 6, 10),
            r"anchor: shape \(1, 4, 6, 10\): use that of student, \(2, 4",
        ),
        (2, torch.zeros(2, 4, 6, 10, dtype=torch.int32), "concept: dtype torch.int32: use float32"),
        (
            3,
            torch.zeros(2, 4, 6, 10, device="meta"),
            "null: on meta: move it to student's device, cpu",
        ),
        (3, torch.zeros(2, 4, 6, 10, requires_grad=True), r"null: requires grad.* null.detach\(\)"),
        (4, torch.zeros(3), r"negative_guidance: shape \(3,\): use \(2,\)"),
        (
            4,
            torch.zeros(2, dtype=torch.float64),
            "negative_guidance: dtype torch.float64: use float32",
        ),
        (5, torch.zeros(2, 1), r"weight: shape \(2, 1\): use \(2,\)"),
        (5, torch.zeros(2, device="meta"), "weight: on meta: move it"),
    ],
)
def test_wrong_arguments(position, value, message, guidance_arguments):
    arguments = changed(guidance_arguments(), position, value)
    with pytest.raises(ValueError, match=message):
        guidance_loss(*arguments)


def test_the_raw_operator_checks_too(guidance_arguments):
    *arguments, weight = guidance_arguments()
    with pytest.raises(ValueError, match="weight: shape"):
        torch.ops.esd_fast.guidance_loss(*arguments, weight[:1], 1.0)


# --- with the rest of torch --------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, requires_grad, guidance_arguments):
    student, *others = guidance_arguments((2, 3, 5), dtype, torch.float32)
    arguments = (student.requires_grad_(requires_grad), *others, 4.0)
    torch.library.opcheck(torch.ops.esd_fast.guidance_loss.default, arguments)


def test_traced_whole_by_torch_compile(guidance_arguments, guidance_results):
    compiled = torch.compile(guidance_loss, backend="aot_eager", fullgraph=True)
    expected = guidance_results(guidance_loss, guidance_arguments())
    for x, y in zip(guidance_results(compiled, guidance_arguments()), expected, strict=True):
        assert torch.equal(x, y)


def test_meta_tensors(guidance_arguments):
    arguments = [x.to("meta") for x in guidance_arguments()]
    loss, per_sample = guidance_loss(*arguments)
    assert (loss.shape, per_sample.shape) == ((), (2,))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


CALLS = {
    "guidance_loss": lambda x: guidance_loss(x, 2 * x, 3 * x, -x, 1.5)[0],
    "group_norm_silu": lambda x: ops.group_norm_silu(x, x[0, :, 0, 0], x[0, :, 0, 1], 2),
    "geglu": ops.geglu,
}


@pytest.mark.parametrize("op", CALLS)
def test_the_dispatcher_is_passed_by_only_where_nobody_watches(op, monkeypatch):
    monkeypatch.setattr(ops, "_torch_runs", lambda *_, **__: False)
    x = torch.sin(torch.arange(2.0 * 4 * 3 * 6)).view(2, 4, 3, 6)
    calls = []
    direct = ops._DIRECT[op]
    monkeypatch.setitem(ops._DIRECT, op, lambda *args: calls.append(op) or direct(*args))
    expected = CALLS[op](x)
    assert calls == [op]
    with Recorder() as recorder:
        assert torch.equal(CALLS[op](x), expected)
    assert f"esd_fast::{op}" in recorder.seen
    compiled = torch.compile(CALLS[op], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    with FakeTensorMode() as mode:
        assert CALLS[op](mode.from_tensor(x)).shape == expected.shape
    assert CALLS[op](x.to("meta")).shape == expected.shape
    assert calls == [op]


# --- which way is taken ------------------------------------------------------------------------------

forced = pytest.mark.skipif("ESD_OPS" in os.environ, reason="ESD_OPS names the way to take")


@pytest.fixture
def fresh():
    """Choices are made anew in this test and after it."""
    caches = (common.native, ops._choose)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_forced_way_is_taken():
    wanted = os.environ.get("ESD_OPS", "")
    assert ops.path_of("guidance_loss").name.startswith(wanted or ("native", "torch"))


@forced
@pytest.mark.usefixtures("fresh")
def test_without_the_native_module(monkeypatch, guidance_arguments, guidance_results):
    fast = guidance_results(guidance_loss, guidance_arguments())
    ops._choose.cache_clear()
    common.native.cache_clear()
    monkeypatch.setitem(sys.modules, "esd_fast._native", None)
    path = ops.path_of("guidance_loss")
    assert (path.name, path.skipped) == ("torch", {"native": "native module not built"})
    assert ops.paths()["guidance_loss"] == "torch (native: native module not built)"
    torch.testing.assert_close(guidance_results(guidance_loss, guidance_arguments()), fast)


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert ops._why_no_triton(torch.device("cuda")) == "triton not installed"


@forced
@pytest.mark.usefixtures("fresh", "needs_native")
@pytest.mark.parametrize(
    ("native", "why"),
    [
        (
            lambda *args: [x + 1 for x in ops._guidance_loss.PLAIN(*args)],
            "gave wrong results when tried",
        ),
        (
            lambda *args: [x * float("nan") for x in ops._guidance_loss.PLAIN(*args)],
            "gave wrong results",
        ),
        (lambda *_: 1 / 0, "failed when tried: ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_way_is_passed_over(native, why, monkeypatch, guidance_arguments):
    entry = ops._OPS["guidance_loss"]
    monkeypatch.setitem(ops._OPS, "guidance_loss", ops._Op(**{**vars(entry), "native_cpu": native}))
    path = ops.path_of("guidance_loss")
    assert path.name == "torch"
    assert next(iter(path.skipped.values())).startswith(why)
    assert guidance_loss(*guidance_arguments())[0].isfinite()


@pytest.mark.parametrize(
    ("measured", "first"),
    [
        ({}, "triton"),
        ({"guidance_loss": {(9, 0): "native"}}, "native"),
        ({"guidance_loss": {(9, 0): "triton"}}, "triton"),
        ({"guidance_loss": {(8, 6): "native"}}, "triton"),  # another card
        ({"group_norm_silu": {(9, 0): "native"}}, "triton"),  # another operator
    ],
)
def test_on_cuda_the_measured_way_comes_first(measured, first, monkeypatch):
    monkeypatch.setattr(ops, "_MEASURED_FASTER", measured)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    tried = ops._preferred("guidance_loss", torch.device("cuda", 0))
    assert tried[0] == first
    assert sorted(tried[:2]) == ["native", "triton"]
    assert tried[2:] == ["torch"]
    assert ops._preferred("guidance_loss", torch.device("cpu")) == ["native", "torch"]


@forced
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("first", ["triton", "native"])
def test_the_other_way_is_tried_where_the_measured_one_fails(first, monkeypatch):
    monkeypatch.setattr(ops, "_MEASURED_FASTER", {"guidance_loss": {(9, 0): first}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(ops, "_implementation", lambda _, way, __: (way, None, ""))
    monkeypatch.setattr(ops, "_why_wrong", lambda *_: next(said))
    said = iter(("gave wrong results when tried", ""))
    path = ops._choose("guidance_loss", torch.device("cuda", 0), "")
    assert path.name != first
    assert path.skipped == {first: "gave wrong results when tried"}


def test_what_was_measured_names_operators_and_ways():
    assert set(ops._MEASURED_FASTER) <= set(ops._OPS)
    for op, of_cards in ops._MEASURED_FASTER.items():
        assert set(of_cards.values()) <= {"triton", "native"}
        assert ops._OPS[op].native_cuda is not None


def test_ways_say_what_is_missing_and_what_is_wrong(monkeypatch):
    entry = vars(ops._OPS["guided_step"])
    monkeypatch.setitem(ops._OPS, "guided_step", ops._Op(**{**entry, "native_cpu": None}))
    native = ops.ways("guided_step")["native"]
    assert (native.missing, native.wrong) == ("no native version of this operator", "")
    assert native.why == native.missing
    broken = ops._Op(**{**entry, "native_cpu": lambda *_: 1 / 0})
    monkeypatch.setitem(ops._OPS, "guided_step", broken)
    monkeypatch.setattr(ops, "_implementation", lambda *_: ("native", broken.native_cpu, ""))
    native = ops.ways("guided_step")["native"]
    assert native.missing == ""
    assert native.why == native.wrong == "failed when tried: ZeroDivisionError: division by zero"
    assert ops.ways("guided_step")["torch"].why == ""


def test_unknown_operator():
    with pytest.raises(ValueError, match="op='no_such': use one of guidance_loss"):
        ops.path_of("no_such")


def test_triton_is_not_imported_for_the_cpu(run_python):
    code = """
import sys, torch
from esd_fast import ops
x = torch.ones(2, 3)
ops.guidance_loss(x, x, x, x, 1.0)
assert "triton" not in sys.modules
"""
    run_python("-c", code)
    run_python("-c", code, ESD_OPS="torch")


def test_a_forced_way_that_cannot_be_taken_says_so(run_python):
    code = """
from esd_fast import ops
try:
    ops.path_of("guidance_loss", "cpu")
except RuntimeError as error:
    print(error)
"""
    said = run_python("-c", code, ESD_OPS="triton")
    assert said.strip() == "ESD_OPS=triton, but for guidance_loss on cpu: no Triton for cpu"


def test_unknown_forced_way(run_python):
    code = """
try:
    from esd_fast import ops
except ValueError as error:
    print(error)
"""
    assert run_python("-c", code, ESD_OPS="fast").startswith(
        "ESD_OPS='fast': use torch, native or triton"
    )
