"""ops.group_norm_silu on the CPU: torch's own functions, and the operator. tests/kernels runs this file again
through Triton's interpreter."""

import os

import pytest
import torch

from esd_fast import ops

OPERATOR = torch.ops.esd_fast.group_norm_silu

# Below -88 the SiLU is y / (1 + inf) = -0, as it should be; the interpreter's NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Pictures that are left to torch for their size go to the kernels."""
    monkeypatch.setattr(ops._group_norm_silu, "FEWEST", 0)


@pytest.fixture
def wrapped(monkeypatch):
    """The operator itself, where torch's own functions would be taken without it."""
    monkeypatch.setattr(ops, "_torch_runs", lambda *_, **__: False)


def test_matches_float64(norm_case):
    norm_case.check(ops.group_norm_silu)


@pytest.mark.skipif(os.environ.get("ESD_OPS") == "triton", reason="the same as above")
@pytest.mark.usefixtures("wrapped")
def test_the_operator_matches_float64(norm_case):
    norm_case.check(ops.group_norm_silu)


def test_torch_runs_it_as_plain_torch(make_norm_case):
    if ops.path_of("group_norm_silu").name != "torch":
        pytest.skip("something else runs it")
    case = make_norm_case()
    inputs, _ = case.inputs()
    y = case.ours(ops.group_norm_silu)(inputs[0].requires_grad_(), *inputs[1:])
    assert torch.equal(y, case.exact(*inputs))
    assert y.grad_fn.name() == "SiluBackward0"


@pytest.mark.skipif("ESD_OPS" in os.environ, reason="ESD_OPS takes them all to its way")
@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "torchs"),
    [
        ((1, 4, 8, 16), torch.bfloat16, torch.contiguous_format, False),  # 512 numbers
        ((1, 4, 8, 15), torch.bfloat16, torch.contiguous_format, True),
        ((1, 4, 8, 15), torch.float32, torch.channels_last, True),
        ((1, 4, 8, 15), torch.bfloat16, torch.channels_last, False),
    ],
)
def test_small_pictures_are_left_to_torch(shape, dtype, layout, torchs, monkeypatch):
    monkeypatch.setattr(ops._group_norm_silu, "FEWEST", 512)
    called = []
    monkeypatch.setattr(
        ops._group_norm_silu, "as_torch", lambda x, *_: called.append("torch") or x.clone()
    )
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    arguments = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype), 2
    ops.group_norm_silu(x, *arguments)
    assert called == ["torch"] * torchs
    assert "torch for pictures of fewer than" in ops.paths()["group_norm_silu"]
    # with a gradient to come torch would keep more, but for the norm alone
    called.clear()
    ops.group_norm_silu(x.requires_grad_(), *arguments)
    assert not called
    ops.group_norm_silu(x, *arguments, silu=False)
    assert called == ["torch"] * torchs
    with torch.no_grad():
        ops.group_norm_silu(x, *arguments)
    assert called == ["torch"] * 2 * torchs


LAYOUTS = [
    torch.Tensor.contiguous,
    lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],  # gaps
    lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],  # a part of the channels, as chunk gives
    lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
]


