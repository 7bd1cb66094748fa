"""group_norm_silu on a CUDA device: Triton and native, each against float64, and the two against torch."""

import pytest
import torch

from esd_fast import ops

pytestmark = pytest.mark.gpu

OP = "group_norm_silu"  # for the fixture `way`


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
        assert torch.allclose(x, y) if way == "torch" else torch.equal(x, y)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 1040, 2, 3), 2),  # a group wider than a tile of the native kernels
        ((1, 1203, 9, 9), 3),  # tiles that end within groups
        ((1, 72, 7, 5), 72),  # a channel a group
        ((2, 7, 11, 13), 7),
        ((1, 8, 50, 45), 4),
    ],
)
def test_matches_float64_at_odd_shapes(shape, groups, make_norm_case):
    for dtype in (torch.float32, torch.bfloat16):
        make_norm_case(shape, groups, dtype, torch.float32).check(ops.group_norm_silu, "cuda")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unaligned(dtype, make_norm_case):
    (x, *parameters), grad = make_norm_case((2, 40, 15, 17), 4, dtype, dtype).inputs("cuda")
    grad = grad.contiguous(memory_format=torch.channels_last)

    def offset(t):
        flat = torch.as_strided(t, (t.numel(),), (1,))
        moved = torch.cat((flat.new_zeros(1), flat))[1:]
        return torch.as_strided(moved, t.shape, t.stride(), moved.storage_offset())

    def both(grad, x, *parameters):
        y, mean, rstd = torch.ops.esd_fast.group_norm_silu(x, *parameters, 4, 1e-5, True)
        backward = torch.ops.esd_fast.group_norm_silu_backward
        return y, mean, rstd, *backward(grad, x, mean, rstd, *parameters, 4, True, True)

    plain = (grad, x, *parameters)
    torch.testing.assert_close(both(*map(offset, plain)), both(*plain))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, silu, make_norm_case):
    (x, weight, bias), grad = make_norm_case(dtype=dtype).inputs("cuda")
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias, 2, 1e-5, silu)
    torch.library.opcheck(torch.ops.esd_fast.group_norm_silu.default, arguments)
    _, mean, rstd = torch.ops.esd_fast.group_norm_silu(*arguments)
    torch.library.opcheck(
        torch.ops.esd_fast.group_norm_silu_backward.default,
        (grad, x.detach(), mean, rstd, weight.detach(), bias, 2, silu, True),
    )


@pytest.mark.usefixtures("way")
def test_another_device_than_the_current_one(make_norm_case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    make_norm_case().check(ops.group_norm_silu, "cuda:1")
    assert torch.cuda.current_device() == 0


def test_a_fast_way_is_taken():
    path = ops.path_of("group_norm_silu", "cuda")
    assert path.name in ("triton", "native-cuda"), str(path)
