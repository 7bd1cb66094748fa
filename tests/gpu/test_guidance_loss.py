"""guidance_loss on a CUDA device: Triton and native, each against float64, and the two against torch."""

import pytest
import torch

from esd_fast import ops

pytestmark = pytest.mark.gpu

OP = "guidance_loss"  # for the fixture `way`


@pytest.mark.usefixtures("way")
def test_matches_float64(guidance_case):
    guidance_case.check(ops.guidance_loss, "cuda")


@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (2, 4, 128, 128), (3, 4, 61, 67), (300, 5)])
def test_two_runs_agree_in_every_bit(way, shape, guidance_arguments, guidance_results):
    if way == "torch":
        pytest.skip("not ours to promise")
    arguments = guidance_arguments(shape, torch.bfloat16, torch.bfloat16, "cuda")
    first, second = (guidance_results(ops.guidance_loss, arguments) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("way")
def test_unaligned_and_channels_last(guidance_arguments):
    student, *teachers, n, weight = guidance_arguments((2, 4, 33, 35), device="cuda")
    expected = torch.ops.esd_fast.guidance_loss(student, *teachers, n, weight, 1.0)

    def offset(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    for layout in (offset, channels_last):
        arguments = (*map(layout, (student, *teachers)), n, weight, 1.0)
        results = torch.ops.esd_fast.guidance_loss(*arguments)
        torch.testing.assert_close(results, expected)
        assert results[2].stride() == arguments[0].stride()


@pytest.mark.usefixtures("way")
def test_teachers_of_different_dtypes(guidance_arguments):
    student, anchor, concept, null, n, weight = guidance_arguments(device="cuda")
    mixed = ops.guidance_loss(student, anchor.bfloat16(), concept.half(), null, n, weight)
    plain = ops.guidance_loss(
        student, anchor.bfloat16().float(), concept.half().float(), null, n, weight
    )
    torch.testing.assert_close(mixed, plain)


@pytest.mark.usefixtures("way")
def test_current_stream_and_graph_capture(guidance_arguments):
    student, *others = guidance_arguments((2, 4, 64, 64), device="cuda")
    student.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: choices are made and kernels compiled
        loss, _ = ops.guidance_loss(student, *others)
        (expected,) = torch.autograd.grad(loss, student)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = ops.guidance_loss(student, *others)
        (gradient,) = torch.autograd.grad(loss, student)
    graph.replay()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, guidance_arguments):
    student, *others = guidance_arguments((2, 3, 5), dtype, torch.float32, "cuda")
    arguments = (student.requires_grad_(), *others, 2.0)
    torch.library.opcheck(torch.ops.esd_fast.guidance_loss.default, arguments)


def test_a_fast_way_is_taken():
    path = ops.path_of("guidance_loss", "cuda")
    assert path.name in ("triton", "native-cuda"), str(path)
