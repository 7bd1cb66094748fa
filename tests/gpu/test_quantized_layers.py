"""Quantized layers on a CUDA device: less memory within, every bit back after, an erasure as on the CPU."""

import copy

import pytest
import torch

import esd_fast
from esd_fast.parameters import trainable_names
from esd_fast.quantized_layers import held_bytes, quantized

from .. import pipelines  # noqa: TID252 -- tests is a package under no fixed name
from ..pipelines import SHORT, assert_same_weights, relative  # noqa: TID252

pytestmark = pytest.mark.gpu
pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_originals_wait_on_the_cpu(how):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2, 2), *(torch.nn.Linear(1024, 1024) for _ in range(4))]
    unet = torch.nn.Sequential(*layers).cuda().bfloat16().requires_grad_(False)
    before, x = copy.deepcopy(unet), torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    plain = torch.cuda.memory_allocated()
    with quantized(unet, ["0.weight", "0.bias"], how):
        less = plain - torch.cuda.memory_allocated()
        assert less == pytest.approx(held_bytes(before) - held_bytes(unet), rel=0.05)
        assert relative(unet[1](x), before[1](x)) < 0.15
    assert_same_weights(unet, pipelines.weights(before))
    assert {p.device.type for p in unet.parameters()} == {"cuda"}


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_an_erasure_is_as_on_the_cpu(how, graphs):
    given = {"quantize": how, "train_method": "esd-x", **SHORT}
    cpu = esd_fast.erase(pipelines.pipeline(), "cat", **given)
    pipe = pipelines.pipeline().to("cuda")
    before = pipelines.weights(pipe)
    ours = esd_fast.erase(pipe, "cat", cuda_graphs=graphs, **given)
    assert ours.manifest["losses"] == pytest.approx(cpu.manifest["losses"], rel=0.02)
    trained = set(trainable_names(pipe.unet, "esd-x"))
    after = pipelines.weights(pipe)
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - trained)
    ours.revert(pipe)
    assert_same_weights(pipe, before)
