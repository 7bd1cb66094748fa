"""What is kept in half the room comes back bit for bit."""

import pytest
import torch

from esd_fast.exact_copies import ExactCopies


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # with a payload
TINY = torch.tensor([1], dtype=torch.int32).view(torch.float32)  # the smallest float32 of all


@pytest.mark.parametrize(
    ("tensor", "itemsize"),
    [
        (random(8, 8).half().float(), 2),
        (random(8, 8).bfloat16().float(), 2),
        (random(8, 8).bfloat16().float() * 2.0**100, 2),  # beyond float16
        (random(8, 8), 4),
        (torch.cat([random(8, 8).half().float(), random(1, 8)]), 4),  # the last row does not fit
        (torch.tensor(0.5), 2),
        (torch.tensor([0.0, -0.0, torch.inf, -torch.inf]), 2),
        (torch.zeros(0), 2),
        (NAN, 4),
        (TINY, 4),
        (random(8, 8).half(), 2),
        (random(8, 8).double(), 8),
        (random(8, 8, 3, 3).half().float().to(memory_format=torch.channels_last), 2),
        (torch.nn.Parameter(random(8, 8).half().float()), 2),
    ],
)
def test_every_bit_comes_back(tensor: torch.Tensor, itemsize: int) -> None:
    before = tensor.detach().clone()
    copies = ExactCopies({"a": tensor})
    with torch.no_grad():
        tensor.fill_(7)
    assert list(copies) == ["a"]
    assert copies.nbytes == itemsize * before.numel()
    back = copies["a"]
    assert (back.dtype, back.stride()) == (before.dtype, before.stride())
    assert torch.equal(bits(back), bits(before))
    assert not back.requires_grad


def test_nothing_is_lost_where_the_processor_takes_small_numbers_for_zero() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor never does")
    try:
        copies = ExactCopies({"a": TINY})
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(copies["a"]), bits(TINY))


def test_a_subset_of_a_model_from_half_precision_takes_half_the_room() -> None:
    from esd_fast.parameters import TrainableSubset

    unet = torch.nn.Linear(64, 64)
    with torch.no_grad():
        unet.weight.copy_(unet.weight.half().float())
    start = unet.weight.detach().clone()
    subset = TrainableSubset.of(unet, ["weight"])
    assert subset.frozen.nbytes == start.nbytes // 2
    with torch.no_grad():
        unet.weight.add_(1)
    with subset.teacher():
        assert torch.equal(unet.weight, start)
    assert torch.equal(unet.weight, start + 1)
    subset.restore()
    assert torch.equal(unet.weight, start)
