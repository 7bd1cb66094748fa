"""The recorder sees every heavy call of a step, and what it replays is what it saw."""

import floor
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from esd_fast.packed_weights import packed_weights, why_not_dtype

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


class Small(torch.nn.Module):
    """A convolution, three products, attention, a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.to_qk = torch.nn.Linear(8, 16)
        self.to_v = torch.nn.Linear(8, 8, bias=False)
        self.out = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv(x)).flatten(2).transpose(1, 2).contiguous()  # (B, h w, 8)
        query, key = self.to_qk(x).chunk(2, -1)
        heads = [y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (query, key, self.to_v(x))]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y = self.out(y)
        return torch.bmm(y, y.transpose(1, 2))


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6)


def counts(recorder: floor.Recorder) -> dict[object, int]:
    found: dict[object, int] = {}
    for call, count in recorder.calls.items():
        packet = call.operator._overloadpacket
        found[packet] = found.get(packet, 0) + count
    return found


FORWARD = {aten.convolution: 1, aten.addmm: 2, aten.mm: 1, ATTENTION: 1, aten.bmm: 1}


def test_sees_exactly_the_known_calls(module, pictures):
    with torch.no_grad():
        assert counts(floor.record(lambda: module(pictures))) == FORWARD
    both = counts(floor.record(lambda: module(pictures).sum().backward()))
    backward = {
        aten.convolution_backward: 1,
        ATTENTION_BACKWARD: 1,
        aten.mm: FORWARD[aten.mm] + 2 * 3,  # of three linear layers, for input and weight
        aten.bmm: FORWARD[aten.bmm] + 2,
    }
    assert both == FORWARD | backward


def test_frozen_weights_cost_no_product(module, pictures):
    module.requires_grad_(False)
    module.out.weight.requires_grad_(True)
    found = counts(floor.record(lambda: module(pictures).sum().backward()))
    # the weight's own gradient alone: nothing before it needs one
    assert found == FORWARD | {aten.mm: FORWARD[aten.mm] + 1, aten.bmm: FORWARD[aten.bmm] + 2}


def test_inference_mode_hides_nothing(module, pictures):
    with torch.inference_mode():
        assert counts(floor.record(lambda: module(pictures))) == FORWARD


def test_flops_are_torchs(module, pictures):
    # torch has no formula for attention on the CPU
    mapping = {
        ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        ATTENTION_BACKWARD: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        recorder = floor.record(lambda: module(pictures).sum().backward())
    assert recorder.flops == counter.get_total_flops() > 0


def test_the_step_still_happens(module, pictures):
    expected = module(pictures)
    found = []
    floor.record(lambda: found.append(module(pictures)))
    assert torch.equal(found[0], expected)


def test_equal_calls_are_measured_once(module, pictures):
    def twice() -> None:
        for _ in range(2):
            module(pictures).sum().backward()

    once, double = floor.record(lambda: module(pictures).sum().backward()), floor.record(twice)
    assert double.calls == floor.Counter({c: 2 * n for c, n in once.calls.items()})
    replay = floor.Replay(double, "cpu")
    for _ in range(3):
        replay.round()
    bare = replay.floor()
    assert bare.repeats == 3
    assert bare.distinct == len(once.calls)
    assert bare.calls == 2 * once.calls.total()
    assert bare.flops == 2 * once.flops
    assert bare.seconds == pytest.approx(
        sum(2 * once.calls[c] * sorted(seconds)[1] for c, seconds in replay.seconds.items())
    )


def test_every_call_can_be_replayed(module, pictures):
    recorder = floor.record(lambda: module(pictures).sum().backward())
    for call in recorder.calls:
        results = call.prepared()()
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
                assert result.isfinite().all(), call


@pytest.mark.skipif(bool(why_not_dtype(torch.float32)), reason="no oneDNN")
def test_packed_calls_are_counted_and_replayed():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3))
    pixels = torch.randn(2, 3, 6, 6)
    plain = floor.record(lambda: layers(pixels.requires_grad_()).sum().backward())
    layers.requires_grad_(False)
    frozen = floor.record(lambda: layers(pixels.requires_grad_()).sum().backward())
    with packed_weights(layers):
        ours = floor.record(lambda: layers(pixels.requires_grad_()).sum().backward())
    assert frozen.flops < plain.flops  # no gradient of the weights
    # the gradient of the input counts the pixels at the border that a convolution pads
    assert frozen.flops <= ours.flops < 1.5 * frozen.flops
    for call in ours.calls:
        assert call.prepared()().isfinite().all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 5),
        torch.ones(3, 5).t(),
        torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.ones(5).expand(3, 5),
        torch.ones(2, 6, 4)[:, 1:3],
        torch.ones((), dtype=torch.int64),
        torch.ones(0, 3),
        torch.ones(2, 3, dtype=torch.bfloat16),
    ],
)
def test_operands_keep_shape_and_layout(tensor):
    made = floor.frozen(tensor).random()
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def test_normal_numbers_by_the_block():
    tensor = torch.empty(2, floor.BLOCK)
    floor.fill_normal(tensor, std=0.5)
    assert tensor.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(tensor[0], tensor[1])
    with_tail = torch.full((floor.BLOCK + 3,), 9.0)
    floor.fill_normal(with_tail)
    assert with_tail.abs().max() < 9
