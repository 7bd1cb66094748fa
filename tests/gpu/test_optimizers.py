"""Optimizers on a CUDA device: fused against plain, 8 bits, and a step within a CUDA graph."""

import math

import pytest
import torch

from esd_fast.optimizers import OPTIMIZERS, described, make_optimizer
from esd_fast.parameters import TrainableSubset

pytestmark = pytest.mark.gpu
SHAPES = [(320, 768), (8, 6, 3, 3), (7,)]


def numbers(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(make, device, dtype=torch.float32):
    start = [t.to(device, dtype) for t in numbers(0, 0.02)]
    weights = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = make(weights)
    for step in range(1, 9):
        for weight, gradient in zip(weights, numbers(step, 1e-4), strict=True):
            weight.grad = gradient.to(weight)
        optimizer.step()
    moves = [(w.detach() - s).double().cpu() for w, s in zip(weights, start, strict=True)]
    return moves, described(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moves_are_those_of_plain_adam_in_float64(name):
    if OPTIMIZERS[name].bits == 8:
        pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    plain = torch.optim.AdamW if OPTIMIZERS[name].decays else torch.optim.Adam
    truth, _ = stepped(lambda w: plain(w, lr=1e-3, fused=False), "cpu", torch.float64)
    ours, said = stepped(lambda w: make_optimizer(name, w, 1e-3), "cuda")
    large, *small = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]
    assert max(small) < 2e-5
    assert large < (0.1 if OPTIMIZERS[name].bits == 8 else 2e-5)
    assert ("bitsandbytes" if OPTIMIZERS[name].bits == 8 else "(fused)") in said


class Stepping:
    """A float16 matrix, its master, and a scaled gradient that lies where a graph looks for it."""

    def __init__(self):
        torch.manual_seed(0)
        self.unet = torch.nn.Linear(64, 48, device="cuda", dtype=torch.float16)
        self.subset = TrainableSubset.of(self.unet, ["weight", "bias"])
        self.optimizer = make_optimizer("adam", self.subset.masters.values(), 1e-3, capturable=True)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        self.scaler.scale(torch.ones((), device="cuda"))  # makes the scale
        self.given = {n: torch.ones_like(p) for n, p in self.subset.parameters.items()}

    def step(self):
        for name, parameter in self.subset.parameters.items():
            parameter.grad = self.given[name].clone()
        self.subset.step(self.optimizer, self.scaler, max_grad_norm=1e-3)


def test_a_captured_step_clips_skips_and_writes_back():
    eager, graphed = Stepping(), Stepping()
    eager.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for factor in (1.0, -0.5, math.inf, 2.0):
        for one in (eager, graphed):
            for gradient in one.given.values():
                gradient.fill_(factor)
        before = graphed.unet.weight.detach().clone()
        eager.step()
        graph.replay()
        assert torch.equal(before, graphed.unet.weight) == math.isinf(factor)
        assert graphed.scaler.get_scale() == eager.scaler.get_scale()
        for name, master in eager.subset.masters.items():
            torch.testing.assert_close(graphed.subset.masters[name], master)
    assert eager.scaler.get_scale() == 512.0