@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_contiguous_out(layout, make_norm_case):
    """On the CPU; channels_last alone stays channels_last, and other devices give that for every layout."""
    inputs, grad = make_norm_case().inputs()
    channels_last = OPERATOR(*inputs, 2, 1e-5, True)
    assert channels_last[0].is_contiguous(memory_format=torch.channels_last)
    inputs[0] = inputs[0].contiguous()
    expected = OPERATOR(*inputs, 2, 1e-5, True)
    results = OPERATOR(layout(inputs[0]), *inputs[1:], 2, 1e-5, True)
    assert results[0].is_contiguous()
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(results, channels_last)
    _, mean, rstd = expected
    backward = torch.ops.esd_fast.group_norm_silu_backward
    rest = (mean, rstd, *inputs[1:], 2, True, True)
    expected = backward(grad.contiguous(), inputs[0], *rest)
    assert expected[0].is_contiguous()
    for x, y in zip(backward(layout(grad), layout(inputs[0]), *rest), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_thread_count_does_not_matter(layout, dtype, make_norm_case, assert_any_thread_count):
    if not ops.path_of("group_norm_silu").name.startswith("native"):
        pytest.skip("torch and the interpreter promise nothing here")
    inputs, grad = make_norm_case((3, 24, 31, 33), 6, dtype, layout=layout).inputs()
    rest = (*inputs[1:], 6, True, True)

    def run():
        results = OPERATOR(*inputs, 6, 1e-5, True)
        backward = torch.ops.esd_fast.group_norm_silu_backward(grad, inputs[0], *results[1:], *rest)
        return *results, *backward

    assert_any_thread_count(run)


@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_activations_beyond_all_bounds(layout, make_norm_case):
    """A SiLU of -1e35 is 0; what is not a number stays in its group."""
    (x, weight, bias), _ = make_norm_case(layout=layout).inputs()
    x[0, 0, 0, 0] = float("nan")
    inputs = [x, weight * 1e35, bias]
    y = ops.group_norm_silu(*(v.requires_grad_() for v in inputs), 2)
    broken = torch.zeros(x.shape, dtype=torch.bool)
    broken[0, :3] = True
    assert torch.equal(y.isnan(), broken)
    z = torch.nn.functional.group_norm(x[1:], 2, weight * 1e35, bias).detach()
    torch.testing.assert_close(y[1:].detach(), torch.relu(z), rtol=1e-5, atol=0)
    (of_bias,) = torch.autograd.grad(y[1:].sum(), inputs[2])
    torch.testing.assert_close(of_bias[3:], (z > 0).float().sum((0, 2, 3))[3:])


@pytest.mark.usefixtures("wrapped")
def test_keeps_x_itself_and_two_numbers_a_group(make_norm_case):
    (x, weight, bias), _ = make_norm_case().inputs()
    kept = []

    def keep(value):
        kept.append((value.data_ptr(), value.numel()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        y = ops.group_norm_silu(x.requires_grad_(), weight, bias, 2)
    assert y.requires_grad
    ours = {t.data_ptr() for t in (x, weight, bias)}
    assert sorted(n for pointer, n in kept if pointer not in ours) == [4, 4]  # mean, rstd


@pytest.mark.usefixtures("wrapped")
def test_only_the_gradients_asked_for(make_norm_case):
    (x, weight, bias), grad = make_norm_case().inputs()
    y = ops.group_norm_silu(x, weight, bias.requires_grad_(), 2)
    y.backward(grad)
    assert bias.grad is not None
    assert x.grad is None
    assert weight.grad is None
    assert not ops.group_norm_silu(x, weight, bias.detach(), 2).requires_grad


@pytest.mark.usefixtures("wrapped")
def test_second_derivative_is_refused(make_norm_case):
    (x, weight, bias), _ = make_norm_case().inputs()
    y = ops.group_norm_silu(x.requires_grad_(), weight, bias, 2)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 5)}, r"x: shape \(2, 6, 5\): give \(N, C, H, W\)"),
        ({"x": torch.zeros(0, 6, 5, 5)}, "with at least one number"),
        ({"x": torch.zeros(2, 6, 5, 7, dtype=torch.float64)}, "x: dtype torch.float64: use"),
        ({"groups": 4}, "groups=4: use a divisor of x's 6 channels"),
        ({"groups": 0}, "groups=0"),
        ({"weight": torch.zeros(5)}, r"weight: shape \(5,\): use \(6,\)"),
        ({"bias": torch.zeros(6, dtype=torch.int32)}, "bias: dtype torch.int32"),
        ({"bias": torch.zeros(6, device="meta")}, "bias: on meta: move it to x's device, cpu"),
    ],
)
def test_wrong_arguments(change, message, make_norm_case):
    (x, weight, bias), _ = make_norm_case().inputs()
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": 2, **change}
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**arguments)
    with pytest.raises(ValueError, match=message):
        OPERATOR(**arguments, eps=1e-5, silu=True)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_opcheck(layout, dtype, silu, make_norm_case):
    (x, weight, bias), grad = make_norm_case(dtype=dtype, layout=layout).inputs()
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias, 2, 1e-5, silu)
    torch.library.opcheck(OPERATOR.default, arguments)
    _, mean, rstd = OPERATOR(*arguments)
    torch.library.opcheck(
        torch.ops.esd_fast.group_norm_silu_backward.default,
        (grad, x.detach(), mean, rstd, weight.detach(), bias, 2, silu, True),
    )


def test_other_devices_get_channels_last(make_norm_case):
    inputs, _ = make_norm_case(layout=torch.contiguous_format).inputs()
    y, *_ = OPERATOR(*(x.to("meta") for x in inputs), 2, 1e-5, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
