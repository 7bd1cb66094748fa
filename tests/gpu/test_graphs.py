"""CUDA graphs on a card: what is replayed is what runs eagerly, and a capture that fails gives way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esd_fast import EraseConfig
from esd_fast.esd import run
from esd_fast.fit import FitStep
from esd_fast.graphed_steps import RunGraphs
from esd_fast.graphs import CudaCapture, Graphed, copies_of
from esd_fast.models import load_model
from esd_fast.parameters import trainable_names

from .. import pipelines  # noqa: TID252 -- tests is a package under no fixed name
from ..pipelines import relative, worst_move  # noqa: TID252

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' schedulers
]
SETTINGS: dict[str, Any] = {"iterations": 20, "num_inference_steps": 10, "learning_rate": 1e-4}
# Reductions of both take other paths on a card, and Adam divides by the size of each gradient:
# moves of float32 agree to percents, those of 16 bits to some more.
MOVES = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2}
SAMPLES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """No TensorFloat-32, and sums in a fixed order."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def erased(dtype: torch.dtype, **settings: Any) -> Any:
    """Start, erasure and steps of a run on the card."""
    pipe = pipelines.pipeline("sd-ddim", dtype).to("cuda")
    config = EraseConfig.from_preset(
        settings.pop("preset", "fast"), "cat", **SETTINGS | {"batch_size": 2} | settings
    )
    steps: list[FitStep] = []
    start = {n: p.detach().float().cpu() for n, p in pipe.unet.named_parameters()}
    erasure = run(load_model(pipe, config), config, on_step=steps.append)
    return start, erasure, steps


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replayed_and_eager_agree_after_20_fit_steps(
    dtype: torch.dtype, checkpointing: str
) -> None:
    start, ours, steps = erased(dtype, checkpointing=checkpointing)
    _, eager, own = erased(dtype, checkpointing=checkpointing, cuda_graphs="off")
    path = ours.manifest["paths_taken"]["cuda_graphs"]
    assert path.startswith("collect: yes (1 captured, "), path
    assert path.endswith("; fit: yes (1 captured, 20 steps replayed)"), path
    assert eager.manifest["paths_taken"]["cuda_graphs"].count("no (switched off)") == 2
    for a, b in zip(steps, own, strict=True):
        assert relative(a.samples.latents, b.samples.latents) <= SAMPLES[dtype]
        assert (
            relative(a.samples.noise_pred_concept, b.samples.noise_pred_concept) <= SAMPLES[dtype]
        )
    assert worst_move(start, ours.tensors, eager.tensors) <= MOVES[dtype]


@pytest.mark.parametrize("preset", ["reference", "paper", "paper-diffusers"])
def test_rollouts_of_every_length_and_of_a_student(preset: str) -> None:
    start, ours, _ = erased(torch.float32, preset=preset)
    _, eager, _ = erased(torch.float32, preset=preset, cuda_graphs="off")
    path = ours.manifest["paths_taken"]["cuda_graphs"]
    assert path.count("yes (1 captured, ") == 2, path
    assert ours.manifest["losses"] == pytest.approx(eager.manifest["losses"], rel=1e-2)
    assert worst_move(start, ours.tensors, eager.tensors) <= 0.1


@pytest.mark.parametrize("method", ["esd-x", "esd-all"])
def test_two_replayed_runs_start_from_the_same_weights(method: str) -> None:
    """Warm-up and capture leave no trace in the first loss, nor in the live pipeline."""
    pipe = pipelines.pipeline().to("cuda")
    config = EraseConfig(concept="cat", train_method=method, **SETTINGS)
    first = run(load_model(pipe, config), config)
    first.revert(pipe)
    again = run(load_model(pipe, config), config)
    assert set(first.tensors) == set(trainable_names(pipe.unet, method))
    assert again.manifest["losses"][0] == pytest.approx(first.manifest["losses"][0], rel=1e-5)


def test_a_stage_that_waits_for_the_device_gives_way_and_all_goes_on() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, total = (torch.zeros(3, device=device) for _ in range(2))

    def add() -> None:
        if x.sum().item() > 0:  # the host has to know: no graph can hold it
            total.add_(x)

    graph = Graphed(
        CudaCapture(device),
        {"x": x},
        {"add": add},
        saved=lambda: copies_of(lambda: (total,)),
        storages=lambda: (),
    )
    before = torch.cuda.current_stream(device)
    for value in (1.0, 2.0, 4.0):
        graph.fill(x=torch.full((3,), value, device=device))
        graph.run("add")
    assert total.tolist() == [7.0] * 3
    assert graph.why_not.startswith("capture failed: ")
    assert torch.cuda.current_stream(device) == before
    assert not torch.cuda.is_current_stream_capturing()
    torch.rand(1, device=device)  # raised once: the generator took the capture for unfinished
    whole = RunGraphs.of("auto", torch.nn.Linear(1, 1, device=device))  # another capture works
    assert not isinstance(whole.fit, str)
    doubled = torch.zeros(3, device=device)
    replay = whole.fit.record(lambda: torch.mul(x, 2, out=doubled))
    replay()
    assert doubled.tolist() == [8.0] * 3
