"""ops.geglu on the CPU: torch's own functions, and the operator. tests/kernels runs this file again through
Triton's interpreter."""

import os

import pytest
import torch

from esd_fast import ops

OPERATOR = torch.ops.esd_fast.geglu


@pytest.fixture
def wrapped(monkeypatch):
    """The operator itself, where torch's own functions would be taken without it."""
    monkeypatch.setattr(ops, "_torch_runs", lambda *_, **__: False)


def test_matches_float64(geglu_case):
    geglu_case.check(ops.geglu)


@pytest.mark.skipif(os.environ.get("ESD_OPS") == "triton", reason="the same as above")
@pytest.mark.usefixtures("wrapped")
def test_the_operator_matches_float64(geglu_case):
    geglu_case.check(ops.geglu)


@pytest.mark.usefixtures("wrapped")
def test_any_layout(make_geglu_case):
    x, grad = make_geglu_case((2, 3, 14)).inputs()
    for layout in (lambda v: v.transpose(0, 1).contiguous().transpose(0, 1), torch.Tensor.clone):
        assert torch.equal(ops.geglu(layout(x)), ops.geglu(x))
        backward = torch.ops.esd_fast.geglu_backward
        assert torch.equal(backward(layout(grad), layout(x)), backward(grad, x))


@pytest.mark.usefixtures("wrapped")
def test_thread_count_does_not_matter(make_geglu_case, assert_any_thread_count):
    if not ops.path_of("geglu").name.startswith("native"):
        pytest.skip("torch and the interpreter promise nothing here")
    x, grad = make_geglu_case((3, 67, 514)).inputs()
    assert_any_thread_count(
        lambda: (OPERATOR(x), torch.ops.esd_fast.geglu_backward(grad, x)),
    )


@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate(dtype):
    """The GELU and its slope from -20 to 20, against float64, to the rule of the other tests in each part."""
    gate = torch.linspace(-20, 20, 4001).to(dtype)
    x = torch.stack((torch.ones_like(gate), gate), -1).flatten()  # (2 n,) as n rows of two halves
    x = x.view(-1, 2).requires_grad_()
    y = ops.geglu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    exact_gate = gate.double().requires_grad_()
    exact = torch.nn.functional.gelu(exact_gate)
    (slope,) = torch.autograd.grad(exact.sum(), exact_gate)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-7}
    torch.testing.assert_close(y[:, 0].double(), exact.detach(), **tolerance)
    torch.testing.assert_close(grad[:, 0].double(), exact.detach(), **tolerance)
    torch.testing.assert_close(grad[:, 1].double(), slope, **tolerance)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # NumPy's, in the interpreter
@pytest.mark.usefixtures("wrapped")
def test_gates_beyond_all_bounds():
    gate = torch.tensor([-1e38, -89.0, -13.3, 13.3, 89.0, 1e38, float("nan")])
    x = torch.stack((torch.ones_like(gate), gate), -1).requires_grad_()
    y = ops.geglu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y[:, 0], gate.clamp(min=0), equal_nan=True)
    slope = (gate > 0).float() + (gate - gate)
    torch.testing.assert_close(grad[:, 1], slope, equal_nan=True)


@pytest.mark.usefixtures("wrapped")
def test_keeps_its_argument_alone(make_geglu_case):
    x, _ = make_geglu_case((2, 3, 14)).inputs()
    kept = []

    def keep(value):
        kept.append(value.data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        ops.geglu(x.requires_grad_())
    assert kept == [x.data_ptr()]


@pytest.mark.usefixtures("wrapped")
def test_second_derivative_is_refused(make_geglu_case):
    x, _ = make_geglu_case((2, 3, 14)).inputs()
    y = ops.geglu(x.requires_grad_())
    with pytest.raises(RuntimeError, match="geglu has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"x: shape \(2, 3\): give \(..., 2 D\)"),
        (torch.zeros(0, 4), "with at least one number"),
        (torch.tensor(1.0), r"x: shape \(\)"),
        (torch.zeros(2, 4, dtype=torch.float64), "x: dtype torch.float64: use float32"),
    ],
)
def test_wrong_arguments(x, message):
    for function in (ops.geglu, OPERATOR):
        with pytest.raises(ValueError, match=message):
            function(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, make_geglu_case):
    x, grad = make_geglu_case((2, 3, 14), dtype).inputs()
    torch.library.opcheck(torch.ops.esd_fast.geglu_backward.default, (grad, x))
    torch.library.opcheck(OPERATOR.default, (x.requires_grad_(),))
