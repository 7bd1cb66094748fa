"""How a run works the UNet: the result does not depend on it, and the manifest says what was done."""

from functools import cache
from typing import Any

import pytest
import torch

import esd_fast
from esd_fast import accelerate, engine, ops
from esd_fast.checkpointing import blocks_in_backward
from esd_fast.memory_plan import plan_memory
from esd_fast.parameters import trainable_names

from . import pipelines

one_thread = pipelines.one_thread


def erased(pipe: Any = None, **settings: Any) -> Any:
    pipe = pipelines.pipeline() if pipe is None else pipe
    return esd_fast.erase(pipe, "cat", train_method="esd-x", **{**pipelines.SHORT, **settings})


def same(ours: Any, truth: Any) -> bool:
    return all(pipelines.same_bits(ours.tensors[n], t) for n, t in truth.tensors.items())


@cache
def plain_run() -> Any:
    return erased(checkpointing="none")


@pytest.fixture
def plain(one_thread: None) -> Any:  # noqa: ARG001 -- of as many threads as what is compared with it
    return plain_run()


def test_checkpointing_is_not_in_the_result(plain: Any) -> None:
    pipe = pipelines.pipeline()
    blocks = blocks_in_backward(pipe.unet, trainable_names(pipe.unet, "esd-x", "sd"))
    ours = erased(pipe, checkpointing="all")
    assert same(ours, plain)
    assert ours.manifest["paths_taken"]["checkpointing"] == f"{', '.join(blocks)}: asked for"
    assert plain.manifest["paths_taken"]["checkpointing"] == "none: asked for"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in pipe.unet.modules())


def test_no_limit_on_the_cpu(plain: Any) -> None:
    ours = erased()
    assert same(ours, plain)
    assert ours.manifest["paths_taken"]["checkpointing"] == "none: no limit on cpu"


def test_vram_is_obeyed(plain: Any) -> None:
    pipe = pipelines.pipeline()
    made = plan_memory("", dict(pipe.unet.config), "esd-x", 64, dtype="float32", vae_scale_factor=8)
    # a little more than the leanest choice takes, and less than the plain one
    wanted = made.choices[-2]
    assert wanted.total < made.choices[1].total
    mebibytes = wanted.total / 2**20 + 0.001
    ours = erased(pipe, vram=f"{mebibytes:.3f}MB")
    said = ours.manifest["paths_taken"]["checkpointing"]
    first, _, planned = said.partition(": ")
    assert first.split(", ")[0] in made.choices[-1].checkpointed
    assert planned.endswith("GiB planned")
    assert same(ours, plain)


def test_vram_that_nothing_fits_is_refused_before_anything_runs() -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    pipe.unet.forward = None  # a pass would fail
    with pytest.raises(ValueError, match=r"vram is '1MB', and the least that this takes is \d"):
        erased(pipe, vram="1MB")
    del pipe.unet.forward
    pipelines.assert_same_weights(pipe, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vram": "much"}, "vram is 'much'; it must be a size such as 8GB"),
        ({"vram": 8}, "vram is 8; it must be 'auto' or a size such as '8GB'"),
        ({"checkpointing": True}, "checkpointing is True; it must be 'auto' or 'none' or 'all'"),
    ],
)
def test_bad_values(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        erased(**settings)


def test_a_full_card_is_warned_of_and_given_the_leanest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "memory_for", lambda *_: 2**20)
    with pytest.warns(UserWarning, match="memory may run out"):
        ours = erased()
    assert "wanted, 0.0 GiB free" in ours.manifest["paths_taken"]["checkpointing"]


def test_an_available_fast_path_is_taken_and_the_unet_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, plain: Any
) -> None:
    """As on a device with fast operators; the formulas behind them are torch's."""
    choose = ops.path_of

    def path_of(op: str, device: Any) -> ops.OpPath:
        path = choose(op, device)
        return ops.OpPath(op, "triton", {}, path.run) if "g" in op[0] else path

    monkeypatch.setattr(ops, "path_of", path_of)
    pipe = pipelines.pipeline()
    classes = [type(m) for m in pipe.unet.modules()]
    ours = erased(pipe, checkpointing="none")
    paths = ours.manifest["paths_taken"]
    for op in ("group_norm_silu", "geglu"):
        assert paths[op].endswith("places: triton"), paths[op]
    assert paths["frozen_convolutions"] == "torch's own: the UNet is small"
    assert paths["packed_weights"] == "no: the UNet is small"
    assert paths["attention"] == "torch SDPA"
    assert [type(m) for m in pipe.unet.modules()] == classes
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_big_unet_saves_less_for_the_backward(
    monkeypatch: pytest.MonkeyPatch, plain: Any
) -> None:
    monkeypatch.setattr(engine, "FEWEST_WEIGHTS", 0)
    ours = erased(checkpointing="none")
    assert ours.manifest["paths_taken"]["frozen_convolutions"].endswith("save only their weight")
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_unet_that_the_caller_accelerated_stays_so() -> None:
    pipe = pipelines.pipeline()
    with accelerate.accelerate(pipe.unet, always=True):
        ours = erased(pipe)
        assert accelerate.is_accelerated(pipe.unet)
    assert ours.manifest["paths_taken"]["accelerate"] == "the caller's"
