"""Each optimizer against its formula in float64, clipping, and float16's loss scale."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import esd_fast
from esd_fast import optimizers
from esd_fast.config import EraseConfig
from esd_fast.fit import MOST_SKIPS, FitStep, NonFiniteLoss
from esd_fast.optimizers import OPTIMIZERS, described, make_optimizer, state_bytes
from esd_fast.parameters import TrainableSubset, trainable_names

from . import pipelines
from .pipelines import SHORT, assert_same_weights, relative, same_bits, watched_run

one_thread = pipelines.one_thread
STEPS = 12
RATE = 1e-3


@pytest.fixture
def eight_bit() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")


def tensors() -> list[Tensor]:
    """Of weights' size: a matrix, a convolution in channels_last, a bias, one element."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 80), (8, 6, 3, 3), (7,), (1,)]
    made = [torch.randn(s, generator=generator) * 0.02 for s in shapes]
    made[1] = made[1].to(memory_format=torch.channels_last)
    return made


def gradients() -> Iterator[list[Tensor]]:
    """Of every size, some of them zero, in the tensors' layout as autograd gives them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [
            torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator).pow(3) * 1e-4)
            for t in tensors()
        ]


def adam_in_float64(decay: float) -> list[Tensor]:
    """Kingma and Ba's algorithm 1, with Loshchilov and Hutter's decay beside it."""
    weights = [t.double() for t in tensors()]
    firsts, seconds = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step, given in enumerate(gradients(), 1):
        for w, m, v, gradient in zip(weights, firsts, seconds, given, strict=True):
            g = gradient.double()
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            w.mul_(1 - RATE * decay)
            w.sub_(RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return weights


def stepped(name: str, **settings: Any) -> tuple[list[Tensor], torch.optim.Optimizer]:
    weights = [torch.nn.Parameter(t) for t in tensors()]
    optimizer = make_optimizer(name, weights, RATE, **settings)
    for given in gradients():
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = gradient
        optimizer.step()
    return [w.detach() for w in weights], optimizer


def moves_apart(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        relative(a.double() - s.double(), b - s.double())
        for a, b, s in zip(ours, truth, tensors(), strict=True)
    ]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "given", "decay", "said"),
    [
        ("adam", None, 0.0, "Adam (fused)"),
        ("adamw", None, 0.01, "AdamW (fused), weight_decay 0.01"),
        ("adamw", 0.3, 0.3, "AdamW (fused), weight_decay 0.3"),
        ("adamw", 0.0, 0.0, "AdamW (fused)"),
    ],
)
def test_moves_are_those_of_the_formula(
    name: str, given: float | None, decay: float, said: str, capturable: bool
) -> None:
    ours, optimizer = stepped(name, weight_decay=given, capturable=capturable)
    # a rounding of the weight, 2**-25 of it, in each of 12 moves of a twentieth of it and less
    assert max(moves_apart(ours, adam_in_float64(decay))) < 2e-5
    assert described(optimizer) == said


def test_fused_is_as_near_the_formula_as_plain() -> None:
    truth = adam_in_float64(0.0)
    plain_weights = [torch.nn.Parameter(t) for t in tensors()]
    plain = torch.optim.Adam(plain_weights, lr=RATE, fused=False)
    for given in gradients():
        for weight, gradient in zip(plain_weights, given, strict=True):
            weight.grad = gradient
        plain.step()
    assert described(plain) == "Adam (not fused on cpu)"
    fused, _ = stepped("adam")
    of_plain = moves_apart([w.detach() for w in plain_weights], truth)
    for ours, theirs in zip(moves_apart(fused, truth), of_plain, strict=True):
        assert ours <= 2 * theirs + 1e-6


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize(("name", "decay"), [("adam8bit", 0.0), ("adamw8bit", 0.01)])
def test_eight_bits_are_near_the_formula(name: str, decay: float) -> None:
    ours, optimizer = stepped(name)
    large, *small = moves_apart(ours, adam_in_float64(decay))
    assert max(small) < 2e-5  # those keep 32 bits
    assert 1e-4 < large < 0.1  # 256 values for a moment
    assert described(optimizer).startswith(f"{OPTIMIZERS[name].name} (bitsandbytes)")
    kept = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert [s["state1"].dtype for s in kept] == [torch.uint8] + 3 * [torch.float32]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_as_large_as_planned(name: str, request: pytest.FixtureRequest) -> None:
    if OPTIMIZERS[name].bits == 8:
        request.getfixturevalue("eight_bit")
    _, optimizer = stepped(name)
    for weight in optimizer.param_groups[0]["params"]:
        kept = [
            v.nbytes
            for n, v in optimizer.state[weight].items()
            if n != "step" and not n.startswith("qmap")  # a table for all tensors together
        ]
        assert sum(kept) == state_bytes(name, weight.numel())


@pytest.mark.usefixtures("eight_bit")
def test_eight_bits_cannot_be_captured_and_say_why() -> None:
    with pytest.raises(ValueError, match="adam8bit: bitsandbytes counts steps on the host"):
        make_optimizer("adam8bit", tensors(), RATE, capturable=True)
    assert optimizers.why_not_capturable("adamw") == ""
    with pytest.raises(ValueError, match="the model is on meta; it must be on cuda or cpu"):
        make_optimizer("adam8bit", [torch.zeros(1, device="meta")], RATE)


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit"])
def test_a_missing_library_is_named_before_anything_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.optimizers.EXTRA", "no_such_library")
    monkeypatch.setattr("esd_fast.esd.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"needs no_such_library .*pip install no_such_library"):
        esd_fast.erase(None, "cat", optimizer=name)


# ------------------------------------------------------------------------------------ through an erasure


def erased(dtype: torch.dtype = torch.float32, **settings: Any) -> pipelines.Watched:
    config = EraseConfig(concept="cat", **SHORT | settings)
    return watched_run(pipelines.pipeline(dtype=dtype), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_decays_beside_adam(dtype: torch.dtype) -> None:
    plain = erased(dtype, iterations=1)
    ours = erased(dtype, iterations=1, optimizer="adamw", weight_decay=2.0)
    for name, tensor in ours.erasure.tensors.items():
        start = ours.start[name].double()
        expected = plain.erasure.tensors[name].double() - 1e-3 * 2.0 * start
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    assert ours.erasure.manifest["config"]["optimizer"] == "adamw"
    assert ours.erasure.manifest["config"]["weight_decay"] == 2.0
    assert ours.erasure.manifest["paths_taken"]["optimizer"] == "AdamW (fused), weight_decay 2"
    assert plain.erasure.manifest["paths_taken"]["optimizer"] == "Adam (fused)"


@pytest.mark.usefixtures("eight_bit")
def test_eight_bits_erase_as_adam_does() -> None:
    plain, ours = erased(), erased(optimizer="adam8bit")
    assert ours.erasure.manifest["paths_taken"]["optimizer"] == "Adam8bit (bitsandbytes)"
    losses = plain.erasure.manifest["losses"]
    assert ours.erasure.manifest["losses"] == pytest.approx(losses, rel=1e-2)


def test_clipping_reaches_the_optimizer() -> None:
    """Gradients far below Adam's epsilon of 1e-8 hardly move a weight."""
    ours = erased(max_grad_norm=1e-13)
    for name, tensor in ours.erasure.tensors.items():
        assert (tensor - ours.start[name]).abs().max() < 1e-3 * SHORT["learning_rate"]
    off = erased(max_grad_norm=0)  # as kohya's scripts say "none"
    plain = erased().erasure.tensors
    assert all(same_bits(t, plain[n]) for n, t in off.erasure.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("longest", [0.5, 1e9])
def test_gradients_are_clipped_by_their_norm_together(
    dtype: torch.dtype, filtered: bool, longest: float
) -> None:
    """Unscaled first; by the norm of what the masters get; to the norm, or not at all."""
    unet = pipelines.pipeline(dtype=dtype).unet
    names = [n for n in trainable_names(unet, "esd-x-strict") if n.endswith("weight")]
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    filters = {names[0]: torch.randn(width, width, generator=generator)} if filtered else {}
    subset = TrainableSubset.of(unet, names, filters)
    before = {n: m.detach().clone() for n, m in subset.masters.items()}
    truth = {}
    for name, parameter in subset.parameters.items():
        gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.grad = gradient
        given = gradient.double() / 8
        truth[name] = given @ filters[name].double() if name in filters else given
    norm = math.sqrt(sum(g.square().sum().item() for g in truth.values()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes the scale
    subset.step(torch.optim.SGD(subset.masters.values(), lr=1.0), scaler, longest)
    for name, master in subset.masters.items():
        moved = before[name].double() - master.detach().double()
        assert relative(moved, truth[name] * min(1.0, longest / norm)) < 1e-5


def test_gradients_are_laid_out_as_their_masters() -> None:
    """torch's fused Adam on the CPU reads one beside the other, whatever their strides."""
    unet = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3)).bfloat16()
    subset = TrainableSubset.of(unet, ["0.weight"])
    unet.to(memory_format=torch.channels_last)  # after the masters were made
    weight = unet.get_parameter("0.weight")
    start = weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    gradient = (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight)
    weight.grad = gradient.clone(memory_format=torch.channels_last)
    subset.step(make_optimizer("adam", subset.masters.values(), RATE))
    moved = subset.masters["0.weight"].detach().double() - start
    torch.testing.assert_close(moved, -RATE * gradient.double(), rtol=1e-4, atol=1e-8)


# --------------------------------------------------------------------------------------- float16's loss scale


def overflowing(pipe: Any, backwards: int) -> list[float]:
    """A gradient of `pipe`'s first `backwards` backwards overflows; what was seen of the others."""
    parameter = pipe.unet.get_parameter(trainable_names(pipe.unet, "esd-x")[-2])
    seen: list[float] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient.float().norm().item())
        return gradient * math.inf if len(seen) <= backwards else gradient

    parameter.register_hook(hook)
    return seen


