"""group_norm_silu on a CUDA device: Triton against float64 and torch."""

import pytest
import torch

from esd_fast import ops

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "torch"])
def way(request, monkeypatch):
    """Forces one way; skips with the reason where it cannot be taken."""
    device = torch.device("cuda", torch.cuda.current_device())
    if request.param == "triton" and (why := ops._why_no_triton(device)):
        pytest.skip(why)
    monkeypatch.setattr(ops, "_FORCED", request.param)
    assert ops.path_of("group_norm_silu", "cuda").name == request.param
    return request.param


@pytest.mark.usefixtures("way")
def test_matches_float64(norm_case):
    norm_case.check(ops.group_norm_silu, "cuda")


SD = [(2, 320, 64, 64), (1, 1280, 8, 8), (1, 2560, 16, 16), (1, 1920, 32, 32), (1, 960, 64, 64)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SD)
def test_matches_float64_at_real_shapes(shape, dtype, make_norm_case):
    case = make_norm_case(shape, 32, dtype, dtype)
    case.check(ops.group_norm_silu, "cuda")


def test_two_runs_agree_in_every_bit(way, make_norm_case):
    if way == "torch":
        pytest.skip("not ours to promise")
    case = make_norm_case((2, 320, 61, 67), 32, torch.bfloat16, torch.bfloat16)
    inputs, grad = case.inputs("cuda")
    inputs = [x.requires_grad_() for x in inputs]
    runs = []
    for _ in range(2):
        y = case.ours(ops.group_norm_silu)(*inputs)
        runs.append((y, *torch.autograd.grad(y, inputs, grad)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_current_stream_and_graph_capture(way, make_norm_case):
    case = make_norm_case((2, 320, 32, 32), 32, torch.bfloat16, torch.bfloat16)
    inputs, grad = case.inputs("cuda")
    inputs = [x.requires_grad_() for x in inputs]

    def both():
        y = case.ours(ops.group_norm_silu)(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: choices are made and kernels compiled
        expected = both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    graph.replay()
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y) if way == "triton" else torch.allclose(x, y)


def test_a_fast_way_is_taken():
    path = ops.path_of("group_norm_silu", "cuda")
    assert path.name == "triton", str(path)
