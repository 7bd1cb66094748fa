"""Keys and values of an unchanged prompt are computed once, and anew when anything changes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esd_fast
from esd_fast import engine
from esd_fast.kept_projections import KeptProjection, kept_projections
from esd_fast.models import Conditioning

from . import pipelines

one_thread = pipelines.one_thread


@pytest.fixture
def matrix() -> Any:
    torch.manual_seed(0)
    made = nn.Linear(5, 3).requires_grad_(False)
    made.__class__ = KeptProjection
    vars(made)["kept"] = None
    return made


def right(matrix: Any, states: torch.Tensor) -> bool:
    return bool(torch.equal(matrix(states), F.linear(states, matrix.weight, matrix.bias)))


def test_the_same_prompt_is_computed_once(matrix: Any) -> None:
    states = torch.randn(2, 7, 5)
    first = matrix(states)
    assert right(matrix, states)
    assert matrix(states) is first
    assert matrix(states.clone()) is not first


@pytest.mark.parametrize("change", ["prompt", "weight", "bias", "pointer", "dtype"])
def test_a_change_is_seen(matrix: Any, change: str) -> None:
    states = torch.randn(2, 7, 5)
    matrix(states)
    if change == "prompt":
        states.mul_(2)
    elif change == "pointer":  # as the teacher's weights are swapped in
        matrix.weight.data = torch.randn(3, 5)
    elif change == "dtype":
        matrix.double()
        states.data = states.data.double()
    else:
        getattr(matrix, change).mul_(2)
    assert right(matrix, states)


def test_in_training_nothing_is_kept(matrix: Any) -> None:
    states = torch.randn(2, 7, 5)
    matrix.weight.requires_grad_(True)
    results = [matrix(states), matrix(states)]
    assert results[0] is not results[1]
    (gradient,) = torch.autograd.grad(results[1].sum(), matrix.weight)
    assert torch.allclose(gradient, states.sum((0, 1)).expand(3, 5))
    with torch.no_grad():  # and where it rests
        assert matrix(states) is matrix(states)
    with torch.inference_mode():
        there = torch.randn(2, 7, 5)
        assert right(matrix, there)
        assert matrix(there) is not matrix(there)


def test_all_cross_attention_and_nothing_else() -> None:
    unet = pipelines.pipeline().unet
    classes = [type(m) for m in unet.modules()]
    with kept_projections(unet) as count:
        kept = {n for n, m in unet.named_modules() if isinstance(m, KeptProjection)}
    wanted = {n for n in dict(unet.named_modules()) if n.endswith(("attn2.to_k", "attn2.to_v"))}
    assert kept == wanted
    assert len(kept) == count
    assert [type(m) for m in unet.modules()] == classes
    assert not any("kept" in vars(m) for m in unet.modules())
    with kept_projections(copy.deepcopy(unet).to("meta")) as count:  # any other device
        assert count == 0


@pytest.mark.parametrize("method", ["esd-x", "selfattn"])
def test_a_run_computes_them_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a batch of trajectories; in fit once where they do not train. To the bit."""
    calls = 0
    plain = nn.Linear.forward

    def counting(self: Any, input: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += isinstance(self, KeptProjection)
        return plain(self, input)

    monkeypatch.setattr(nn.Linear, "forward", counting)

    def erased() -> Any:
        pipe = pipelines.pipeline()
        return esd_fast.erase(pipe, "cat", train_method=method, **pipelines.SHORT)

    ours = erased()
    matrices = int(ours.manifest["paths_taken"]["prompt_projections"].split()[0])
    in_fit = pipelines.SHORT["iterations"] if method == "esd-x" else 1
    assert calls == matrices * (1 + in_fit)
    monkeypatch.setattr(engine, "kept_projections", pipelines_off)
    truth = erased()
    assert all(pipelines.same_bits(ours.tensors[n], t) for n, t in truth.tensors.items())


def pipelines_off(_: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext(0)


def test_a_question_is_the_same_tensor() -> None:
    from esd_fast.collect import TeacherSamples
    from esd_fast.fit import Fitter

    two = TeacherSamples(*(torch.zeros(2) for _ in range(4)))
    fitter = object.__new__(Fitter)
    fitter.conditioning, fitter.asked = Conditioning(torch.zeros(1, 2, 3)), {}
    first = fitter.question(two)
    assert first.encoder_hidden_states.shape == (2, 2, 3)
    assert fitter.question(two) is first