def test_a_step_that_overflows_is_skipped_and_the_scale_halved() -> None:
    pipe, plain = (pipelines.pipeline(dtype=torch.float16) for _ in range(2))
    seen, unhurt = overflowing(pipe, 2), overflowing(plain, 0)
    config = EraseConfig(concept="cat", **SHORT | {"learning_rate": 1e-9})  # no weight shows it
    ours, truth = watched_run(pipe, config), watched_run(plain, config)
    assert ours.erasure.manifest["skipped_steps"] == 2
    assert [s.skipped for s in ours.steps] == [True, True, False, False]
    assert truth.erasure.manifest["skipped_steps"] == 0
    scales = [1, 0.5, 0.25, 0.25]  # of the first: the same weights answered the same samples
    assert seen == pytest.approx([s * g for s, g in zip(scales, unhurt, strict=True)], rel=1e-2)
    assert ours.erasure.manifest["losses"] == truth.erasure.manifest["losses"]
    assert all(t.isfinite().all() for t in ours.erasure.tensors.values())


def test_no_weight_and_no_moment_moves_in_a_skipped_step() -> None:
    pipe = pipelines.pipeline(dtype=torch.float16)
    before = pipelines.weights(pipe)
    overflowing(pipe, 2)
    states = []

    def look(step: FitStep) -> None:
        if step.skipped:
            assert_same_weights(pipe, before)
        states.append(step.skipped)

    esd_fast.erase(pipe, "cat", on_step=look, **SHORT)
    assert states == [True, True, False, False]
    # the first step that was taken is an Adam's first: every weight moves by the learning rate
    pipe = pipelines.pipeline(dtype=torch.float16)
    overflowing(pipe, 3)
    moved = watched_run(pipe, EraseConfig(concept="cat", **SHORT))
    steps = [(t - moved.start[n].float()).abs() for n, t in moved.erasure.tensors.items()]
    assert max(s.max().item() for s in steps) == pytest.approx(SHORT["learning_rate"], rel=1e-2)


