"""guided_step on a CUDA device: Triton and torch, each against float64; streams and graph capture."""

import pytest
import torch

from esd_fast import ops

pytestmark = pytest.mark.gpu

OP = "guided_step"  # for the fixture `way`


@pytest.mark.usefixtures("way")
def test_matches_float64(some_step):
    some_step.device = "cuda"
    some_step.check(ops.guided_step)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("index", [0, 6, 7, 10])
def test_every_call(index, keep, step_case):
    step_case((3, 4, 4, 33, 35), torch.bfloat16, torch.bfloat16, index, keep, "cuda").check(
        ops.guided_step
    )


def test_two_runs_agree_in_every_bit(way, step_case):
    if way == "torch":
        pytest.skip("not ours to promise")
    first, second = (step_case((3, 4, 4, 64, 64), device="cuda").arguments() for _ in range(2))
    ops.guided_step(**first)
    ops.guided_step(**second)
    for name in ("history", "inputs", "seen", "said"):
        assert torch.equal(first[name], second[name])


def test_a_call_too_many_writes_nothing(way, step_case):
    if way == "torch":
        pytest.skip("an assertion of torch's, that spoils the device for the tests after it")
    for index in (-1, 11):
        before, given = (
            step_case((3, 2, 5, 7), index=index, device="cuda").arguments() for _ in range(2)
        )
        ops.guided_step(**given)
        for name in ("history", "inputs", "seen", "said"):
            assert torch.equal(before[name], given[name])


@pytest.mark.usefixtures("way")
def test_one_captured_graph_makes_every_call(step_case):
    """The number of the call is a counter on the device, moved on within the graph."""
    eager, given = (
        step_case((2, 2, 4, 16, 16), index=0, device="cuda").arguments() for _ in range(2)
    )
    for i in range(11):
        ops.guided_step(**eager | {"index": torch.tensor([i], device="cuda")})
    start = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: choices are made and kernels compiled
        ops.guided_step(**given)
    torch.cuda.current_stream().wait_stream(side)
    for name, value in start.items():
        given[name].copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.guided_step(**given)
        given["index"] += 1
    for _ in range(11):
        graph.replay()
    for name in ("history", "inputs", "seen", "said"):
        torch.testing.assert_close(given[name], eager[name])


def test_the_host_does_not_wait(way, step_case):
    given = step_case((2, 2, 4, 16, 16), device="cuda").arguments()
    ops.guided_step(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.guided_step(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert way in ("triton", "torch")


def test_triton_is_taken():
    path = ops.path_of("guided_step", "cuda")
    assert path.name == "triton", str(path)
