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
    monkeypatch.setattr(ops, "_torch_runs", lambda *_: False)


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