def test_a_scale_is_found_where_real_gradients_overflow() -> None:
    """Targets so far away that the loss scale to begin with is too much for float16."""
    far = {"negative_guidance": 3e4, "iterations": 12, "num_inference_steps": 12}
    ours = erased(torch.float16, **far)
    skipped = ours.erasure.manifest["skipped_steps"]
    assert 0 < skipped < 12
    assert [s.skipped for s in ours.steps] == [True] * skipped + [False] * (12 - skipped)
    assert erased(torch.bfloat16, **far).erasure.manifest["skipped_steps"] == 0


def test_a_run_that_only_skips_is_stopped() -> None:
    pipe = pipelines.pipeline(dtype=torch.float16)
    before = pipelines.weights(pipe)
    seen = overflowing(pipe, 1000)
    with pytest.raises(NonFiniteLoss, match=rf"{MOST_SKIPS} steps in a row.*bfloat16 or float32"):
        esd_fast.erase(pipe, "cat", **SHORT | {"iterations": 100})
    assert len(seen) == MOST_SKIPS
    assert_same_weights(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_no_number_stops_at_once(dtype: torch.dtype) -> None:
    """No scale can cure it: nothing is skipped."""
    pipe = pipelines.pipeline(dtype=dtype)
    before = pipelines.weights(pipe)
    seen: list[FitStep] = []

    def spoil(_: Any, __: Any, output: Any) -> Any:
        return (output[0] * math.nan,) if torch.is_grad_enabled() else None

    pipe.unet.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at iteration 0"):
        esd_fast.erase(pipe, "cat", on_step=seen.append, **SHORT)
    assert not seen
    assert_same_weights(pipe, before)
