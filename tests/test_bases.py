"""The digest that tells models apart: exact sums of bits, the same on every device."""

import struct

import pytest
import torch

from esd_fast import bases
from esd_fast.bases import INTEGERS, sum_of_bits, torchs_sum, weights_digest


def by_python(tensor: torch.Tensor) -> int:
    """Integer by integer, as two's complement of 64 bits."""
    flat = tensor.contiguous().view(-1)
    size = tensor.element_size()
    kind = {1: "B", 2: "h", 4: "i", 8: "q"}[size]
    raw = bytes(flat.view(torch.uint8).tolist())
    total = sum(struct.unpack(f"<{len(raw) // size}{kind}", raw)) % 2**64
    return total - 2**64 if total >= 2**63 else total


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "tensor",
    [
        random(5, 7),
        random(5, 7).double(),  # overflows 64 bits
        random(5, 7).half(),
        random(5, 7).bfloat16(),
        random(5, 8).to(torch.float8_e4m3fn),
        random(2, 4, 3, 3).to(memory_format=torch.channels_last),
        random(8, 6).t(),
        random(6, 4)[::2],
        torch.tensor(-1.5),
        torch.zeros(0, 3),
        torch.full((70000,), float("nan")),
    ],
)
def test_a_sum_of_bits(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_python(tensor)
    assert sum_of_bits(tensor) == expected
    assert torchs_sum(tensor.view(INTEGERS[tensor.element_size()])) == expected
    monkeypatch.setattr(bases, "WIDENED", 4)  # in many parts
    assert torchs_sum(tensor.view(INTEGERS[tensor.element_size()])) == expected


def test_every_bit_tells() -> None:
    layer = torch.nn.Linear(4, 4)
    before = weights_digest([layer])
    with torch.no_grad():
        bits = layer.weight.view(torch.int32)
        bits[0, 0] ^= 1
    assert weights_digest([layer]) != before
    with torch.no_grad():
        bits[0, 0] ^= 1
    assert weights_digest([layer]) == before
