"""geglu on a CUDA device: Triton against float64 and torch."""

import pytest
import torch

from esd_fast import ops

pytestmark = pytest.mark.gpu

OP = "geglu"  # for the fixture `way`


@pytest.mark.usefixtures("way")
def test_matches_float64(geglu_case):
    geglu_case.check(ops.geglu, "cuda")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240)])
def test_matches_float64_at_real_shapes(shape, dtype, make_geglu_case):
    make_geglu_case(shape, dtype).check(ops.geglu, "cuda")


@pytest.mark.usefixtures("way")
def test_current_stream_and_graph_capture(make_geglu_case):
    x, grad = make_geglu_case((2, 256, 2560), torch.bfloat16).inputs("cuda")
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: choices are made and kernels compiled
        (expected,) = torch.autograd.grad(ops.geglu(x), x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(ops.geglu(x), x, grad)
    graph.replay()
    assert torch.equal(gradient, expected)


def test_a_fast_way_is_taken():
    path = ops.path_of("geglu", "cuda")
    assert path.name == "triton", str(path)
